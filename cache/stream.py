"""Streams all rows of a snapshot in shuffled order, read ahead by a thread, with bounded memory."""

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
    """Places that are read together, and the shuffled order of their rows, numbered consecutively."""

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
    """Yield one epoch's rows for one worker of one rank, decoded and verified as by `snapshot[i]`.

    Order: record batches are permuted, then the rows within each window of `WINDOW` batches. The order
    depends on the arguments, the row ids, and which rows share a record batch, not on names or timing. Rows
    of distant batches do not mix within an epoch.

    Sharding: the permuted rows are split into num_ranks * num_workers contiguous shares whose sizes differ by
    at most one row. Together they contain each row once. Share i of n has N * (i + 1) // n - N * i // n rows,
    with i = rank * num_workers + worker. A batch is read once, or twice if a split runs through it.

    Memory: decoded rows of `ahead` + `WINDOW` record batches (each at most 8,192 tokens or 4 MiB of packed
    signal, plus a row), whatever the cache's size. The reader thread starts with the first row and ends when
    the generator is exhausted, closed, or raises.

    Args:
        snapshot: rows to read; later commits are not seen.
        seed, epoch: determine the order.
        start: number of rows of this share to skip; the rest keeps its order.
        ahead: record batches that may be decoded beyond the window, at least 1.

    Raises CacheError immediately for arguments out of range, and for a damaged batch when its window is
    reached.
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
            f"rank {rank} of {num_ranks}, worker {worker} of {num_workers}, seed {seed}, epoch {epoch},"
            f" start {start}, ahead {ahead}: expected counts from 0, ahead from 1, rank and worker below"
            " their numbers."
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
    """Return rows `first` to `end` of the concatenated rows of `places`."""
    found, position = [], 0
    for place in places:
        rows = place.rows[max(first - position, 0) : max(end - position, 0)]
        if len(rows):
            found.append(Place(place.shard, place.batch, rows))
        position += len(place.rows)
    return found


def _windows(places: list[Place], seeds: list[int], start: int) -> list[_Window]:
    """Return the windows of a share, each shuffled by its own seed, without the first `start` rows."""
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
                reader.free(done - used)  # the rows of that many batches have been yielded
                used = done
    finally:
        reader.close()


class _ReadAhead:
    """Decodes places in order in a thread, holding at most `num_places` that were not freed."""

    def __init__(self, snapshot: Snapshot, places: list[Place], num_places: int) -> None:
        self._snapshot = snapshot
        self._places = places
        self._room = threading.Semaphore(num_places)
        self._ready: SimpleQueue[list[Record] | BaseException] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="cache-stream", daemon=True)
        self._thread.start()

    def take(self) -> list[Record]:
        """Return the next place's rows; reraises the thread's error."""
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
        except BaseException as error:  # raised again by the consumer
            self._ready.put(error)
