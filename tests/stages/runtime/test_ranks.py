"""A rank that dies stops the others, with a message, within a minute; ranks that are done end without one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages import train as stage_two
from stages.loops import steps
from stages.runtime import distributed
from stages.runtime.errors import UserError, command
from tests.support.helpers import Forker, small, torchrun
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY

MINUTE = 60.0


def flags(folder: Path, cache_dir: str) -> list[str]:
    return small(folder, **(TINY | {"cache_dir": cache_dir, "refresh_every": 0, "checkpoint_every": 100}))


@pytest.mark.parametrize(
    ("how", "message"),
    leading(0, [("killed", "SIGKILL"), ("refuses", "rank 1 cannot go on"), ("hangs", "rank 1 cannot go on")]),
)
def test_under_torchrun_no_rank_outlives_one_that_ends(
    tmp_path: Path, caches: Callable[..., str], how: str, message: str
) -> None:
    arguments = flags(tmp_path, caches())
    started = time.monotonic()
    done = torchrun("tests/support/dying_rank.py", how, *arguments, timeout=3 * MINUTE)
    assert time.monotonic() - started < MINUTE
    assert done.code != 0
    assert message in done.err


def end_after_a_reduction() -> None:
    """In a process of its own: a command, and no process group after it."""
    command(lambda: print(distributed.start("cpu").sum([1.0])))
    assert not torch.distributed.is_initialized()


def test_a_command_that_is_done_leaves_no_process_group_to_the_interpreters_exit(forked: Forker) -> None:
    """gloo's threads abort one process in a few otherwise, and the launcher calls the run failed."""
    done = forked.call(end_after_a_reduction, processes=2)
    assert done.expect_success().out.count("[2.0]") == 2


def refuse_on_one_rank(arguments: list[str]) -> None:
    """In a process of its own: stage two, in which rank 1 refuses its second step."""
    step = steps.train_step

    def refusing(run: object, training: steps.Training, *rest: object) -> dict[str, Any]:
        if training.step == 1 and run.world.rank == 1:
            raise UserError("rank 1 cannot go on.")
        return step(run, training, *rest)

    steps.train_step = refusing  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train", *arguments])
        command(stage_two.main)


def test_with_no_launcher_a_rank_in_a_collective_ends_with_its_neighbour(
    tmp_path: Path, forked: Forker, caches: Callable[..., str]
) -> None:
    arguments = flags(tmp_path, caches())
    started = time.monotonic()
    done = forked.call(refuse_on_one_rank, arguments, processes=2)
    assert time.monotonic() - started < MINUTE
    assert done.code != 0
    assert "error: rank 1 cannot go on." in done.err
