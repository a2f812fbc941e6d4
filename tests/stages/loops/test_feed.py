"""The order of rows over epochs and batches, and reading ahead."""

import time

import pytest

from stages.data.pool import Pool
from stages.loops.feed import batch_rows, read_ahead


def pool(num_rows: int, version: int = 0) -> Pool:
    ids = [f"{i:032x}" for i in range(num_rows)]
    return Pool(ids, version, dict.fromkeys(ids, 0), dict.fromkeys(ids, (1, 1)))


def stream(of: Pool, seed: int, num_batches: int, size: int) -> list[str]:
    return [row_id for index in range(num_batches) for row_id in batch_rows(of, seed, index, size)]


def test_each_epoch_holds_every_row_once() -> None:
    rows = stream(pool(30), seed=1, num_batches=9, size=10)
    for epoch in range(3):
        assert sorted(rows[epoch * 30 : (epoch + 1) * 30]) == pool(30).row_ids


def test_epochs_follow_each_other_inside_a_batch() -> None:
    rows = stream(pool(10), seed=1, num_batches=5, size=4)
    assert sorted(rows[:10]) == sorted(rows[10:20]) == pool(10).row_ids
    assert rows[:10] != rows[10:20]


def test_a_batch_may_be_larger_than_the_pool() -> None:
    rows = batch_rows(pool(3), 0, 0, 8)
    assert len(rows) == 8
    assert sorted(rows[:3]) == sorted(rows[3:6]) == pool(3).row_ids


@pytest.mark.parametrize("size", [3, 4, 7])
def test_the_stream_does_not_depend_on_how_it_is_cut(size: int) -> None:
    assert stream(pool(10), 5, 84 // size, size) == stream(pool(10), 5, 84, 1)


def test_the_order_depends_on_seed_epoch_and_version_alone() -> None:
    assert stream(pool(20), 0, 2, 10) == stream(pool(20), 0, 2, 10)
    assert stream(pool(20), 0, 2, 10) != stream(pool(20), 1, 2, 10)
    assert stream(pool(20), 0, 2, 10) != stream(pool(20, version=1), 0, 2, 10)


def test_a_batch_can_be_asked_for_out_of_turn() -> None:
    later = batch_rows(pool(10), 0, 7, 4)
    batch_rows(pool(10), 0, 0, 4)
    assert batch_rows(pool(10), 0, 7, 4) == later


def test_rows_are_read_ahead_by_so_many_and_no_further() -> None:
    events: list[int] = []
    ahead = read_ahead(lambda item: events.append(item) or item, range(6), 2)
    assert next(ahead) == 0
    while 2 not in events:
        time.sleep(0.001)
    time.sleep(0.05)
    assert 3 not in events
    assert list(ahead) == [1, 2, 3, 4, 5]


def test_rows_are_read_ahead_by_one_and_no_further() -> None:
    events: list[str] = []

    def read(item: int) -> int:
        events.append(f"read {item}")
        return 10 * item

    ahead = read_ahead(read, range(4))
    assert next(ahead) == 0
    while "read 1" not in events:  # nobody asked for it yet
        time.sleep(0.001)
    time.sleep(0.05)
    assert "read 2" not in events
    assert list(ahead) == [10, 20, 30]
    assert events == [f"read {n}" for n in range(4)]


def test_what_goes_wrong_while_reading_ahead_is_raised_in_its_turn() -> None:
    ahead = read_ahead(lambda item: 1 // item, [2, 1, 0, 1])
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(ahead)
