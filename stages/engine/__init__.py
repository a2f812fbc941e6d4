"""Rollout engines, which write completions. `protocol.py` is the contract, `opening.py` picks an engine."""
