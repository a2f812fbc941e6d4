"""Turns rows into the tensors of a forward: micro-batches, teacher objects, copies to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import cache
from dualkl import Head, Sampled
from stages.data.alignment import Aligned, align
from stages.data.signals import AnyTeacher, cat, teacher_of

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


def micro_batches(
    rows: Iterable[T],
    length_of: Callable[[T], int],
    max_rows: int | None,
    max_tokens: int | None,
    *,
    packed: bool = False,
) -> Iterator[list[T]]:
    """Split rows, in order, into forwards of at most `max_rows` rows and `max_tokens` tokens.

    None means no limit. A row longer than `max_tokens` gets its own forward. Padding counts, unless rows are
    `packed`.
    """
    batch: list[T] = []
    longest = total = 0
    for row in rows:
        length = length_of(row)
        tokens = total + length if packed else max(longest, length) * (len(batch) + 1)
        full = max_rows is not None and len(batch) >= max_rows
        if batch and (full or (max_tokens is not None and tokens > max_tokens)):
            yield batch
            batch, longest, total = [], 0, 0
        batch.append(row)
        longest, total = max(longest, length), total + length
    if batch:
        yield batch


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
) -> MicroBatch:
    """Build the tensors of one forward; `weight` applies to each scored position.

    `head`: the teacher's head, for `hidden` rows.
    """
    teacher = teacher_of(records, head, vocab_size)  # first, to reject unscored rows
    prompts, completions = [r.prompt_ids for r in records], [r.completion_ids for r in records]
    aligned = align(prompts, completions, pad_id, torch.device("cpu"), packed=packed)
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
