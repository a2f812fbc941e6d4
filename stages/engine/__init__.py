"""Rollout engines, which generate completions. `protocol.py` is the contract; `opening.py` picks one."""
