"""Two GPUs of one host: both stages under torchrun and NCCL, a ZeRO-3 teacher sharded over them, are those of
one GPU.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import cache
from tests.support.helpers import records_of, run_python, small, torchrun
from tests.support.tiny_runs import TINY

MINUTE = 60.0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(600),
]


def arguments(folder: Path, device: str = "cuda", compile: str = "false") -> list[str]:
    return ["-m", "stages.pipeline", *small(folder, device=device, teacher_ds_zero3="true", compile=compile)]


@pytest.fixture(scope="module")
def one_card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_python(*arguments(folder)).expect_success()
    return folder / "demo"


@pytest.fixture(scope="module")
def two_cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torchrun(*arguments(folder)).expect_success()
    return folder / "demo"


def assert_trained_alike(one: Path, two: Path) -> None:
    """To the refresh: its rows carry the hash of weights whose last bits differ, so that another draw
    follows.
    """
    left, right = (records_of(folder, "step") for folder in (one, two))
    assert [step["step"] for step in left] == [step["step"] for step in right] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in right[:2]] == pytest.approx(
            [step[name] for step in left[:2]], rel=0.02
        )


def test_two_cards_write_and_score_the_rows_of_one(one_card: Path, two_cards: Path) -> None:
    """A GPU's rounding depends on the other rows of a batch, so a few sampled tokens may differ."""
    folders = (one_card, two_cards)
    one, two = ({r.row_id: r for r in cache.open(f / "cache")[:] if r.refresh_index == 0} for f in folders)
    assert one.keys() == two.keys()
    same = [
        key for key, record in one.items() if np.array_equal(record.completion_ids, two[key].completion_ids)
    ]
    assert len(same) >= 0.9 * len(one)
    for key in same:
        for name in ("teacher_logprobs", "behaviour_logprobs"):
            np.testing.assert_allclose(
                getattr(one[key], name), getattr(two[key], name), atol=2e-3, err_msg=name
            )


def test_two_cards_train_as_one_does(one_card: Path, two_cards: Path) -> None:
    assert_trained_alike(one_card, two_cards)


def test_compiled_layers_train_on_two_cards_as_uncompiled_ones_do(two_cards: Path, tmp_path: Path) -> None:
    torchrun(*arguments(tmp_path, compile="auto"), timeout=6 * MINUTE).expect_success()
    assert_trained_alike(two_cards, tmp_path / "demo")


def test_a_card_that_ends_stops_the_other(tmp_path: Path) -> None:
    flags = small(tmp_path, **(TINY | {"device": "cuda", "max_steps": 4, "refresh_every": 0}))
    run_python("-m", "stages.rollout", *flags).expect_success()
    done = torchrun("tests/support/dying_rank.py", "hangs", *flags, timeout=3 * MINUTE)
    assert done.code != 0
    assert "rank 1 cannot go on" in done.err
