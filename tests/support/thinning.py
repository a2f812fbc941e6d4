"""Cases that only `make check` runs: `make test` leaves out tests marked `thorough`."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def leading(count: int, cases: Iterable[Any]) -> list[Any]:
    """All cases, those after the first `count` marked `thorough`."""
    return [case if i < count else _thorough(case) for i, case in enumerate(cases)]


def thinned(every: int, *axes: Iterable[Any]) -> list[Any]:
    """The product of the axes, each combination a tuple; all but every n-th are marked `thorough`.

    Where `every` shares no factor with the axes' lengths, the n-th combinations hold each value of each axis.
    """
    parts = [[value if isinstance(value, tuple) else (value,) for value in axis] for axis in axes]
    cases = [sum(combination, ()) for combination in product(*parts)]
    return [case if i % every == 0 else _thorough(case) for i, case in enumerate(cases)]


def _thorough(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.thorough)
