"""How a run's rows are divided: rollouts among refreshes, a step's rows among processes and micro-steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime.errors import UserError

if TYPE_CHECKING:
    from stages.runtime.config import Config


def rollouts_of(config: Config, refresh_index: int) -> range:
    """The places of a refresh's rollouts among all that the run writes: whole groups, one refresh after the other."""
    start = sum(_num_new(config, index) for index in range(refresh_index))
    return range(start, start + _num_new(config, refresh_index))


def pool_size(config: Config, refresh_index: int) -> int:
    """Rollouts to train on from a refresh on: `rollouts_per_refresh`, or as many as the steps can read of them."""
    rows, group = steps_of(config, refresh_index) * config.train.batch_size, config.rollout.group_size
    return min(config.refresh.rollouts_per_refresh, -(-rows // group) * group)


def steps_of(config: Config, refresh_index: int) -> int:
    """Most optimizer steps that can train on the rows of a refresh before those of the next one replace them."""
    policy, max_steps = config.refresh, config.train.max_steps
    if policy.refresh_mode == "off":
        return max_steps
    longest = max(policy.refresh_every, policy.refresh_min_steps) if policy.refresh_every else max_steps
    shortest = policy.refresh_min_steps
    if policy.refresh_every and not (policy.refresh_drift or policy.refresh_ess or policy.refresh_age):
        shortest = longest
    if (
        policy.refresh_mode == "external"
    ):  # rows are on their way for a while, and training waits at the bound
        longest = policy.max_staleness + 1
        shortest = max(policy.refresh_min_steps, min(shortest, longest))
    return max(1, min(longest, max_steps - refresh_index * shortest))


def _num_new(config: Config, refresh_index: int) -> int:
    """Of the rows of a refresh those that are written for it; `replay_share` of them stay."""
    group, kept = config.rollout.group_size, config.refresh.replay_share if refresh_index else 0.0
    return round(pool_size(config, refresh_index) * (1 - kept) / group) * group


def rows_per_micro_step(config: Config, world_size: int) -> int:
    """Rows of one process in one of its `grad_accum` micro-steps; an impossible split is a `UserError`."""
    train = config.train
    rows, rest = divmod(train.batch_size, world_size * train.grad_accum)
    if rest or rows == 0:
        raise UserError(
            f"batch_size {train.batch_size} cannot be cut into {world_size} process(es) x grad_accum {train.grad_accum}:"
            f" make batch_size a multiple of {world_size * train.grad_accum}, or lower grad_accum."
        )
    return rows
