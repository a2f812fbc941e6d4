"""Bootstrap intervals: how far a figure would move with other prompts of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SEED = 20_260_101
RESAMPLES = 2_000
LEVEL = 0.95
_CELLS = 4_000_000  # drawn at a time
Value = dict[str, float | None]


def interval(sums: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float] | None:
    """95 % percentile bootstrap of Σ sums / Σ weights over prompts drawn with replacement.

    `sums` and `weights` have one entry per prompt; `weights` are 1 by default, which gives a mean. None with
    fewer than two prompts. The seed is fixed: the same figures give the same interval.
    """
    above = np.asarray(sums, np.float64)
    below = np.ones_like(above) if weights is None else np.asarray(weights, np.float64)
    count = len(above)
    if count < 2 or not np.isfinite(above).all() or not below.sum():
        return None
    random, found = np.random.default_rng(SEED), []
    left = RESAMPLES
    while left:
        part = min(left, max(1, _CELLS // count))
        drawn = random.integers(0, count, (part, count))
        found.append(above[drawn].sum(1) / np.maximum(below[drawn].sum(1), 1e-300))
        left -= part
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def with_interval(value: float | None, bounds: tuple[float, float] | None) -> Value | None:
    """The page's form of a figure; None if it was not measured."""
    if value is None:
        return None
    low, high = bounds or (None, None)
    return {"value": value, "low": low, "high": high}


def of_rows(found: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Interval of the token mean `name`, from the sums of each row (`by_row` of an evaluation)."""
    rows = found.get("by_row") or {}
    if not rows.get(name) or len(rows[name]) != len(rows.get("tokens", ())):
        return None
    return interval(rows[name], rows["tokens"])
