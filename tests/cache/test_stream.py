"""The stream: one order a (seed, epoch), each row once over all shares, resumable, bounded, and no thread
left behind.
"""

import gc
import threading
import time
import weakref
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import cache
from cache.stream import WINDOW
from tests.support.cache_samples import assert_same, fingerprint, record, row_id, write

NUM_ROWS = 60


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """60 rows in three units, at least two and at most six rows a record batch."""
    monkeypatch.setattr("cache.shard.TOKENS_PER_BATCH", 7)
    for unit in range(3):
        write(tmp_path, range(20 * unit, 20 * unit + 20), unit=f"g{unit}")
    return cache.open(tmp_path)


def ids(snapshot, **options):
    return [row.row_id for row in cache.stream(snapshot, **{"seed": 1, "epoch": 0, **options})]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("cache-stream")]


def test_the_places_hold_each_row_once(snapshot):
    places = snapshot.places()
    found = [place.shard.row_ids for place in places]
    assert len(places) == sum(len(shard.batches) for shard in snapshot.commit_records()) > 2 * WINDOW
    rows = [[row.row_id for row in snapshot.read_place(place)] for place in places]
    assert sorted(chain.from_iterable(rows)) == snapshot.row_ids
    assert [min(batch) for batch in rows] == sorted(min(batch) for batch in rows)
    assert all(set(batch) <= set(shard) for batch, shard in zip(rows, found, strict=True))


def test_an_epoch_is_every_row_once_decoded_and_shuffled(snapshot):
    rows = {row.row_id: row for row in cache.stream(snapshot, seed=1, epoch=0)}
    assert sorted(rows) == snapshot.row_ids
    for number in range(NUM_ROWS):
        assert_same(rows[row_id(number)], record(number))
    assert list(rows) != snapshot.row_ids
    assert list(rows) != [row.row_id for place in snapshot.places() for row in snapshot.read_place(place)]


def test_seed_and_epoch_alone_decide_the_order(snapshot, tmp_path_factory):
    order = ids(snapshot)
    assert ids(cache.open(snapshot.root), ahead=9) == order
    assert ids(snapshot, epoch=1) != order
    assert ids(snapshot, seed=2) != order
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for unit in (2, 0, 1):
        write(elsewhere, range(20 * unit, 20 * unit + 20), unit=f"other-{9 - unit}")
    assert ids(cache.open(elsewhere)) == order, "names of units do not matter"


def test_a_row_in_two_units_is_read_once(snapshot, monkeypatch):
    with cache.Writer(snapshot.root, fingerprint()) as writer:
        monkeypatch.setattr(
            writer, "_committed", set()
        )  # as of a writer with another plan, at the same moment
        monkeypatch.setattr(writer, "_refresh", lambda: None)
        for number in range(15, 25):
            writer.append(record(number))
        writer.commit("another-plan")
    newer = snapshot.refresh()
    assert newer.summary()["duplicate_rows"] == 10
    assert sorted(ids(newer)) == snapshot.row_ids


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 3), (4, 1), (3, 2), (7, 11)])
def test_shares_hold_each_row_once_and_are_equal_within_a_row(snapshot, num_ranks, num_workers):
    shares = [
        ids(snapshot, rank=rank, num_ranks=num_ranks, worker=worker, num_workers=num_workers)
        for rank in range(num_ranks)
        for worker in range(num_workers)
    ]
    assert sorted(chain.from_iterable(shares)) == snapshot.row_ids
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    n = len(shares)
    assert sizes == [NUM_ROWS * (i + 1) // n - NUM_ROWS * i // n for i in range(n)]


@pytest.mark.parametrize("share", [{}, {"rank": 1, "num_ranks": 2, "worker": 0, "num_workers": 2}])
def test_a_resumed_stream_is_the_tail_of_the_whole_one(snapshot, share):
    whole = ids(snapshot, **share)
    for start in range(len(whole) + 1):
        assert ids(snapshot, start=start, **share) == whole[start:]


def test_batches_before_the_resumed_window_are_not_read(snapshot, monkeypatch):
    import cache.reader as reader

    read, seen = reader.read_batch, []
    monkeypatch.setattr(reader, "read_batch", lambda *a, **k: (seen.append(a[2]), read(*a, **k))[1])
    ids(snapshot)
    assert len(seen) == len(snapshot.places()), "an epoch reads each batch once"
    seen.clear()
    ids(snapshot, start=NUM_ROWS - 1)
    assert 1 <= len(seen) <= WINDOW


def test_damage_reaches_the_consumer(snapshot):
    shard = snapshot.commit_records()[1]
    path, entry = Path(snapshot.root) / shard.shard, shard.batches[2]
    data = bytearray(path.read_bytes())
    data[entry.offset + entry.num_bytes // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(cache.CacheError, match=r"sha256 of record batch 2 .* Delete it and commits/g1-"):
        ids(snapshot)
    assert threads() == []


def test_closing_or_dropping_a_stream_ends_its_thread(snapshot):
    rows = cache.stream(snapshot, seed=1, epoch=0)
    assert threads() == []
    next(rows)
    assert len(threads()) == 1
    rows.close()
    assert threads() == []
    rows = cache.stream(snapshot, seed=1, epoch=0)
    next(rows)
    del rows
    gc.collect()
    assert threads() == []


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_than_window_and_ahead_batches_are_in_memory(tmp_path, monkeypatch, ahead):
    monkeypatch.setattr("cache.shard.TOKENS_PER_BATCH", 6)
    with cache.Writer(tmp_path, fingerprint()) as writer:
        for number in range(90):
            writer.append(record(number, num_tokens=2))  # three rows a batch
        writer.commit("g0")
    snapshot, alive, peak = cache.open(tmp_path), weakref.WeakSet[cache.Record](), 0
    read = snapshot.read_place

    def counted(place):
        nonlocal peak
        rows = read(place)
        alive.update(rows)
        peak = max(peak, len(alive))
        return rows

    monkeypatch.setattr(snapshot, "read_place", counted)
    for number, _row in enumerate(cache.stream(snapshot, seed=1, epoch=0, ahead=ahead)):
        if number % 5 == 0:
            time.sleep(0.01)  # a slow consumer: the thread reads all that it may
    del _row
    assert number == 89
    assert 3 * WINDOW < peak <= 3 * (WINDOW + ahead) + 1, "the row that the consumer holds"
    assert len(snapshot._batches._kept) == 0


def test_an_empty_cache_streams_nothing(tmp_path):
    cache.Writer(tmp_path, fingerprint())
    assert ids(cache.open(tmp_path)) == []


@pytest.mark.parametrize(
    "options", [{"rank": 1}, {"worker": 2, "num_workers": 2}, {"start": -1}, {"ahead": 0}, {"epoch": -1}]
)
def test_arguments_out_of_range_are_refused_at_once(snapshot, options):
    with pytest.raises(cache.CacheError, match="expected counts from 0"):
        cache.stream(snapshot, **{"seed": 1, "epoch": 0, **options})
    with pytest.raises(cache.CacheError, match="start is 31; rank 1, worker 0 has 30 rows"):
        cache.stream(snapshot, seed=1, epoch=0, rank=1, num_ranks=2, start=31)


def test_the_order_mixes_distant_rows(snapshot):
    position = {row_id(number): number for number in range(NUM_ROWS)}
    order = np.array([position[name] for name in ids(snapshot)])
    assert abs(np.corrcoef(order, np.arange(NUM_ROWS))[0, 1]) < 0.6
