"""Shares of prompts: intervals, and whether two answers to the same prompts differ by more than chance."""

from __future__ import annotations

from math import comb, sqrt

NORMAL = 1.96  # standard errors of a 95 % interval


def wilson(share: float, n: int) -> tuple[float, float]:
    """Centre and half width of Wilson's 95 % interval for a share of `n` samples."""
    z2 = NORMAL**2 / n
    width = NORMAL * sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    return (share + z2 / 2) / (1 + z2), width


def paired(gained: float, lost: float, n: int) -> tuple[float, float]:
    """Centre and half width of Bonett and Price's 95 % interval for the difference of two shares of the same `n`.

    `gained` and `lost`: samples of the second share alone, and of the first alone. It has a width at 0 and `n`.
    """
    more, less = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = more - less
    return centre, NORMAL * sqrt((more + less - centre**2) / (n + 2))


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: the chance of so uneven a split of the prompts that changed."""
    n, few = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(comb(n, k) for k in range(few + 1)) / 2**n)
