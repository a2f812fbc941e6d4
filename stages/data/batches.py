"""Turns committed rows into training batches: live pool, fixed batch order, tensors and teachers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import cache
from dualkl import Head, HiddenTeacher, LogitsTeacher, Sampled, TopKTeacher
from dualkl.targets import check_topk_values
from stages.data.alignment import Aligned, align
from stages.runtime.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
AnyTeacher = LogitsTeacher | HiddenTeacher | TopKTeacher
CPU = torch.device("cpu")
GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples modulo 1 are evenly spread
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Pool:
    """The rows eligible for training.

    Attributes:
        row_ids: sorted.
        version: index of the newest refresh in the pool.
        ages: each row's staleness in optimizer steps; -1 for rows of other runs.
        lengths: prompt and completion tokens of each row.
        opened_at: the optimizer step at which `ages` were computed.
        extras: rows of further caches, under keys `NUMBER:ROW_ID`; `ages` and `lengths` include them.
    """

    row_ids: list[str]
    version: int
    ages: dict[str, int]
    lengths: dict[str, tuple[int, int]]
    opened_at: int = 0
    extras: tuple[Extra, ...] = ()

    @property
    def num_off_policy(self) -> int:
        return sum(age < 0 for age in self.ages.values())

    @property
    def num_own(self) -> int:
        return sum(self.ages[row_id] >= 0 for row_id in self.row_ids)

    def with_extra(self, found: Pool, snapshot: cache.Snapshot, weight: float) -> Pool:
        """Return this pool with another cache's rows; `weight` of them are drawn per row of the main one."""
        prefix = f"{len(self.extras)}:"
        keys = [prefix + row_id for row_id in found.row_ids]
        return replace(
            self,
            extras=(*self.extras, Extra(keys, weight, snapshot)),
            ages=self.ages
            | {key: found.ages[row_id] for key, row_id in zip(keys, found.row_ids, strict=True)},
            lengths=self.lengths
            | {key: found.lengths[row_id] for key, row_id in zip(keys, found.row_ids, strict=True)},
        )

    def locate(self, key: str, own: cache.Snapshot) -> tuple[cache.Snapshot, str]:
        """Return the snapshot that holds the row, and the row's id there; `own` is the main cache."""
        number, found, row_id = key.rpartition(":")
        return (self.extras[int(number)].snapshot if found else own), row_id


@dataclass(frozen=True)
class Extra:
    """The rows of another cache in a pool; `weight` of them are drawn per row of the main cache."""

    keys: list[str]
    weight: float
    snapshot: cache.Snapshot


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


def live_pool(
    snapshot: cache.Snapshot,
    run_id: str,
    version: int,
    at_step: int,
    max_age: int,
    policies: dict[int, str],
) -> Pool:
    """Return the rows eligible for training at step `at_step`.

    These are this run's rows of refresh `version`, its earlier ones up to `max_age` steps old, and all rows
    of other runs.

    `policies`: the policy hash of each refresh of this run. Rows written by another policy are excluded,
    except in refresh 0, where they count as rows of another run.
    """
    index = snapshot.index.drop_columns(["prompt_id", "unit"]).to_pylist()
    ages: dict[str, int] = {}
    for row in index:
        if row["run_id"] != run_id:
            ages[row["row_id"]] = -1
        elif row["policy_hash"] != policies.get(row["refresh_index"], row["policy_hash"]):
            if row["refresh_index"] == version == 0:
                ages[row["row_id"]] = -1
            continue  # written by rolled-back weights
        elif row["refresh_index"] == version or (
            row["refresh_index"] < version and at_step - row["policy_step"] <= max_age
        ):
            ages[row["row_id"]] = at_step - row["policy_step"]
    lengths = {
        row["row_id"]: (row["num_prompt_tokens"], row["num_completion_tokens"])
        for row in index
        if row["row_id"] in ages
    }
    return Pool(sorted(ages), version, ages, lengths, at_step)


def batch_rows(pool: Pool, seed: int, batch_index: int, batch_size: int) -> list[str]:
    """Return the row keys of global batch `batch_index`, counted since the pool was opened.

    Each cache is an endless stream of its rows, permuted each epoch with the seed (seed, epoch, version).
    Batch slots are assigned to caches by weight, deterministically.
    """
    start, end = batch_index * batch_size, (batch_index + 1) * batch_size
    owner_of_place = _owners([1.0, *(extra.weight for extra in pool.extras)], end)
    picked = [""] * batch_size
    for number, keys in enumerate([pool.row_ids, *(extra.keys for extra in pool.extras)]):
        places = np.flatnonzero(owner_of_place == number)
        first = int(np.searchsorted(places, start))
        seeds = [pool.version, number] if number else [pool.version]
        stream = _stream(keys, seed, seeds, range(first, len(places)))
        for place, key in zip(places[first:].tolist(), stream, strict=True):
            picked[place - start] = key
    return picked


def _owners(weights: list[float], num_places: int) -> np.ndarray:
    """Return the cache of each batch slot; any contiguous range matches the weights within a row or two."""
    bounds = np.cumsum(weights) / sum(weights)
    return np.searchsorted(bounds[:-1], np.arange(num_places) * GOLDEN_RATIO % 1, side="right")


def _stream(keys: list[str], seed: int, seeds: list[int], places: range) -> Iterator[str]:
    for place in places:
        epoch, offset = divmod(place, len(keys))
        if place == places.start or offset == 0:
            order = np.random.default_rng([seed, epoch, *seeds]).permutation(len(keys))
        yield keys[order[offset]]


def by_cache(keys: Iterable[str]) -> list[list[str]]:
    """Group keys by cache, the main cache first, keeping the order within each group."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.rpartition(":")[0], []).append(key)
    return [groups[number] for number in sorted(groups)]


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
    teacher = teacher_of(records, head, device, vocab_size)  # first, to reject unscored rows
    aligned = align(
        [r.prompt_ids for r in records], [r.completion_ids for r in records], pad_id, device, packed=packed
    )
    sampled = Sampled(
        aligned.targets,
        _cat([cast(np.ndarray, r.teacher_logprobs) for r in records]).to(device),
        _cat([r.behaviour_logprobs for r in records]).to(device),
    )
    weights = torch.full((len(aligned.targets),), weight, dtype=torch.float32, device=device)
    entropy = _cat([cast(np.ndarray, r.teacher_entropy) for r in records]).to(device)
    return MicroBatch(aligned, teacher, sampled, weights, teacher_entropy=entropy)


def pinned_tensors(
    records: list[cache.Record],
    weight: float,
    head: Head | None,
    pad_id: int,
    vocab_size: int,
    *,
    packed: bool,
) -> MicroBatch:
    """Like `to_tensors`, in pinned memory with top-k values checked, for copies by `on_device`."""
    batch = to_tensors(records, weight, head, pad_id, CPU, vocab_size, packed=packed)
    if isinstance(batch.teacher, TopKTeacher):
        check_topk_values(batch.teacher, vocab_size)
    return map_tensors(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory(), batch)


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Copy the batch to `device`; copies from pinned memory are asynchronous."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor of a data class, recursively."""
    if isinstance(value, Tensor):
        return function(value)
    if not is_dataclass(value):
        return value
    parts = {item.name: getattr(value, item.name) for item in fields(value)}
    mapped = {name: map_tensors(function, part) for name, part in parts.items()}
    return replace(value, **mapped)  # type: ignore[type-var]


def teacher_of(
    records: list[cache.Record], head: Head | None, device: torch.device, vocab_size: int
) -> AnyTeacher:
    """Return the loss's teacher for the scored positions of `records`, in order.

    Top-k values for a GPU are checked here on the host, because on a GPU the loss checks only shapes.
    """
    signals = [record.signal for record in records]
    first = signals[0]  # rows of one cache share one kind
    if isinstance(first, cache.TopK):
        topk = cast(list[cache.TopK], signals)
        width = max(signal.ids.shape[1] for signal in topk)
        ids = _cat([_widen(signal.ids, width, -1) for signal in topk]).long()
        logprobs = _cat([_widen(signal.logprobs, width, -np.inf) for signal in topk])
        tail = _cat([signal.log_tail_mass for signal in topk])
        teacher = TopKTeacher(ids, logprobs, tail, temperature=first.temperature)
        if device.type != "cpu":
            check_topk_values(teacher, vocab_size)
        return TopKTeacher(
            ids.to(device), logprobs.to(device), tail.to(device), temperature=first.temperature
        )
    if isinstance(first, cache.Hidden):
        if head is None:
            raise UserError(
                "the cache holds hidden states but no teacher head; run `python -m cache verify` on it."
            )
        hidden = cast(list[cache.Hidden], signals)
        return HiddenTeacher(_cat([_typed(s.states, s.dtype) for s in hidden]).to(device), head)
    if isinstance(first, cache.Full):
        full = cast(list[cache.Full], signals)
        return LogitsTeacher(_cat([_typed(s.logits, s.dtype) for s in full]).to(device).float())
    raise UserError(
        f"row {records[0].row_id} is not scored yet (signal none); run stages.rollout to score it."
    )


def cached_head(snapshot: cache.Snapshot, device: torch.device) -> Head | None:
    """Return the head of a `hidden` cache on `device`, else None.

    Each call reads it again, so its memory is freed when the caller drops it.
    """
    if snapshot.fingerprint.must_match["signal"]["kind"] != "hidden":
        return None
    return dual_kl_head(snapshot.head(), device)


def dual_kl_head(stored: cache.TeacherHead | None, device: torch.device) -> Head | None:
    """Convert a stored teacher head to `dualkl`'s type, on `device`."""
    if stored is None:
        return None
    bias = None if stored.bias is None else torch.from_numpy(np.array(stored.bias)).to(device)
    return Head(
        _typed(stored.weight, stored.dtype).to(device),
        bias=bias,
        scale=stored.scale,
        softcap=stored.softcap or None,
    )


def _typed(array: np.ndarray, dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor.to(_TORCH[dtype])


def _widen(array: np.ndarray, width: int, fill: float) -> np.ndarray:
    missing = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, missing)), constant_values=fill) if missing else array


def _cat(parts: list[np.ndarray] | list[Tensor]) -> Tensor:
    return torch.cat(
        [part if isinstance(part, Tensor) else torch.from_numpy(np.array(part)) for part in parts]
    )
