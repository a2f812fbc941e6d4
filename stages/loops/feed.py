"""What stage two trains on, step by step: the forwards of each batch, read, decoded and made tensors ahead of their turn."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import tee

import torch

import cache
from dualkl import Head
from stages.data.batches import (
    MicroBatch,
    Pool,
    batch_rows,
    by_cache,
    dual_kl_head,
    micro_batches,
    pinned_tensors,
    read_ahead,
    to_tensors,
)
from stages.loops.budgets import Caps
from stages.models.student import Student
from stages.runtime.run import Run
from stages.runtime.split import rows_per_micro_step

READ_AHEAD = 2  # forwards


@dataclass(frozen=True)
class Forward:
    """Rows of one cache, by their keys in the pool; an idle forward has weight 0 and only joins the others' collectives."""

    row_ids: list[str]
    is_idle: bool


@dataclass(frozen=True)
class Batch:
    """One optimizer step.

    Attributes:
        row_ids: of all ranks, as keys of the pool.
        total_tokens: scored, of all ranks.
        forwards: this rank's; every rank has equally many.
        inputs: the rows and host tensors of `forwards`; whoever takes a batch takes all of them before the next batch.
    """

    row_ids: list[str]
    total_tokens: int
    forwards: list[Forward]
    inputs: Iterator[tuple[list[cache.Record], MicroBatch]]


def global_batches(
    run: Run, student: Student, snapshot: cache.Snapshot, pool: Pool, indices: Iterable[int], caps: Caps
) -> Generator[Batch, None, None]:
    """The pool's batches of these numbers, in order; a thread makes the next forwards' tensors meanwhile.

    `caps` of a forward must be the same on all ranks.
    """
    device = run.world.device
    heads = {
        own.root: teacher_head_of(own, device)
        for own in (snapshot, *(extra.snapshot for extra in pool.extras))
    }
    pad_id, vocab_size, packed = student.tokenizer.pad_token_id, student.vocab_size, student.packs

    def make(step: tuple[int, Forward]) -> tuple[list[cache.Record], MicroBatch]:
        total_tokens, forward = step
        places = [pool.locate(key, snapshot) for key in forward.row_ids]
        records = [source[source.position(row_id)] for source, row_id in places]
        head = heads[places[0][0].root]
        weight = 0.0 if forward.is_idle else 1.0 / total_tokens
        if device.type == "cuda":
            with torch.cuda.device(device):  # a thread begins on the first card
                return records, pinned_tensors(records, weight, head, pad_id, vocab_size, packed=packed)
        return records, to_tensors(records, weight, head, pad_id, device, vocab_size, packed=packed)

    plans, coming = tee(_plan(run, pool, index, packed, caps) for index in indices)
    inputs = read_ahead(make, ((total, forward) for _, total, own in coming for forward in own), READ_AHEAD)
    for row_ids, total_tokens, forwards in plans:
        yield Batch(row_ids, total_tokens, forwards, inputs)


def _plan(run: Run, pool: Pool, index: int, packed: bool, caps: Caps) -> tuple[list[str], int, list[Forward]]:
    """All rows of global batch `index`, their scored tokens, and this rank's forwards.

    Every rank cuts the rows of all ranks, so that all know without asking how many forwards the longest has.
    """
    world, size = run.world, run.config.train.batch_size
    row_ids = batch_rows(pool, run.config.run.seed, index, size)
    micro_rows = rows_per_micro_step(run.config, world.size)
    bounds = [rank * size // world.size for rank in range(world.size + 1)]
    cuts = [
        list(cut_forwards(pool, row_ids[bounds[rank] : bounds[rank + 1]], micro_rows, caps, packed))
        for rank in range(world.size)
    ]
    own = cuts[world.rank]
    num_idle = max(map(len, cuts)) - len(own)
    forwards = [Forward(rows, False) for rows in own] + [Forward(own[0][:1], True)] * num_idle
    return row_ids, sum(pool.lengths[row_id][1] for row_id in row_ids), forwards


def cut_forwards(
    pool: Pool, row_ids: list[str], micro_rows: int, caps: Caps, packed: bool
) -> Iterator[list[str]]:
    """A rank's rows of a step, cut by `grad_accum`, then by cache, then by the caps on rows and tokens of a forward."""
    for start in range(0, len(row_ids), micro_rows):
        for of_one_cache in by_cache(row_ids[start : start + micro_rows]):
            yield from micro_batches(
                of_one_cache, lambda row_id: sum(pool.lengths[row_id]), caps.rows, caps.tokens, packed=packed
            )


_heads: dict[tuple[str, torch.device], Head | None] = {}


def teacher_head_of(snapshot: cache.Snapshot, device: torch.device) -> Head | None:
    """The head of a `hidden` cache, read once a process (it never changes: its hash is in the fingerprint), else None."""
    if snapshot.fingerprint.must_match["signal"]["kind"] != "hidden":
        return None
    key = (snapshot.root, device)
    if key not in _heads:
        _heads[key] = dual_kl_head(snapshot.head(), device)
    return _heads[key]
