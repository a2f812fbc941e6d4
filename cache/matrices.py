"""Signals `hidden` and `full`: the teacher's states, or its logits, packed bit for bit; and its head.

Shapes: T tokens, D teacher width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.planes import Bytes, Header, Source, join, split
from cache.schema import (
    Array,
    CacheError,
    Float32,
    Int32,
    Record,
    Rules,
    Signal,
    as_array,
    refuse,
    refuse_where,
)

STATE_DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(np.uint16),  # not in numpy: stored as bit patterns
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
IDS_PER_TILE = 8_192
_DTYPES = tuple(STATE_DTYPES)
_Top = tuple[Int32, Float32]


def as_states(name: str, value: npt.ArrayLike, dtype: str) -> Array:
    """Return a matrix in one of `STATE_DTYPES`; CacheError unless the array's dtype can carry `dtype`."""
    if dtype not in STATE_DTYPES:
        raise CacheError(f"{name} has dtype {dtype!r}; expected one of {', '.join(STATE_DTYPES)}.")
    array = np.asarray(value)
    if array.dtype != STATE_DTYPES[dtype] or array.ndim != 2:
        raise CacheError(
            f"{name} is an array of {array.dtype} with shape {list(array.shape)}; expected a matrix of"
            f" {STATE_DTYPES[dtype]}, which holds {dtype} numbers."
        )
    return np.ascontiguousarray(array)


def to_float32(array: Array, dtype: str) -> Float32:
    """Convert an array in one of `STATE_DTYPES` to float32 (exact)."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """Maps hidden states to logits: cap(scale * (states @ weight.T + bias)), cap(x) = c tanh(x / c).

    Attributes:
        weight: [V, D], `dtype` as in `STATE_DTYPES`.
        bias: float32 [V] or None.
        scale: factor on the logits before the cap.
        softcap: c, the bound of the logits' magnitude; 0 for none.
    """

    weight: Array
    dtype: str
    bias: Float32 | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", as_states("head.weight", self.weight, self.dtype))
        if self.bias is None:
            return
        object.__setattr__(self, "bias", as_array("head.bias", self.bias, np.float32, 1))
        if len(self.bias) != len(self.weight):
            raise CacheError(
                f"head.bias has {len(self.bias)} entries; expected {len(self.weight)}, as its weight."
            )

    def logits(self, states: Float32, ids: slice) -> Float32:
        """Return the logits of some ids; CacheError if one is infinite or not a number."""
        weight = to_float32(np.asarray(self.weight[ids]), self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            logits: Float32 = states @ weight.T
            if self.bias is not None:
                logits += self.bias[ids]
            logits *= np.float32(self.scale)
            if not (logits < np.inf).all():
                raise CacheError(
                    "the teacher's head and the hidden states of a row give logits that are not finite; one of"
                    " them is not the teacher's, so write the cache again."
                )
            return np.tanh(logits / self.softcap) * np.float32(self.softcap) if self.softcap else logits


@dataclass(frozen=True, eq=False)
class Hidden(Signal):
    """The teacher's last hidden states [T, D]; `dtype` as in `STATE_DTYPES` (bfloat16 stored as uint16)."""

    states: Array
    dtype: str

    number: ClassVar = 2
    needs_head: ClassVar = True
    column_types: ClassVar = {"signal_states": pa.float32()}

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", as_states("signal.states", self.states, self.dtype))

    def check(self, record: Record, rules: Rules, *, packed: bool) -> None:
        _check(record, "states", self.states, None)

    def pack(self) -> tuple[Header, Iterator[Bytes]]:
        return _pack(self.number, self.states, self.dtype)

    @classmethod
    def unpack(cls, header: Header, source: Source, rules: Rules | None) -> Self:
        return cls(*_unpack(header, source, rules.width if rules else None))

    def columns(self) -> tuple[dict[str, Array], Array]:
        return {"signal_states": _exported(self.states, self.dtype)}, _widths(self.states)

    def most_likely(self, count: int, head: Callable[[], TeacherHead | None]) -> _Top | None:
        weights = head()
        if weights is None:
            return None
        states = to_float32(self.states, self.dtype)
        return _most_likely(count, len(states), len(weights.weight), lambda ids: weights.logits(states, ids))


@dataclass(frozen=True, eq=False)
class Full(Signal):
    """The teacher's logits [T, V] before any temperature; `dtype` as in `STATE_DTYPES`."""

    logits: Array
    dtype: str

    number: ClassVar = 3
    column_types: ClassVar = {"signal_logits": pa.float32()}

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", as_states("signal.logits", self.logits, self.dtype))

    def check(self, record: Record, rules: Rules, *, packed: bool) -> None:
        _check(record, "logits", self.logits, rules.vocab_size)

    def pack(self) -> tuple[Header, Iterator[Bytes]]:
        return _pack(self.number, self.logits, self.dtype)

    @classmethod
    def unpack(cls, header: Header, source: Source, rules: Rules | None) -> Self:
        return cls(*_unpack(header, source, rules.vocab_size if rules else None))

    def columns(self) -> tuple[dict[str, Array], Array]:
        return {"signal_logits": _exported(self.logits, self.dtype)}, _widths(self.logits)

    def most_likely(self, count: int, head: Callable[[], TeacherHead | None]) -> _Top | None:
        num_tokens, vocab_size = self.logits.shape
        return _most_likely(
            count, num_tokens, vocab_size, lambda ids: to_float32(self.logits[:, ids], self.dtype)
        )


def _check(record: Record, name: str, array: Array, width: int | None) -> None:
    num_tokens = len(record.completion_ids)
    if len(array) != num_tokens or (array.shape[1] != width if width else not array.shape[1]):
        refuse(
            record, f"signal.{name} has shape {list(array.shape)}; expected [{num_tokens}, {width or 'D'}]"
        )
    bad = _not_finite(array)
    if bad.any():
        shown = to_float32(array, "bfloat16") if array.dtype == np.uint16 else array
        refuse_where(record, f"signal.{name}", bad, shown, "a finite number")


def _not_finite(array: Array) -> npt.NDArray[np.bool_]:
    return (array & 0x7F80) == 0x7F80 if array.dtype == np.uint16 else ~np.isfinite(array)


def _pack(number: int, array: Array, dtype: str) -> tuple[Header, Iterator[Bytes]]:
    size, (num_tokens, width) = array.dtype.itemsize, array.shape
    bits = array.reshape(-1).view(f"u{size}")
    rotated = (bits << 1) | (bits >> (8 * size - 1))  # the exponent fills the highest byte (not float16's)
    return Header(number, _DTYPES.index(dtype), num_tokens, width, 0.0), split(rotated, size)


def _unpack(header: Header, source: Source, width: int | None) -> tuple[Array, str]:
    """Read the matrix and its dtype; ValueError if its width is not `width` (None: any)."""
    if width not in (None, header.width):
        raise ValueError(f"it has {header.width} numbers a token, expected {width}")
    dtype = _DTYPES[header.detail]
    size = STATE_DTYPES[dtype].itemsize
    rotated = join([source], [header.num_tokens * header.width], size, size)
    array = ((rotated >> 1) | (rotated << (8 * size - 1))).view(STATE_DTYPES[dtype])
    if _not_finite(array).any():
        raise ValueError("a state or a logit is not finite")
    return array.reshape(header.num_tokens, header.width), dtype


def _exported(array: Array, dtype: str) -> Array:
    """The numbers as float16 or float32, exactly."""
    return (array if dtype == "float16" else to_float32(array, dtype)).reshape(-1)


def _widths(array: Array) -> Array:
    return np.full(len(array), array.shape[1])


def _most_likely(
    count: int, num_tokens: int, num_ids: int, logits_of: Callable[[slice], Float32]
) -> tuple[Int32, Float32]:
    """Return ids and probabilities, computing the logits of one part of the vocabulary at a time."""
    width = min(count, num_ids)
    best = np.full((num_tokens, width), -np.inf, np.float32)
    ids = np.full((num_tokens, width), -1, np.int32)
    log_total = np.full(num_tokens, -np.inf)
    for first in range(0, num_ids, IDS_PER_TILE):
        tile = logits_of(slice(first, min(first + IDS_PER_TILE, num_ids)))
        log_total = np.logaddexp(log_total, _log_sum_exp(tile))
        here = np.argpartition(-tile, min(width, tile.shape[1]) - 1, axis=1)[:, :width]
        all_best = np.concatenate([best, np.take_along_axis(tile, here, 1)], axis=1)
        all_ids = np.concatenate([ids, here.astype(np.int32) + first], axis=1)
        order = np.argsort(-all_best, axis=1, kind="stable")[:, :width]
        best, ids = np.take_along_axis(all_best, order, 1), np.take_along_axis(all_ids, order, 1)
    return ids, np.exp(best - log_total[:, None]).astype(np.float32)


def _log_sum_exp(tile: Float32) -> npt.NDArray[np.float64]:
    most = tile.max(1, keepdims=True).astype(np.float64)
    total: npt.NDArray[np.float64] = np.log(np.exp(tile - most).sum(1)) + most[:, 0]
    return total
