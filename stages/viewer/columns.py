"""Token columns of the page: numbers rounded to a few bits, ids of tokens; deflated, in base 85.

Codes of `width` slots a token lie slot after slot: all tokens of slot 0, then of slot 1.

A column of numbers has codes below 2**bits - 1, which stands for a missing value. `law` says how the page gets
a value v from a code c: "linear" v = scale c, "square" v = scale c², "log" v = exp(scale c). Stored is the
difference to the code in the slot before, and in slot 0 to that of the column `after`, modulo 2**bits - 1 and
with a missing code as 0. The first 8 bits of all codes come first, then the other bits of all.

A column of ids has the code 0 for a missing id, then one for each slot of the columns that it `refers` to (the
same id as there), then the places in the vocabulary. A code is stored as one byte below `escape`; from there
on as `escape` plus its highest part, and its lower bytes follow behind the first bytes of all codes.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Column = dict[str, Any]
LEAST_LOGPROB = -40.0  # smaller ones are shown as this
LEAST_TOP_LOGPROB = -7.0
MOST_ENTROPY = 13.0
MOST_KL = 40.0
LEVEL = 9
SAFE = str.maketrans("&<>", "/:,")  # digits of base 85 that a script element would need escaped


@dataclass(frozen=True)
class Law:
    """How values become codes of `bits` bits; `most` is the value of the largest."""

    law: str
    bits: int
    most: float
    after: str = ""

    @property
    def missing(self) -> int:
        return int(2**self.bits - 1)

    @property
    def scale(self) -> float:
        last = float(self.missing - 1)
        return self.most / (last * last if self.law == "square" else last)

    def codes(self, values: Array) -> Array:
        """The nearest code of each value, clipped to the range; `missing` for NaN."""
        wanted = values.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            exact = (np.log(wanted) if self.law == "log" else wanted) / self.scale
            exact = np.sqrt(np.maximum(exact, 0)) if self.law == "square" else exact
            rounded = np.where(np.isnan(wanted), self.missing, np.clip(np.rint(exact), 0, self.missing - 1))
        return rounded.astype(np.int64)

    def difference(self, codes: Array, base: Array) -> Array:
        """What is stored of `codes`: how far they lie above `base`, modulo `missing`."""
        above = (codes - np.where(base == self.missing, 0, base)) % self.missing
        return np.where(codes == self.missing, self.missing, above)


LAWS = {
    "teacher_logprob": Law("square", 10, LEAST_LOGPROB),
    "behaviour_logprob": Law("square", 10, LEAST_LOGPROB, "teacher_logprob"),
    "trained_logprob": Law("square", 10, LEAST_LOGPROB, "behaviour_logprob"),
    "rkl": Law("square", 10, MOST_KL),
    "fkl": Law("square", 10, MOST_KL, "rkl"),
    "lambda": Law("linear", 8, 1.0),
    "teacher_entropy": Law("square", 7, MOST_ENTROPY),
    "student_entropy": Law("square", 7, MOST_ENTROPY, "teacher_entropy"),
    "trained_entropy": Law("square", 7, MOST_ENTROPY, "student_entropy"),
    "tail": Law("log", 7, -25.4),
    "student_tail": Law("log", 7, -25.4, "tail"),
    "teacher_top_logprob": Law("square", 6, LEAST_TOP_LOGPROB),
    "student_top_logprob": Law("square", 6, LEAST_TOP_LOGPROB),
}
"""The quantities of a token, rounded so that a page of 200 × 512 tokens stays below 3 MB. Masses and λ are shares,
all else is in nats."""


def _fine(law: Law) -> Law:
    """16 bits; nats and λ in thousandths, as `dualkl cache show` prints nats."""
    if law.law == "log":
        return replace(law, bits=16)
    return replace(law, law="linear", bits=16, most=math.copysign(65.534, law.most))


FINE_LAWS = {name: _fine(law) for name, law in LAWS.items()}
"""The same with 3 decimals of a nat, where there is room."""


def number_columns(values: dict[str, Array], laws: dict[str, Law]) -> dict[str, Column]:
    """Columns of values [T] or [T, width] by their names in `laws`, NaN where missing; without those all NaN."""
    codes = {name: laws[name].codes(own) for name, own in values.items() if not np.isnan(own).all()}
    return {name: _numbers(laws[name], own, codes) for name, own in codes.items()}


def _numbers(law: Law, codes: Array, others: dict[str, Array]) -> Column:
    slots = codes.reshape(len(codes), -1).T
    base = np.concatenate([others.get(law.after, np.zeros(len(codes), np.int64))[None], slots[:-1]])
    stored = law.difference(slots, base).reshape(-1)
    low = max(0, law.bits - 8)
    parts = [stored >> low, *([stored & 2**low - 1] if low else [])]
    named = {"after": law.after} if law.after in others else {}
    about = {"bits": law.bits, "width": len(slots), "law": law.law, "scale": law.scale, **named}
    return about | {"data": deflated(_bytes(parts))}


def id_columns(places: dict[str, Array], refers: dict[str, tuple[str, ...]]) -> dict[str, Column]:
    """Columns of vocabulary places [T] or [T, width], -1 where missing; without those that miss all.

    `refers`: for each, the columns whose ids its codes refer to.
    """
    known = {name: own for name, own in places.items() if (own >= 0).any() or not own.size}
    found = {}
    for name, own in known.items():
        others = [other for other in refers[name] if other in known]
        slots = [slot for other in others for slot in np.atleast_2d(known[other].T)]
        found[name] = _ids(np.atleast_2d(own.T), slots) | ({"refers": others} if others else {})
    return found


def _ids(slots: Array, others: list[Array]) -> Column:
    codes = np.where(slots < 0, 0, slots + 1 + len(others))
    for number, other in reversed([*enumerate(others, 1)]):
        codes = np.where((slots == other) & (slots >= 0), number, codes)
    codes = codes.reshape(-1)
    most = int(codes.max(initial=0)) + 1
    tail = next(size for size in (1, 2, 3) if most <= 128 << 8 * size)
    escape = 256 - -(-most >> 8 * tail)
    above = codes[codes >= escape] - escape
    first = np.where(codes < escape, codes, escape + (codes - escape >> 8 * tail))
    rest = [above >> 8 * place & 255 for place in reversed(range(tail))]
    about = {"width": len(slots), "escape": escape, "tail": tail}
    return about | {"data": deflated(_bytes([first, *rest]))}


def _bytes(parts: Iterable[Array]) -> bytes:
    return b"".join(part.astype(np.uint8).tobytes() for part in parts)


def deflated(data: bytes) -> str:
    """Raw deflate, which a browser's DecompressionStream reads, in base 85 with the digits of SAFE."""
    deflate = zlib.compressobj(LEVEL, wbits=-15)
    return base64.b85encode(deflate.compress(data) + deflate.flush()).decode().translate(SAFE)
