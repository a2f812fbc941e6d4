"""Rollout engines: what a policy writes completions with. `protocol.py` is the contract, `opening.py` picks an engine."""
