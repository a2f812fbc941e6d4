"""95 % intervals over prompts: how far a figure would move with other prompts of the same kind.

Wilson's for the share of prompts with a property, a bootstrap for means over tokens. A bootstrap of figures that
are all equal has no width: 8 of 8 solved would give 100 – 100 %, where Wilson's gives 68 – 100 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.runtime.shares import paired, wilson

SEED = 20_260_101
RESAMPLES = 2_000
LEVEL = 0.95
_CELLS = 4_000_000  # drawn at a time
SHARES = ("top1_agreement",)  # of the token means
Value = dict[str, float | None]
Bounds = tuple[float, float] | None
Pairs = dict[str, tuple[float, float]]


def of_share(flags: Sequence[float]) -> Bounds:
    """Wilson's interval of a mean over prompts of values in [0, 1]; None without prompts."""
    if not flags or not 0 <= min(flags) <= max(flags) <= 1:
        return None
    centre, width = wilson(sum(flags) / len(flags), len(flags))
    return max(0.0, centre - width), min(1.0, centre + width)


def interval(sums: Sequence[float], weights: Sequence[float] | None = None) -> Bounds:
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


def of_difference(new: Pairs, old: Pairs) -> Value | None:
    """Difference of two weighted means over the same prompts, with its 95 % percentile bootstrap, paired by prompt.

    `new` and `old` are (sum, weight) by prompt; None unless both have the same prompts, two at least.
    """
    if new.keys() != old.keys() or len(new) < 2:
        return None
    order = sorted(new)
    columns = np.array([[*new[prompt], *old[prompt]] for prompt in order], np.float64)
    if not np.isfinite(columns).all() or not columns[:, 1].sum() or not columns[:, 3].sum():
        return None
    random, sums, left = np.random.default_rng(SEED), [columns.sum(0)[None]], RESAMPLES
    while left:
        part = min(left, max(1, _CELLS // len(order)))
        drawn = random.multinomial(len(order), np.full(len(order), 1 / len(order)), part)
        sums.append(drawn @ columns)
        left -= part
    all_sums = np.concatenate(sums)
    means = all_sums[:, [0, 2]] / np.maximum(all_sums[:, [1, 3]], 1e-300)
    differences = means[:, 0] - means[:, 1]
    low, high = np.quantile(differences[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(differences[0]), "low": float(low), "high": float(high)}


def of_share_difference(new: Pairs, old: Pairs) -> Value | None:
    """As `of_difference` for shares of prompts, with Bonett and Price's interval; None without the same prompts."""
    if new.keys() != old.keys() or not new:
        return None
    differences = [new[prompt][0] - old[prompt][0] for prompt in new]
    gained, lost = (sum(max(0.0, sign * one) for one in differences) for sign in (1, -1))
    centre, width = paired(gained, lost, len(differences))
    value = sum(differences) / len(differences)
    return {"value": value, "low": max(-1.0, centre - width), "high": min(1.0, centre + width)}


def with_interval(value: float | None, bounds: Bounds) -> Value | None:
    """The page's form of a figure; None if it was not measured."""
    if value is None:
        return None
    low, high = bounds or (None, None)
    return {"value": value, "low": low, "high": high}


def of_rows(found: dict[str, Any], name: str) -> Bounds:
    """Interval of the token mean `name`, from the sums of each row (`by_row` of an evaluation).

    A share of tokens that is 0 or 1 in all rows has Wilson's interval, with rows as samples: tokens of a row are
    not independent.
    """
    rows = found.get("by_row") or {}
    if not rows.get(name) or len(rows[name]) != len(rows.get("tokens", ())):
        return None
    sums, tokens = np.asarray(rows[name], np.float64), np.asarray(rows["tokens"], np.float64)
    if name in SHARES and (not sums.any() or (sums == tokens).all()):
        return of_share([bool(sums.any())] * len(sums))
    return interval(rows[name], rows["tokens"])
