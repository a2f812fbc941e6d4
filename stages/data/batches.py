"""Turns rows into the tensors of a forward: micro-batches, teacher objects, copies to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import cache
from dualkl import Head, Sampled
from stages.data.alignment import Aligned, align
from stages.data.signals import AnyTeacher, cat, teacher_of

MOST_KEYS = 4
"""Tokens of a forward as if no row shared its prompt, per token of its limit: copied keys take memory too."""
T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one training forward; `weights` are the constant loss weights of the scored positions.

    `tau`: gate threshold in nats, per position or a scalar; None: as configured.
    `teacher_entropy`: entropy of the teacher's full distribution, nats, from the cache.
    """

    aligned: Aligned
    teacher: AnyTeacher
    sampled: Sampled
    weights: Float[Tensor, " N"]
    tau: float | None = None
    teacher_entropy: Float[Tensor, " N"] | None = None


class _Size(NamedTuple):
    """Of a forward: rows, tokens of the longest, tokens, and tokens if no row shared its prompt."""

    rows: int = 0
    longest: int = 0
    tokens: int = 0
    keys: int = 0

    def plus(self, length: int, known: int) -> _Size:
        """With a row of `length` tokens, `known` of which are there already."""
        known = known if self.rows else 0
        return _Size(
            self.rows + 1, max(self.longest, length), self.tokens + length - known, self.keys + length
        )


def micro_batches(
    rows: Iterable[T],
    length_of: Callable[[T], int],
    max_rows: int | None,
    max_tokens: int | None,
    *,
    packed: bool = False,
    shared: Callable[[T, T], int] | None = None,
) -> Iterator[list[T]]:
    """Split rows, in order, into forwards of at most `max_rows` rows and `max_tokens` tokens.

    None means no limit. A row longer than `max_tokens` gets its own forward. Padding counts, unless rows are
    `packed`.

    `shared`, for packed rows: the tokens that a row shares with the row before it. In a forward they count
    once; `MOST_KEYS` limits the copies of their keys. Rows that share tokens stay together if one forward
    holds them.
    """

    def fits(size: _Size) -> bool:
        if max_rows is not None and size.rows > max_rows:
            return False
        tokens = size.tokens if packed else size.longest * size.rows
        return max_tokens is None or (tokens <= max_tokens and size.keys <= MOST_KEYS * max_tokens)

    batch: list[T] = []
    size = _Size()
    for group in _together(rows, length_of, shared):
        alone, after = _Size(), size
        for _, length, known in group:
            alone, after = alone.plus(length, known), after.plus(length, known)
        if batch and fits(alone) and not fits(after):
            yield batch
            batch, size = [], _Size()
        for row, length, known in group:
            if batch and not fits(size.plus(length, known)):
                yield batch
                batch, size = [], _Size()
            batch.append(row)
            size = size.plus(length, known)
    if batch:
        yield batch


def _together(
    rows: Iterable[T], length_of: Callable[[T], int], shared: Callable[[T, T], int] | None
) -> Iterator[list[tuple[T, int, int]]]:
    """Runs of rows that share tokens: each row, its length, and what it shares with the row before."""
    group: list[tuple[T, int, int]] = []
    for row in rows:
        known = shared(group[-1][0], row) if shared is not None and group else 0
        if group and not known:
            yield group
            group = []
        group.append((row, length_of(row), known))
    if group:
        yield group


def num_tokens(record: cache.Record) -> int:
    """Return the number of prompt and completion tokens."""
    return len(record.prompt_ids) + len(record.completion_ids)


def to_tensors(
    records: list[cache.Record],
    weight: float,
    head: Head | None,
    pad_id: int,
    device: torch.device,
    vocab_size: int,
    *,
    packed: bool = False,
    shared: bool = False,
) -> MicroBatch:
    """Build the tensors of one forward; `weight` applies to each scored position.

    `head`: the teacher's head, for `hidden` rows. `packed`, `shared`: as in `align`.
    """
    teacher = teacher_of(records, head, vocab_size)  # first, to reject unscored rows
    prompts, completions = [r.prompt_ids for r in records], [r.completion_ids for r in records]
    aligned = align(prompts, completions, pad_id, torch.device("cpu"), packed=packed, shared=shared)
    teacher_logprobs = cat([cast(np.ndarray, r.teacher_logprobs) for r in records])
    sampled = Sampled(aligned.targets, teacher_logprobs, cat([r.behaviour_logprobs for r in records]))
    weights = torch.full((len(aligned.targets),), weight, dtype=torch.float32)
    entropy = cat([cast(np.ndarray, r.teacher_entropy) for r in records])
    return on_device(MicroBatch(aligned, teacher, sampled, weights, teacher_entropy=entropy), device)


def pinned(batch: MicroBatch) -> MicroBatch:
    """Copy the batch to pinned memory, from which `on_device` copies asynchronously."""
    return map_tensors(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory(), batch)


def on_device(value: T, device: torch.device) -> T:
    """Copy a batch or a teacher to `device`; copies from pinned memory are asynchronous."""
    moved: T = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)
    return moved


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor of a data class, recursively."""
    if isinstance(value, Tensor):
        return function(value)
    if not is_dataclass(value):
        return value
    parts = {item.name: getattr(value, item.name) for item in fields(value)}
    mapped = {name: map_tensors(function, part) for name, part in parts.items()}
    return replace(value, **mapped)  # type: ignore[type-var]
