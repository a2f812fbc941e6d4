"""What is said about prompts that repeat, leak, or are few."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.data.prompts import Prompt
from stages.data.remarks import about_prompts
from tests.support.helpers import make_config


def prompts(*names: str) -> list[Prompt]:
    return [Prompt(name, np.arange(3), name, {"prompt": name}) for name in names]


MANY = [str(number) for number in range(100)]


@pytest.mark.parametrize(
    ("train", "heldout", "values", "said"),
    [
        (prompts(*MANY), prompts(*(f"h{n}" for n in MANY)), {}, []),
        (prompts(*MANY, "1", "2"), [], {}, ["2 of 102 prompts (2.0%) repeat another one"]),
        (prompts(*MANY) * 2, [], {}, []),
        (
            prompts(*MANY),
            prompts("1", "x"),
            {"answer_checker": ""},
            ["warning: 1 of 2 held-out prompts are also"],
        ),
        (prompts(*MANY), prompts(*"abcd"), {}, ["4 held-out prompts are few", "of up to 25 points"]),
        (prompts(*MANY), prompts("a"), {}, ["1 held-out prompt is few"]),
        (
            prompts("a", "b"),
            [],
            {"rollouts_per_refresh": 32, "group_size": 4},
            ["2 prompts for the 8", "4.0 times"],
        ),
    ],
    ids=["nothing", "repeats", "mixed in twice", "leaks", "few", "one", "reused"],
)
def test_remarks(
    tmp_path: Path, train: list[Prompt], heldout: list[Prompt], values: dict[str, Any], said: list[str]
) -> None:
    found = list(about_prompts(make_config(tmp_path, **values), train, heldout))
    assert len(found) == bool(said), found
    for part in said:
        assert part in found[0]
