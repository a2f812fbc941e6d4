"""How a run's rows are divided: rollouts among refreshes, a step's rows among processes and micro-steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime.errors import UserError

if TYPE_CHECKING:
    from stages.runtime.config import Config


def rollouts_of(config: Config, refresh_index: int) -> range:
    """The places of a refresh's rollouts among all that the run writes: whole groups, one refresh after the other."""
    policy, group = config.refresh, config.rollout.group_size
    anew = round(policy.rollouts_per_refresh * (1 - policy.replay_share) / group) * group
    if refresh_index == 0:
        return range(policy.rollouts_per_refresh)
    start = policy.rollouts_per_refresh + (refresh_index - 1) * anew
    return range(start, start + anew)


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
