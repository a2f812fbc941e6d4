"""The table of signal kinds: how the teacher's states become a signal, and stored signals the loss's teacher.

Shapes: N scored positions, T tokens of a row, D teacher width, V vocabulary, K kept ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import cache
from dualkl import Head, HiddenTeacher, LogitsTeacher, TopKTeacher
from dualkl.compress import Compressed
from dualkl.heads import prepare_head
from dualkl.targets import check_topk_values
from stages.runtime.config import SignalSection
from stages.runtime.errors import UserError

AnyTeacher = LogitsTeacher | HiddenTeacher | TopKTeacher
Arrays = dict[str, np.ndarray]
NUCLEUS_FLOOR = 4  # minimum number of ids kept by signal nucleus
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class SignalKind(ABC):
    """One kind in stage one (`limits`, `tensors`, `signal`) and in stage two (`teacher`).

    Attributes:
        stored: its class in the cache.
        is_whole: the whole distribution follows from it, at any temperature; nothing is in the tail.
        by_row: `tensors` takes one row at a time, because those of a whole forward are too large.
    """

    stored: ClassVar[type[cache.Signal]]
    is_whole: ClassVar[bool] = True
    by_row: ClassVar[bool] = False

    def limits(self, section: SignalSection, vocab_size: int) -> dict[str, Any]:
        """Return what `compress` keeps: its k, p and floor. They are part of the cache's fingerprint."""
        return {}

    @abstractmethod
    def bytes_per_token(self, section: SignalSection, width: int, vocab_size: int, itemsize: int) -> float:
        """Estimate the bytes of a token on disk (docs/cache.md); `itemsize` is the teacher's dtype's."""

    @abstractmethod
    def tensors(self, states_ND: Tensor, head: Head, kept: Compressed, vocab_size: int) -> dict[str, Tensor]:
        """Return the tensors to store, by name; `kept` is what `compress` made of the same states."""

    @abstractmethod
    def signal(self, arrays: Arrays) -> cache.Signal:
        """Return the signal of one row from its part of `tensors`, and its `log_tail_mass`, as arrays."""

    @abstractmethod
    def teacher(self, signals: list[Any], head: Head | None) -> AnyTeacher:
        """Return the loss's teacher for the signals of some rows, in order."""


class KeptIds(SignalKind):
    """The most likely ids: k of them, or those that reach the mass `signal_p`, at most k."""

    stored = cache.TopK
    is_whole = False

    def __init__(self, *, is_nucleus: bool) -> None:
        self.is_nucleus = is_nucleus

    def limits(self, section: SignalSection, vocab_size: int) -> dict[str, Any]:
        k = min(section.signal_k, vocab_size)
        return {"k": k} | ({"p": section.signal_p, "floor": min(NUCLEUS_FLOOR, k)} if self.is_nucleus else {})

    def bytes_per_token(self, section: SignalSection, width: int, vocab_size: int, itemsize: int) -> float:
        return 2.3 * min(section.signal_k, vocab_size) + 5

    def tensors(self, states_ND: Tensor, head: Head, kept: Compressed, vocab_size: int) -> dict[str, Tensor]:
        return {"ids": kept.ids, "logprobs": kept.logprobs}

    def signal(self, arrays: Arrays) -> cache.Signal:
        return cache.TopK(arrays["ids"], arrays["logprobs"], arrays["log_tail_mass"], temperature=1.0)

    def teacher(self, signals: list[Any], head: Head | None) -> AnyTeacher:
        width = max(signal.ids.shape[1] for signal in signals)
        ids = cat([_widen(signal.ids, width, -1) for signal in signals]).long()
        logprobs = cat([_widen(signal.logprobs, width, -np.inf) for signal in signals])
        tail = cat([signal.log_tail_mass for signal in signals])
        return TopKTeacher(ids, logprobs, tail, temperature=signals[0].temperature)


class States(SignalKind):
    """The last hidden states; the cache keeps the teacher's head once."""

    stored = cache.Hidden

    def bytes_per_token(self, section: SignalSection, width: int, vocab_size: int, itemsize: int) -> float:
        return 0.663 * itemsize * width

    def tensors(self, states_ND: Tensor, head: Head, kept: Compressed, vocab_size: int) -> dict[str, Tensor]:
        return {"states": states_ND}

    def signal(self, arrays: Arrays) -> cache.Signal:
        return cache.Hidden(arrays["states"], _dtype_name(arrays["states"]))

    def teacher(self, signals: list[Any], head: Head | None) -> AnyTeacher:
        if head is None:
            raise UserError(
                "the cache holds hidden states but no teacher head; run `dualkl cache verify` on it."
            )
        return HiddenTeacher(cat([_typed(s.states, s.dtype) for s in signals]), head)


class Logits(SignalKind):
    """The logits over the whole vocabulary, in the teacher's dtype."""

    stored = cache.Full
    by_row = True

    def bytes_per_token(self, section: SignalSection, width: int, vocab_size: int, itemsize: int) -> float:
        return 0.49 * itemsize * vocab_size

    def tensors(self, states_ND: Tensor, head: Head, kept: Compressed, vocab_size: int) -> dict[str, Tensor]:
        prepared = prepare_head(head, states_ND, vocab_size)
        return {"logits": prepared.logits(states_ND.to(prepared.weight_Vd.dtype)).to(states_ND.dtype)}

    def signal(self, arrays: Arrays) -> cache.Signal:
        return cache.Full(arrays["logits"], _dtype_name(arrays["logits"]))

    def teacher(self, signals: list[Any], head: Head | None) -> AnyTeacher:
        return LogitsTeacher(cat([_typed(s.logits, s.dtype) for s in signals]).float())


KINDS: dict[str, SignalKind] = {
    "topk": KeptIds(is_nucleus=False),
    "nucleus": KeptIds(is_nucleus=True),
    "hidden": States(),
    "full": Logits(),
}


def teacher_of(records: list[cache.Record], head: Head | None, vocab_size: int) -> AnyTeacher:
    """Return the loss's teacher for the scored positions of `records`, in order; all but `head` on the host.

    Top-k values are checked here, because on a GPU the loss checks only shapes.
    """
    signals = [record.signal for record in records]  # rows of one cache share one kind
    kind = next((kind for kind in KINDS.values() if isinstance(signals[0], kind.stored)), None)
    if kind is None:
        raise UserError(f"row {records[0].row_id} is not scored yet; run `dualkl rollout` to score it.")
    teacher = kind.teacher(signals, head)
    if isinstance(teacher, TopKTeacher):
        check_topk_values(teacher, vocab_size)
    return teacher


def cached_head(snapshot: cache.Snapshot, device: torch.device) -> Head | None:
    """Return the teacher's head of a cache on `device`; None if it has none.

    Each call reads it again, so its memory is freed when the caller drops it.
    """
    return dual_kl_head(snapshot.head(), device)


def dual_kl_head(stored: cache.TeacherHead | None, device: torch.device) -> Head | None:
    """Convert a stored teacher head to `dualkl`'s type, on `device`."""
    if stored is None:
        return None
    bias = None if stored.bias is None else torch.from_numpy(np.array(stored.bias)).to(device)
    weight = _typed(stored.weight, stored.dtype).to(device)
    return Head(weight, bias=bias, scale=stored.scale, softcap=stored.softcap or None)


def cat(parts: list[np.ndarray] | list[Tensor]) -> Tensor:
    """Concatenate arrays or tensors."""
    arrays = [part for part in parts if not isinstance(part, Tensor)]
    if len(arrays) == len(parts):
        return torch.from_numpy(np.concatenate(arrays))
    return torch.cat(
        [part if isinstance(part, Tensor) else torch.from_numpy(np.array(part)) for part in parts]
    )


def _typed(array: np.ndarray, dtype: str) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor.to(_TORCH[dtype])


def _dtype_name(array: np.ndarray) -> str:
    return "bfloat16" if array.dtype == np.uint16 else str(array.dtype)


def _widen(array: np.ndarray, width: int, fill: float) -> np.ndarray:
    missing = width - array.shape[1]
    return np.pad(array, ((0, 0), (0, missing)), constant_values=fill) if missing else array
