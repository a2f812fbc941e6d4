"""The order of rows over epochs and batches, and reading ahead."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from stages.data.pool import Pool
from stages.loops.budgets import Caps
from stages.loops.feed import batch_rows, cut_forwards, read_ahead


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


def grouped(num_groups: int, size: int) -> Pool:
    """Groups of `size` rows whose ids are not next to each other."""
    plain = pool(num_groups * size)
    leaders = {row_id: plain.row_ids[place % num_groups] for place, row_id in enumerate(plain.row_ids)}
    return replace(plain, leaders=leaders)


def test_rows_of_a_group_follow_each_other_and_each_is_there_once_an_epoch() -> None:
    of = grouped(6, 4)
    rows = stream(of, seed=2, num_batches=6, size=8)
    for epoch in range(2):
        own = rows[epoch * 24 : (epoch + 1) * 24]
        assert sorted(own) == of.row_ids
        leaders = [of.leaders[row_id] for row_id in own]
        assert [leaders[i : i + 4] for i in range(0, 24, 4)] == [[leader] * 4 for leader in leaders[::4]]
    assert rows[:24] != rows[24:]
    assert rows == stream(of, seed=2, num_batches=48, size=1)


def test_groups_of_one_row_are_in_the_order_of_single_rows() -> None:
    assert stream(grouped(12, 1), 3, 4, 6) == stream(pool(12), 3, 4, 6)


def test_a_forward_counts_the_prompt_of_a_group_once() -> None:
    of = grouped(2, 3)
    of = replace(of, lengths=dict.fromkeys(of.row_ids, (10, 5)))
    rows = sorted(of.row_ids, key=of.leaders.__getitem__)
    shares, alone = SimpleNamespace(packs=True, shares=True), SimpleNamespace(packs=True, shares=False)
    caps = Caps(None, 30)
    assert [len(forward) for forward in cut_forwards(of, rows, 6, caps, shares)] == [3, 3]
    assert [len(forward) for forward in cut_forwards(of, rows, 6, caps, alone)] == [2, 2, 2]


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
