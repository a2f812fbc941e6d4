"""The two stages as commands: composition of the method (`dualkl`) and the shards (`cache`) with models and data."""
