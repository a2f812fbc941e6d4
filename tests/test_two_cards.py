"""Two GPUs of one host: both stages under torchrun and NCCL, a ZeRO-3 teacher sharded over them, are those of one GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

import cache
from tests.helpers import records_of, run_python, small, torchrun
from tests.tiny_runs import TINY

MINUTE = 60.0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(600),
]


def arguments(folder: Path, device: str = "cuda") -> list[str]:
    return ["-m", "stages.pipeline", *small(folder, device=device, teacher_ds_zero3="true", compile="false")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> the run's folder."""
    folders = {count: tmp_path_factory.mktemp(f"on-{count}") for count in (1, 2)}
    run_python(*arguments(folders[1])).expect_success()
    torchrun(*arguments(folders[2])).expect_success()
    return {count: folder / "demo" for count, folder in folders.items()}


def test_two_cards_write_and_score_the_rows_of_one(runs: dict[int, Path]) -> None:
    """A card's rounding depends on the rows beside a row, so that a sampled token may differ here and there."""
    one, two = ({r.row_id: r for r in cache.open(runs[count] / "cache")[:] if r.refresh_index == 0} for count in (1, 2))
    assert one.keys() == two.keys()
    same = [key for key, record in one.items() if np.array_equal(record.completion_ids, two[key].completion_ids)]
    assert len(same) >= 0.9 * len(one)
    for key in same:
        for name in ("teacher_logprobs", "behaviour_logprobs"):
            np.testing.assert_allclose(getattr(one[key], name), getattr(two[key], name), atol=2e-3, err_msg=name)


def test_two_cards_train_as_one_does(runs: dict[int, Path]) -> None:
    """To the refresh: its rows carry the hash of weights whose last bits differ, so that another draw follows."""
    one, two = (records_of(runs[count], "step") for count in (1, 2))
    assert [step["step"] for step in one] == [step["step"] for step in two] == [1, 2, 3, 4]
    for left, right in zip(one[:2], two[:2], strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=0.02)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=0.02)


def test_a_card_that_ends_stops_the_other(tmp_path: Path) -> None:
    flags = small(tmp_path, **(TINY | {"device": "cuda", "max_steps": 4, "refresh_every": 0}))
    run_python("-m", "stages.rollout", *flags).expect_success()
    done = torchrun("tests/dying_rank.py", "hangs", *flags, timeout=3 * MINUTE)
    assert done.code != 0
    assert "rank 1 cannot go on" in done.err
