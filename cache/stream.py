"""All rows of a snapshot in a shuffled order, read ahead by a thread, within the memory of a few record batches."""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cache.reader import Place, Snapshot
from cache.schema import CacheError, Record

WINDOW = 4  # record batches whose rows are shuffled together


class _Window(NamedTuple):
    """Places read together, and the order of their rows, numbered place after place."""

    places: list[Place]
    order: npt.NDArray[np.int64]


def stream(
    snapshot: Snapshot,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    num_ranks: int = 1,
    worker: int = 0,
    num_workers: int = 1,
    start: int = 0,
    ahead: int = 2,
) -> Generator[Record, None, None]:
    """One epoch's rows of one worker of one rank, decoded and checked as `snapshot[i]` does.

    Order: record batches are permuted, then the rows within each window of `WINDOW` batches. It depends on the
    arguments, the row ids, and which rows share a record batch, not on names or timing; rows of distant batches do not
    mix within an epoch.

    Sharding: the permuted rows are cut into num_ranks * num_workers contiguous shares, whose sizes differ by at most
    one row; together they hold each row once. Share i of n has N * (i + 1) // n - N * i // n rows, with
    i = rank * num_workers + worker. A batch is read once, or by both sides of a cut that runs through it.

    Memory: decoded rows worth `ahead` + `WINDOW` record batches (one is at most 8,192 tokens or 4 MiB of packed
    signal, plus a row), whatever the cache's size. A thread reads and decodes; it starts with the first row and ends
    when the generator is exhausted, closed, or raises.

    Args:
        snapshot: rows to read; what later commits add is not seen.
        seed, epoch: of the order.
        start: rows of this share that were yielded before; the rest follows in the same order.
        ahead: record batches that may be decoded beyond the window, at least 1.

    Raises CacheError for arguments out of range at once, and for a damaged batch when its window is reached.
    """
    counts = {
        "seed": seed,
        "epoch": epoch,
        "rank": rank,
        "worker": worker,
        "start": start,
        "ahead": ahead - 1,
    }
    wrong = [name for name, value in counts.items() if value < 0]
    if wrong or rank >= num_ranks or worker >= num_workers:
        raise CacheError(
            f"rank {rank} of {num_ranks}, worker {worker} of {num_workers}, seed {seed}, epoch {epoch}, start {start},"
            f" ahead {ahead}: expected counts from 0, ahead from 1, rank and worker below their numbers."
        )
    share, num_shares = rank * num_workers + worker, num_ranks * num_workers
    first, end = len(snapshot) * share // num_shares, len(snapshot) * (share + 1) // num_shares
    if start > end - first:
        raise CacheError(
            f"start is {start}; rank {rank}, worker {worker} has {end - first} rows in an epoch."
        )
    places = snapshot.places()
    permuted = [places[i] for i in np.random.default_rng([seed, epoch]).permutation(len(places))]
    windows = _windows(_cut(permuted, first, end), [seed, epoch, num_shares, share], start)
    return _rows(snapshot, windows, ahead)


def _cut(places: list[Place], first: int, end: int) -> list[Place]:
    """Rows `first` to `end` of all rows of `places`, one place after the other."""
    found, position = [], 0
    for place in places:
        rows = place.rows[max(first - position, 0) : max(end - position, 0)]
        if len(rows):
            found.append(Place(place.shard, place.batch, rows))
        position += len(place.rows)
    return found


def _windows(places: list[Place], seeds: list[int], start: int) -> list[_Window]:
    """The windows of a share, each shuffled by its own number, without the first `start` rows."""
    found = []
    for number in range(0, len(places), WINDOW):
        window = places[number : number + WINDOW]
        num_rows = sum(len(place.rows) for place in window)
        if start < num_rows:
            order = np.random.default_rng([*seeds, number]).permutation(num_rows)
            found.append(_Window(window, order[start:]))
        start = max(start - num_rows, 0)
    return found


def _rows(snapshot: Snapshot, windows: list[_Window], ahead: int) -> Generator[Record, None, None]:
    reader = _ReadAhead(snapshot, [place for window in windows for place in window.places], ahead + WINDOW)
    try:
        for places, order in windows:
            rows = [record for _ in places for record in reader.take()]
            waiting = [rows[i] for i in order[::-1]]
            del rows
            used = 0
            while waiting:
                yield waiting.pop()
                done = len(places) * (len(order) - len(waiting)) // len(order)
                reader.free(done - used)  # the rows of that many batches are gone
                used = done
    finally:
        reader.close()


class _ReadAhead:
    """Decodes places in a thread, in order, at most `num_places` that were not freed at a time."""

    def __init__(self, snapshot: Snapshot, places: list[Place], num_places: int) -> None:
        self._snapshot = snapshot
        self._places = places
        self._room = threading.Semaphore(num_places)
        self._ready: SimpleQueue[list[Record] | BaseException] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="cache-stream", daemon=True)
        self._thread.start()

    def take(self) -> list[Record]:
        """The next place's rows; raises what went wrong in the thread."""
        rows = self._ready.get()
        if isinstance(rows, BaseException):
            raise rows
        return rows

    def free(self, num_places: int) -> None:
        for _ in range(num_places):
            self._room.release()

    def close(self) -> None:
        self._closed = True
        self._room.release()
        self._thread.join()

    def _read(self) -> None:
        try:
            for place in self._places:
                self._room.acquire()
                if self._closed:
                    return
                self._ready.put(self._snapshot.read_place(place))
        except BaseException as error:  # the consumer raises it
            self._ready.put(error)
