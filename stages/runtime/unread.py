"""Keys that somebody sets and that nothing will read: said, so that nobody believes in an effect that is not there."""

from __future__ import annotations

from typing import Any

from stages.runtime.errors import UserError

READ_BY = {"tau_end": ("linear", "cosine"), "tau_share": ("adaptive",), "tau_rate": ("adaptive",)}
"""The values of tau_schedule under which a key has an effect."""


def check_unread(sources: list[tuple[str, dict[str, Any]]], schedule: str) -> None:
    """`UserError` for a key of READ_BY that a source sets in vain; `schedule` is the tau_schedule that they come to.

    A source is ("on the command line" or "in FILE", its leaves). Not in vain: a key that the source's own tau_schedule reads,
    though a later source changes that; keys of a source that lists all of them, as pipeline.yaml and a run's config.yaml
    do, since no schedule reads them all.
    """
    for where, leaves in sources:
        schedules = schedule, leaves.get("tau_schedule")
        unread = [
            key
            for key, readers in READ_BY.items()
            if key in leaves and not any(s in readers for s in schedules)
        ]
        if unread and not READ_BY.keys() <= leaves.keys():
            key = unread[0]
            raise UserError(
                f"{key} {where} has no effect: tau_schedule is {schedule}, which does not read it; set tau_schedule:"
                f" {' or '.join(READ_BY[key])}, or leave {key} out."
            )
