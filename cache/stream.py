"""Streams all rows of a snapshot in shuffled order, read ahead by a thread, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
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
    if min(seed, epoch, start, ahead - 1) < 0 or not (0 <= rank < num_ranks and 0 <= worker < num_workers):
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
    """Yield the windows' rows; a batch is read ahead for each batch whose rows have been yielded."""
    places = (place for window in windows for place in window.places)
    thread = ThreadPoolExecutor(1, "cache-stream")
    coming: deque[Future[list[Record]]] = deque()

    def read_on(num_places: int) -> None:
        coming.extend(thread.submit(snapshot.read_place, place) for place in islice(places, num_places))

    try:
        read_on(ahead + WINDOW)
        for window, order in windows:
            rows = [record for _ in window for record in coming.popleft().result()]
            waiting = [rows[i] for i in order[::-1]]
            del rows
            used = 0
            while waiting:
                yield waiting.pop()
                done = len(window) * (len(order) - len(waiting)) // len(order)
                read_on(done - used)
                used = done
    finally:
        thread.shutdown(cancel_futures=True)
