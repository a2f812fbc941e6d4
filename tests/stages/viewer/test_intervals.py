"""Intervals over prompts: a bootstrap against a plain loop, and against what is known of a share."""

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


def test_none_and_all_of_a_few_prompts_have_an_interval() -> None:
    assert intervals.of_share([True] * 8) == pytest.approx((0.6756, 1.0), abs=1e-4)
    assert intervals.of_share([False] * 8) == pytest.approx((0.0, 0.3244), abs=1e-4)
    rows = {"tokens": [10, 20, 30], "top1_agreement": [10, 20, 30]}
    assert intervals.of_rows({"by_row": rows}, "top1_agreement") == intervals.of_share([True] * 3)
    assert intervals.of_share([]) is None


def test_the_interval_of_a_share_is_about_two_standard_errors_wide() -> None:
    found = intervals.of_share([True] * 60 + [False] * 40)
    assert found is not None
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * math.sqrt(0.6 * 0.4 / 100), rel=0.1)
    assert found[0] < 0.6 < found[1]


def test_the_same_figures_have_the_same_interval() -> None:
    assert intervals.interval([0.1, 0.5, 0.2]) == intervals.interval([0.1, 0.5, 0.2])


@pytest.mark.parametrize("sums", [[], [0.5], [1.0, math.nan], [1.0, math.inf]])
def test_there_is_no_interval_without_two_known_prompts(sums: list[float]) -> None:
    assert intervals.interval(sums) is None
    assert intervals.with_interval(0.5, None) == {"value": 0.5, "low": None, "high": None}


def test_a_figure_that_was_not_measured_has_no_interval() -> None:
    assert intervals.with_interval(None, (0.0, 1.0)) is None
    assert intervals.of_rows({"by_row": {"tokens": [1, 2], "reverse_kl": [0.5]}}, "reverse_kl") is None
    assert intervals.of_rows({}, "reverse_kl") is None


def test_a_difference_of_runs_is_paired_by_prompt() -> None:
    chance = random.Random(2)
    hard = {f"p{i}": chance.uniform(0, 4) for i in range(40)}  # prompts differ much, runs by 0.1
    old = {prompt: (10 * value, 10.0) for prompt, value in hard.items()}
    new = {prompt: (20 * (value + 0.1 + chance.uniform(-0.02, 0.02)), 20.0) for prompt, value in hard.items()}
    found = intervals.of_difference(dict(reversed(new.items())), old)
    assert found is not None
    assert found["value"] == pytest.approx(0.1, abs=0.01)
    assert found["low"] is not None
    assert found["high"] is not None
    assert 0.08 < found["low"] < found["value"] < found["high"] < 0.12
    assert intervals.of_difference(new, {**old, "other": (1.0, 1.0)}) is None
    assert intervals.of_difference({}, {}) is None
    assert intervals.of_difference(new | {"p0": (math.nan, 1.0)}, old) is None
