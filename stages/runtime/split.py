"""Rollouts of each refresh, and rows of a step per process and micro-step."""

from __future__ import annotations

from stages.runtime.config import Config
from stages.runtime.errors import UserError

DRIFT_WINDOW = 4
"""Optimizer steps over which measures such as `refresh_drift` are averaged; a drift refresh
cannot trigger before this many steps."""


def rollouts_of(config: Config, refresh_index: int) -> range:
    """Indices of a refresh's rollouts among all rollouts of the run: whole groups, in refresh order."""
    start = sum(pool_size(config, index) for index in range(refresh_index))
    return range(start, start + pool_size(config, refresh_index))


def pool_size(config: Config, refresh_index: int) -> int:
    """Rollouts that a refresh writes: `rollouts_per_refresh`, or fewer if the steps cannot use them all."""
    rows, group = steps_of(config, refresh_index) * config.train.batch_size, config.rollout.group_size
    return min(config.refresh.rollouts_per_refresh, -(-rows // group) * group)


def steps_of(config: Config, refresh_index: int) -> int:
    """Maximum optimizer steps on a refresh's rows before the next refresh replaces them."""
    policy, max_steps = config.refresh, config.train.max_steps
    if policy.refresh_mode == "off":
        return max_steps
    longest = policy.refresh_every or max_steps
    shortest = min(longest, DRIFT_WINDOW) if policy.is_measured else longest
    if policy.refresh_mode == "external":  # the old rows are used until they are too old
        longest = policy.max_age + 1
        shortest = min(shortest, longest)
    return max(1, min(longest, max_steps - refresh_index * shortest))


def rows_per_micro_step(config: Config, world_size: int) -> int:
    """Rows per process in each of the `grad_accum` micro-steps; UserError if they do not divide evenly."""
    train = config.train
    rows, rest = divmod(train.batch_size, world_size * train.grad_accum)
    if rest or rows == 0:
        raise UserError(
            f"batch_size {train.batch_size} cannot be cut into {world_size} process(es) x grad_accum"
            f" {train.grad_accum}: make batch_size a multiple of {world_size * train.grad_accum}, or lower"
            " grad_accum."
        )
    return rows
