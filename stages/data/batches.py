"""Committed rows -> the live pool -> batches in a fixed order -> tensors and teacher objects for the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

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
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Pool:
    """The rows that may be trained on.

    Attributes:
        row_ids: sorted.
        version: counts refreshes.
        ages: of each row in optimizer steps, -1 for rows of other runs.
        lengths: prompt and completion tokens of each row.
    """

    row_ids: list[str]
    version: int
    ages: dict[str, int]
    lengths: dict[str, tuple[int, int]]

    @property
    def num_off_policy(self) -> int:
        return sum(age < 0 for age in self.ages.values())


@dataclass(frozen=True)
class MicroBatch:
    """What one training forward takes; `weights` are constants of the loss, one a scored position."""

    aligned: Aligned
    teacher: AnyTeacher
    sampled: Sampled
    weights: Float[Tensor, " N"]


def live_pool(
    snapshot: cache.Snapshot, run_id: str, version: int, at_step: int, max_age: int, policies: dict[int, str]
) -> Pool:
    """Rows of this run up to refresh `version` and no older than `max_age` steps, and all rows of other runs.

    `policies`: the policy hash that wrote each refresh of this run; rows of a refresh by another one are left out.
    """
    index = snapshot.index.drop_columns(["prompt_id", "unit"]).to_pylist()
    ages: dict[str, int] = {}
    for row in index:
        if row["run_id"] != run_id:
            ages[row["row_id"]] = -1
        elif row["policy_hash"] != policies.get(row["refresh_index"], row["policy_hash"]):
            continue  # of a trajectory that was given up
        elif row["refresh_index"] <= version and at_step - row["policy_step"] <= max_age:
            ages[row["row_id"]] = at_step - row["policy_step"]
    lengths = {
        row["row_id"]: (row["num_prompt_tokens"], row["num_completion_tokens"])
        for row in index
        if row["row_id"] in ages
    }
    return Pool(sorted(ages), version, ages, lengths)


def batch_rows(pool: Pool, seed: int, batch_index: int, batch_size: int) -> list[str]:
    """Row ids of global batch `batch_index` since the pool's version began.

    The stream is a fresh permutation of the pool each epoch, seeded by (seed, epoch, version), one after the other.
    """
    size = len(pool.row_ids)
    picked: list[str] = []
    for position in range(batch_index * batch_size, (batch_index + 1) * batch_size):
        epoch, offset = divmod(position, size)
        if not picked or offset == 0:
            order = np.random.default_rng([seed, epoch, pool.version]).permutation(size)
        picked.append(pool.row_ids[order[offset]])
    return picked


def micro_batches(
    rows: Iterable[T],
    length_of: Callable[[T], int],
    max_rows: int | None,
    max_tokens: int | None,
    *,
    packed: bool = False,
) -> Iterator[list[T]]:
    """Cuts rows, in order, into forwards of at most `max_rows` rows and `max_tokens` tokens (None: no cap).

    A longer row is a forward of its own. Padded forwards count their padding, packed ones have none.
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
    """Prompt and completion."""
    return len(record.prompt_ids) + len(record.completion_ids)


def read_ahead(read: Callable[[T], R], items: Iterable[T], depth: int = 1) -> Iterator[R]:
    """`read` of each item, in order; a thread is up to `depth` items ahead of the one that the caller works on."""
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
    """The tensors of one forward; `head` is the teacher's, needed by `hidden` rows; each position weighs `weight`."""
    aligned = align([r.prompt_ids for r in records], [r.completion_ids for r in records], pad_id, device, packed=packed)
    sampled = Sampled(
        aligned.targets,
        _cat([r.teacher_logprobs for r in records]).to(device),
        _cat([r.behaviour_logprobs for r in records]).to(device),
    )
    weights = torch.full((len(aligned.targets),), weight, dtype=torch.float32, device=device)
    return MicroBatch(aligned, teacher_of(records, head, device, vocab_size), sampled, weights)


def pinned_tensors(records: list[cache.Record], weight: float, head: Head | None, pad_id: int, vocab_size: int,
                   *, packed: bool) -> MicroBatch:  # fmt: skip
    """As `to_tensors`, in page-locked host memory and checked there: `on_device` copies it without waiting."""
    batch = to_tensors(records, weight, head, pad_id, CPU, vocab_size, packed=packed)
    if isinstance(batch.teacher, TopKTeacher):
        check_topk_values(batch.teacher, vocab_size)
    return map_tensors(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory(), batch)


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The batch on `device`; a copy from page-locked memory is queued behind what the device does now."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A data class whose tensors, however deep, are replaced by `function` of them."""
    if isinstance(value, Tensor):
        return function(value)
    if not is_dataclass(value):
        return value
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    return replace(value, **{name: map_tensors(function, part) for name, part in parts.items()})  # type: ignore[type-var]


def teacher_of(records: list[cache.Record], head: Head | None, device: torch.device, vocab_size: int) -> AnyTeacher:
    """The loss's teacher for the scored positions of `records`, row after row.

    Top-k values are checked here, on the host, where they are not checked by the loss: on a GPU it looks at shapes only.
    """
    signals = [record.signal for record in records]
    first = signals[0]
    if isinstance(first, cache.TopK):
        width = max(signal.ids.shape[1] for signal in signals)
        ids = _cat([_widen(signal.ids, width, -1) for signal in signals]).long()
        logprobs = _cat([_widen(signal.logprobs, width, -np.inf) for signal in signals])
        tail = _cat([signal.log_tail_mass for signal in signals])
        teacher = TopKTeacher(ids, logprobs, tail, temperature=first.temperature)
        if device.type != "cpu":
            check_topk_values(teacher, vocab_size)
        return TopKTeacher(ids.to(device), logprobs.to(device), tail.to(device), temperature=first.temperature)
    if isinstance(first, cache.Hidden):
        if head is None:
            raise UserError("the cache holds hidden states but no teacher head; run `python -m cache verify` on it.")
        return HiddenTeacher(_cat([_typed(s.states, s.dtype) for s in signals]).to(device), head)
    if isinstance(first, cache.Full):
        return LogitsTeacher(_cat([_typed(s.logits, s.dtype) for s in signals]).to(device).float())
    raise UserError(f"row {records[0].row_id} is not scored yet (signal none); run stages.rollout to score it.")


def dual_kl_head(stored: cache.TeacherHead | None, device: torch.device) -> Head | None:
    """A cache's teacher head on `device`."""
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
    return torch.cat([part if isinstance(part, Tensor) else torch.from_numpy(np.array(part)) for part in parts])
