"""Bootstrap intervals against a plain loop, and against what is known of a share."""

from __future__ import annotations

import math
import random

import pytest

from stages.viewer import intervals


def plain(sums: list[float], weights: list[float], resamples: int = 4000) -> tuple[float, float]:
    """The percentile bootstrap as a loop over resamples."""
    chance, found = random.Random(1), []
    for _ in range(resamples):
        drawn = [chance.randrange(len(sums)) for _ in sums]
        found.append(sum(sums[i] for i in drawn) / sum(weights[i] for i in drawn))
    found.sort()
    return found[int(0.025 * resamples)], found[int(0.975 * resamples)]


def test_the_interval_of_a_token_mean_is_that_of_a_plain_bootstrap_over_prompts() -> None:
    chance = random.Random(0)
    tokens = [float(chance.randrange(5, 200)) for _ in range(80)]
    sums = [count * chance.expovariate(4) for count in tokens]
    found = intervals.interval(sums, tokens)
    assert found is not None
    assert found == pytest.approx(plain(sums, tokens), rel=0.05)


def test_the_interval_of_a_share_is_about_two_standard_errors_wide() -> None:
    solved = [True] * 60 + [False] * 40
    found = intervals.interval(solved)
    assert found is not None
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * math.sqrt(0.6 * 0.4 / 100), rel=0.1)
    assert found[0] < 0.6 < found[1]
    assert found == intervals.interval(solved)  # the same figures, the same interval


@pytest.mark.parametrize("sums", [[], [0.5], [1.0, math.nan], [1.0, math.inf]])
def test_there_is_no_interval_without_two_known_prompts(sums: list[float]) -> None:
    assert intervals.interval(sums) is None
    assert intervals.with_interval(0.5, None) == {"value": 0.5, "low": None, "high": None}


def test_a_figure_that_was_not_measured_has_no_interval() -> None:
    assert intervals.with_interval(None, (0.0, 1.0)) is None
    assert intervals.of_rows({"by_row": {"tokens": [1, 2], "reverse_kl": [0.5]}}, "reverse_kl") is None
    assert intervals.of_rows({}, "reverse_kl") is None
