"""The cases of a large grid that `make test` runs; `make check` runs all of them."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def thinned(every: int, *axes: Iterable[Any]) -> list[Any]:
    """The product of the axes, each combination a tuple; all but every n-th are marked `thorough`.

    Where `every` shares no factor with the axes' lengths, the n-th combinations hold each value of each axis.
    """
    cases = [
        sum((value if isinstance(value, tuple) else (value,) for value in case), ())
        for case in product(*axes)
    ]
    return [
        case if i % every == 0 else pytest.param(*case, marks=pytest.mark.thorough)
        for i, case in enumerate(cases)
    ]
