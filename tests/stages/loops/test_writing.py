"""The writing thread: order of commits, errors of one sentence, bounded memory, nothing left behind."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache
from stages.loops.writing import JOBS_AHEAD, HostCopy, UnitWriter, to_numpy
from tests.support.cache_samples import fingerprint, record


class Stop(Exception):
    """Stands for whatever ends the block."""


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "unit-writer"]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[cache.Writer]:
    with cache.Writer(tmp_path, fingerprint()) as opened:
        yield opened
    assert not threads()


def write(root: Path, use: Callable[[UnitWriter], object]) -> None:
    """Opens a cache and a writing thread, and leaves both."""
    with cache.Writer(root, fingerprint()) as writer, UnitWriter(writer) as writing:
        use(writing)


def test_units_are_committed_in_order_with_the_rows_given_before(
    writer: cache.Writer, tmp_path: Path
) -> None:
    with UnitWriter(writer) as writing:
        for unit in range(4):
            for row in range(3):
                writing.append([record(10 * unit + row)])
            writing.commit(f"unit-{unit}")
    snapshot = cache.open(tmp_path)
    assert [(r.unit, len(r.row_ids)) for r in snapshot.commit_records()] == [
        (f"unit-{i}", 3) for i in range(4)
    ]
    assert snapshot.commit_records()[1].row_ids == [record(10 + row).row_id for row in range(3)]
    assert snapshot.verify() == []


def test_draining_waits_for_the_last_commit(writer: cache.Writer, tmp_path: Path) -> None:
    with UnitWriter(writer) as writing:
        writing.append(record(i) for i in range(2))
        writing.commit("unit")
        writing.drain()
        assert len(cache.open(tmp_path)) == 2


def failing() -> Iterator[cache.Record]:
    yield record(0)
    raise cache.CacheError("row 1 is broken.")


def test_an_error_is_raised_by_the_next_call_and_nothing_is_committed_after_it(tmp_path: Path) -> None:
    after: list[str] = []

    def use(writing: UnitWriter) -> None:
        writing.append(failing())
        writing._jobs.join()
        writing.commit("unit")
        after.append("the next call raised nothing")

    with pytest.raises(cache.CacheError, match="row 1 is broken"):
        write(tmp_path, use)
    assert len(cache.open(tmp_path)) == len(after) == len(threads()) == 0


def test_an_error_is_raised_at_the_end_if_no_call_follows(tmp_path: Path) -> None:
    with pytest.raises(cache.CacheError, match="row 1 is broken"):
        write(tmp_path, lambda writing: writing.append(failing()))
    assert len(cache.open(tmp_path)) == len(threads()) == 0


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_leaving_by_an_exception_gives_up_what_was_not_begun(
    tmp_path: Path, error: type[BaseException]
) -> None:
    gate = threading.Event()

    def slow() -> Iterator[cache.Record]:
        yield record(0)
        gate.wait(10)

    def use(writing: UnitWriter) -> None:
        writing.append(slow())
        writing.commit("unit")
        threading.Timer(0.2, gate.set).start()
        raise error

    def again(writing: UnitWriter) -> None:
        writing.append([record(0)])
        writing.commit("unit")

    with pytest.raises(error):
        write(tmp_path, use)
    assert len(cache.open(tmp_path)) == len(threads()) == 0
    write(tmp_path, again)
    assert len(cache.open(tmp_path)) == 1


def test_at_most_a_few_batches_wait_for_a_slow_disk(writer: cache.Writer, tmp_path: Path) -> None:
    gate, taken = threading.Event(), []

    def rows(number: int) -> Iterator[cache.Record]:
        gate.wait(10)
        taken.append(number)
        yield record(number)

    def work(writing: UnitWriter) -> None:
        for number in range(8):
            writing.append(rows(number))
            given.append(number)

    given: list[int] = []
    with UnitWriter(writer) as writing:
        worker = threading.Thread(target=work, args=(writing,))
        worker.start()
        time.sleep(0.3)
        assert len(given) <= JOBS_AHEAD + 1
        assert taken == []
        gate.set()
        worker.join()
        writing.commit("unit")
    assert taken == list(range(8))
    assert len(cache.open(tmp_path)) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_what_lands_is_what_was_sent(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4).to(dtype)
    assert np.array_equal(HostCopy({"x": tensor}).arrays()["x"], to_numpy(tensor))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_copies_land_whole_while_the_device_goes_on(dtype: torch.dtype) -> None:
    values = [torch.randn(512, 1024, device="cuda").mul(100).to(dtype) for _ in range(8)]
    expected = [to_numpy(value) for value in values]
    copies = []
    for value in values:
        busy: Any = torch.randn(2048, 2048, device="cuda")
        busy = busy @ busy
        copies.append(HostCopy({"x": value.clone(), "part": value[:, :1]}))  # the clone is freed at once
    for copy_of, wanted in zip(copies, expected, strict=True):
        found = copy_of.arrays()
        assert np.array_equal(found["x"], wanted)
        assert np.array_equal(found["part"], wanted[:, :1])
