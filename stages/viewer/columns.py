"""Token columns of the page: numbers rounded to 8 or 12 bits, ids of tokens; deflated, as base64.

A column holds `width` codes per token: all tokens of slot 0, then of slot 1. Codes of more than one byte are
stored as planes, all low bytes first. `missing` is the code of a missing value. `law` says how the page gets
a value v from a code c: "linear" v = scale c, "square" v = scale c², "log" v = exp(scale c). In a column of
ids that `refers` to others, the first codes stand for the id in each of their slots.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LEAST_LOGPROB = -40.0  # smaller ones are shown as this
MOST_ENTROPY = 13.0
MOST_KL = 40.0
LEVEL = 9


@dataclass(frozen=True)
class Law:
    """How values become codes of `bits` bits; `most` is the value of the largest."""

    law: str
    bits: int
    most: float

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint8 if self.bits <= 8 else np.uint16

    @property
    def scale(self) -> float:
        last = float(2**self.bits - 2)
        return self.most / (last * last if self.law == "square" else last)

    def codes(self, values: Array) -> Array:
        """The nearest code of each value, clipped to the range; the largest for NaN."""
        missing = np.iinfo(self.dtype).max
        last = 2**self.bits - 2
        wanted = values.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            exact = (np.log(wanted) if self.law == "log" else wanted) / self.scale
            exact = np.sqrt(np.maximum(exact, 0)) if self.law == "square" else exact
            rounded = np.where(np.isnan(wanted), missing, np.clip(np.rint(exact), 0, last))
        return rounded.astype(self.dtype)

    def values(self, codes: Array) -> Array:
        """The values that the page shows for `codes`; NaN for the missing one."""
        exact = codes.astype(np.float64)
        if self.law == "square":
            exact = exact * exact
        shown = exact * self.scale
        shown = np.exp(shown) if self.law == "log" else shown
        return np.where(codes == np.iinfo(self.dtype).max, np.nan, shown)


LAWS = {
    "teacher_logprob": Law("square", 12, LEAST_LOGPROB),
    "behaviour_logprob": Law("square", 12, LEAST_LOGPROB),
    "trained_logprob": Law("square", 12, LEAST_LOGPROB),
    "rkl": Law("square", 12, MOST_KL),
    "fkl": Law("square", 12, MOST_KL),
    "lambda": Law("linear", 8, 1.0),
    "teacher_entropy": Law("square", 8, MOST_ENTROPY),
    "student_entropy": Law("square", 8, MOST_ENTROPY),
    "trained_entropy": Law("square", 8, MOST_ENTROPY),
    "tail": Law("log", 8, -25.4),
    "student_tail": Law("log", 8, -25.4),
    "teacher_top_logprob": Law("square", 8, LEAST_LOGPROB),
    "student_top_logprob": Law("square", 8, LEAST_LOGPROB),
}
"""The quantities of a token. Masses and λ are shares, all else is in nats."""


def encoded(name: str, values: Array) -> dict[str, Any] | None:
    """The column of `values` [T] or [T, width], NaN where missing; None if all are."""
    law = LAWS[name]
    if np.isnan(values).all():
        return None
    return _packed(law.codes(values)) | {"law": law.law, "scale": law.scale}


def encoded_ids(ids: Array, others: dict[str, Array]) -> dict[str, Any] | None:
    """The column of vocabulary places [T] or [T, width], -1 where missing; None if all are.

    `others`: columns that it refers to where they have the same place, by name.
    """
    if ids.size and (ids < 0).all():
        return None
    slots = [column for other in others.values() for column in np.atleast_2d(other.T)]
    codes = np.where(ids < 0, -1, ids + len(slots))
    for number, slot in reversed([*enumerate(slots)]):
        same = (slot[:, None] if ids.ndim == 2 else slot) == ids
        codes = np.where(same & (ids >= 0), number, codes)
    dtype = np.uint16 if codes.max(initial=0) < 2**16 - 1 else np.uint32
    packed = _packed(np.where(codes < 0, np.iinfo(dtype).max, codes).astype(dtype))
    return packed | ({"refers": [*others]} if others else {})


def deflated(data: bytes) -> str:
    """Base64 of raw deflate, which a browser's DecompressionStream reads."""
    deflate = zlib.compressobj(LEVEL, wbits=-15)
    return base64.b64encode(deflate.compress(data) + deflate.flush()).decode()


def _packed(codes: Array) -> dict[str, Any]:
    planes = np.ascontiguousarray(codes.T).reshape(-1).view(np.uint8).reshape(codes.size, -1).T
    width = codes.shape[1] if codes.ndim == 2 else 1
    return {
        "dtype": f"u{8 * codes.itemsize}",
        "width": width,
        "missing": int(np.iinfo(codes.dtype).max),
        "data": deflated(planes.tobytes()),
    }
