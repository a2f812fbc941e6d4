"""Configuration, processes, checkpoints, metrics and errors."""
