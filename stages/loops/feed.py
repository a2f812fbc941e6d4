"""From the pool to the forwards of each optimizer step: order of rows, cuts, and reading ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import tee
from typing import TypeVar

import numpy as np
import torch

import cache
from stages.data.batches import MicroBatch, micro_batches, pinned, to_tensors
from stages.data.pool import Pool, RowGroups
from stages.data.signals import cached_head
from stages.loops.budgets import Caps
from stages.models.student import Student
from stages.runtime.run import Run
from stages.runtime.split import rows_per_micro_step

READ_AHEAD = 2  # forwards
READERS = 2  # threads that decode the rows of a forward
CPU = torch.device("cpu")
GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples modulo 1 are evenly spread
T = TypeVar("T")
R = TypeVar("R")
Inputs = tuple[list[cache.Record], MicroBatch]


@dataclass(frozen=True)
class Forward:
    """Keys of rows of one cache. An idle forward has weight 0 and only takes part in collective calls."""

    row_ids: list[str]
    is_idle: bool


@dataclass(frozen=True)
class Batch:
    """One optimizer step.

    Attributes:
        row_ids: keys of the rows of all ranks.
        total_tokens: scored tokens of all ranks.
        forwards: those of this rank; every rank has the same number.
        inputs: rows and tensors of each forward. Consume all of them before asking for the next batch.
    """

    row_ids: list[str]
    total_tokens: int
    forwards: list[Forward]
    inputs: Iterator[Inputs]


def global_batches(
    run: Run, student: Student, snapshot: cache.Snapshot, pool: Pool, indices: Iterable[int], caps: Caps
) -> Generator[Batch, None, None]:
    """Yield the pool's batches with these indices, in order; a thread reads the next forwards ahead.

    `caps` must be the same on all ranks.
    """
    device = run.world.device
    snapshots = (snapshot, *(extra.snapshot for extra in pool.extras))
    heads = {own.root: cached_head(own, device) for own in snapshots}  # freed when the generator is closed
    pad_id, vocab_size, packed = student.tokenizer.pad_token_id, student.vocab_size, student.packs
    shared = student.shares and bool(pool.leaders)

    def make(step: tuple[int, Forward], readers: ThreadPoolExecutor) -> Inputs:
        total_tokens, forward = step
        places = [pool.locate(key, snapshot) for key in forward.row_ids]
        source = places[0][0]  # a forward has rows of one cache
        records = source.take([source.position(row_id) for _, row_id in places], readers.map)
        head = heads[source.root]
        weight = 0.0 if forward.is_idle else 1.0 / total_tokens
        batch = to_tensors(records, weight, head, pad_id, CPU, vocab_size, packed=packed, shared=shared)
        if device.type == "cuda":
            with torch.cuda.device(device):  # a new thread starts on the first GPU
                batch = pinned(batch)
        return records, batch

    plans, coming = tee(_plan(run, student, pool, index, caps) for index in indices)
    inputs = _inputs(make, ((total, forward) for _, total, own in coming for forward in own))
    for row_ids, total_tokens, forwards in plans:
        yield Batch(row_ids, total_tokens, forwards, inputs)


def _inputs(
    make: Callable[[tuple[int, Forward], ThreadPoolExecutor], Inputs], forwards: Iterable[tuple[int, Forward]]
) -> Iterator[Inputs]:
    """Rows and tensors of each forward, made ahead; `make` is given threads that decode."""
    with ThreadPoolExecutor(READERS, "read-rows") as readers:
        yield from read_ahead(lambda step: make(step, readers), forwards, READ_AHEAD)


def _plan(
    run: Run, student: Student, pool: Pool, index: int, caps: Caps
) -> tuple[list[str], int, list[Forward]]:
    """All rows of global batch `index`, their scored tokens, and this rank's forwards.

    Every rank splits the rows of all ranks, so every rank knows the maximum forward count without
    communication.
    """
    world, size = run.world, run.config.train.batch_size
    row_ids = batch_rows(pool, run.config.run.seed, index, size)
    micro_rows = rows_per_micro_step(run.config, world.size)
    bounds = [rank * size // world.size for rank in range(world.size + 1)]
    cuts = [
        list(cut_forwards(pool, row_ids[bounds[rank] : bounds[rank + 1]], micro_rows, caps, student))
        for rank in range(world.size)
    ]
    own = cuts[world.rank]
    num_idle = max(map(len, cuts)) - len(own)
    forwards = [Forward(rows, False) for rows in own] + [Forward(own[0][:1], True)] * num_idle
    return row_ids, sum(pool.lengths[row_id][1] for row_id in row_ids), forwards


def batch_rows(pool: Pool, seed: int, batch_index: int, batch_size: int) -> list[str]:
    """Return the row keys of global batch `batch_index`, counted since the pool was opened.

    Each cache is an endless stream of its groups of rows, permuted each epoch with the seed (seed, epoch,
    version); the rows of a group (`Pool.leaders`) follow each other. Batch slots are assigned to caches by
    weight, deterministically.
    """
    start, end = batch_index * batch_size, (batch_index + 1) * batch_size
    owner_of_place = _owners([1.0, *(extra.weight for extra in pool.extras)], end)
    picked = [""] * batch_size
    for number, groups in enumerate(pool.groups):
        places = np.flatnonzero(owner_of_place == number)
        first = int(np.searchsorted(places, start))
        seeds = [pool.version, number] if number else [pool.version]
        stream = _stream(groups, seed, seeds, range(first, len(places)))
        for place, key in zip(places[first:].tolist(), stream, strict=True):
            picked[place - start] = key
    return picked


def _owners(weights: list[float], num_places: int) -> np.ndarray:
    """Return the cache of each batch slot; any contiguous range matches the weights within a row or two."""
    bounds = np.cumsum(weights) / sum(weights)
    return np.searchsorted(bounds[:-1], np.arange(num_places) * GOLDEN_RATIO % 1, side="right")


def _stream(groups: RowGroups, seed: int, seeds: list[int], places: range) -> Iterator[str]:
    keys, sizes = groups.keys, groups.sizes
    for place in places:
        epoch, offset = divmod(place, len(keys))
        if place == places.start or offset == 0:
            permuted = np.random.default_rng([seed, epoch, *seeds]).permutation(len(sizes))
            shifts = groups.firsts[permuted] - (np.cumsum(sizes[permuted]) - sizes[permuted])
            order = np.arange(len(keys)) + np.repeat(shifts, sizes[permuted])
        yield keys[order[offset]]


def cut_forwards(
    pool: Pool, row_ids: list[str], micro_rows: int, caps: Caps, student: Student
) -> Iterator[list[str]]:
    """Split a rank's rows of a step by `grad_accum`, then by cache, then by the caps of a forward."""
    shared = pool.num_shared if student.shares else None
    for start in range(0, len(row_ids), micro_rows):
        for of_one_cache in by_cache(row_ids[start : start + micro_rows]):
            yield from micro_batches(
                of_one_cache,
                lambda row_id: sum(pool.lengths[row_id]),
                caps.rows,
                caps.tokens,
                packed=student.packs,
                shared=shared,
            )


def by_cache(keys: Iterable[str]) -> list[list[str]]:
    """Group keys by cache, the main cache first, keeping the order within each group."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.rpartition(":")[0], []).append(key)
    return [groups[number] for number in sorted(groups)]


def read_ahead(read: Callable[[T], R], items: Iterable[T], depth: int = 1) -> Iterator[R]:
    """Yield `read(item)` in order; a thread reads up to `depth` items ahead."""
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(thread.submit(read, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
