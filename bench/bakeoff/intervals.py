"""95 % intervals: Student's t over seeds, and the bootstrap over problems and seeds.

Shape suffixes: S seeds, P problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Quantiles of Student's t at 97.5 %, by degrees of freedom."""
RESAMPLES = 4000
NOISE = "~"


@dataclass(frozen=True)
class Interval:
    """A mean and its bounds; without bounds if one seed alone gives the mean."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def is_noise(self) -> bool:
        """Whether 0 lies inside, or nothing is known about the spread. For differences."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def text(self, digits: int = 4) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.{digits}f}"
        half = (self.high - self.low) / 2
        return f"{self.mean:.{digits}f} ± {half:.{digits}f}"

    def difference(self, digits: int = 4) -> str:
        """With its sign; `~` behind it if it is noise."""
        return f"{'+' if self.mean > 0 else ''}{self.text(digits)}{f' {NOISE}' * self.is_noise}"


def over_seeds(values: list[float]) -> Interval:
    """Student's t interval of the mean."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    half = T_95[len(values) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def bootstrap(values_SP: np.ndarray) -> Interval:
    """Percentile interval of the mean, with problems and seeds drawn again, each with replacement.

    Problems are the same for all seeds. Two or three seeds drawn again vary too little, so the interval says
    more about problems than about seeds.
    """
    random = np.random.default_rng(0)
    num_seeds, num_problems = values_SP.shape
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        seeds_S = random.integers(num_seeds, size=num_seeds)
        problems_P = random.integers(num_problems, size=num_problems)
        means[index] = values_SP[seeds_S].mean(0)[problems_P].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values_SP.mean()), float(low), float(high))
