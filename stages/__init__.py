"""The two stages as commands: the method (`dualkl`) and the shards (`cache`) applied to models and data."""
