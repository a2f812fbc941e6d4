"""The processes of a command: alone, and several that reduce and gather."""

import pytest

from stages.runtime import distributed
from stages.runtime.errors import UserError
from tests.support.helpers import Forker


def test_alone_reductions_give_what_they_are_given() -> None:
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.sum([1.0, 2.0]) == world.max([1.0, 2.0]) == [1.0, 2.0]
    assert world.gather("a") == ["a"]
    world.barrier()


def reduce() -> None:
    """In one of three processes: what the reductions give."""
    world = distributed.start("cpu")
    rank = world.rank
    world.barrier()
    distributed.say_once("from the main process")
    print((world.sum([rank, 1.0]), world.max([rank, -rank]), world.gather({"rank": rank})))


def test_several_processes_reduce_in_float64_and_gather_in_order(forked: Forker) -> None:
    out = forked.call(reduce, processes=3).expect_success().out
    gathered = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert out.count(str(([3.0, 3.0], [2.0, 0.0], gathered))) == 3
    assert out.count("from the main process") == 1


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU here; use --device cpu or auto"):
        distributed.start("cuda")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed for the student needs GPUs"):
        distributed.start("cpu")


def test_a_line_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(distributed, "_said", set())
    for line in ("first", "second", "first"):
        distributed.say_once(line)
    assert capsys.readouterr().out == "first\nsecond\n"
