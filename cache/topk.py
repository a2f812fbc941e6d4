"""Signals `topk` and `nucleus`: the teacher's most likely ids per position, and the mass of all others.

Shapes: T tokens, K slots. The packed form puts logprobs on a grid; `TopK.pack` states its accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.planes import Bytes, Header, Source, bits_in_highest_plane, bytes_for, join, pack_bits, split
from cache.schema import (
    MASS_TOLERANCE,
    Array,
    Float32,
    Int32,
    Record,
    Rules,
    Signal,
    as_array,
    refuse,
    refuse_where,
)

STEP_NATS = 1 / 256  # grid of logprob gaps to the most likely id; the error does not grow with the gap
ROUNDING_NATS = 1 / 32 + 2 * MASS_TOLERANCE  # how far packing may move a top-1 logprob
_LARGEST_CODE = 2**31 - 128  # fits int32, exact in float32: 8.4e6 nats
_ESCAPE = 0xFFFF  # marks a step too large for two planes
_LN_HALF = np.log(0.5)


@dataclass(frozen=True, eq=False)
class TopK(Signal):
    """The teacher's most likely ids per position and the mass of all others, normalised together.

    Attributes:
        ids: int32 [T, K], in descending logprob; empty slots hold -1 and come last.
        logprobs: float32 [T, K], nats; -inf in empty slots.
        log_tail_mass: float32 [T], ln of the mass outside the kept ids, nats; -inf if everything is kept.
        temperature: temperature of logprobs and tail.
    """

    ids: Int32
    logprobs: Float32
    log_tail_mass: Float32
    temperature: float = 1.0

    number: ClassVar = 1
    column_types: ClassVar = {"signal_ids": pa.int32(), "signal_logprobs": pa.float32()}

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", as_array("signal.ids", self.ids, np.int32, 2))
        object.__setattr__(self, "logprobs", as_array("signal.logprobs", self.logprobs, np.float32, 2))
        tail = as_array("signal.log_tail_mass", self.log_tail_mass, np.float32, 1)
        object.__setattr__(self, "log_tail_mass", tail)

    def check(self, record: Record, rules: Rules, *, packed: bool) -> None:
        _check_shapes(self, record, rules)
        ids, tail = self.ids, self.log_tail_mass
        expected = f"an id from 0 to {rules.vocab_size - 1}, or -1 for an empty slot"
        refuse_where(record, "signal.ids", (ids < -1) | (ids >= rules.vocab_size), ids, expected)
        _check_order(record, ids, self.logprobs)
        refuse_where(record, "signal.log_tail_mass", np.isnan(tail), tail, "the ln of a mass, nats")
        mass = np.exp(self.logprobs.astype(np.float64)).sum(1) + np.exp(tail.astype(np.float64))
        bad = ~(np.abs(mass - 1) <= MASS_TOLERANCE)
        refuse_where(
            record, "the mass of signal's kept ids and tail", bad, mass, f"1 within {MASS_TOLERANCE}"
        )
        _check_columns(self, record, MASS_TOLERANCE + (ROUNDING_NATS if packed else 0.0))

    def pack(self) -> tuple[Header, Iterator[Bytes]]:
        """Normalise over kept ids and tail, and round; ids are exact.

        Each logprob's gap to slot 0 is accurate to 1/512 nat, however large, and ln of the smaller of kept
        and tail mass to a relative 2**-17.
        """
        num_bits = max(1, int(self.ids.max(initial=0)).bit_length())
        num_tokens, width = self.ids.shape
        header = Header(self.number, num_bits, num_tokens, width, self.temperature)
        return header, _planes(self, num_bits)

    @classmethod
    def unpack(cls, header: Header, source: Source, rules: Rules | None) -> Self:
        return cls.unpack_together([header], [source], rules)[0]

    @classmethod
    def unpack_together(
        cls, headers: Sequence[Header], sources: Sequence[Source], rules: Rules | None
    ) -> list[Self]:
        if rules is not None:
            _check_header(headers[0], rules)
        lengths = [header.num_tokens for header in headers]
        signal = cls(*_unpack(headers[0], sources, lengths), headers[0].temperature)
        first = signal.logprobs[:, 0][signal.ids[:, 0] >= 0]  # the other gaps are finite by construction
        if not np.isfinite(first).all() or np.isnan(signal.log_tail_mass).any():
            raise ValueError("a logprob or a mass is not a number")
        if rules and signal.ids.max(initial=0) >= rules.vocab_size:
            raise ValueError(f"it keeps id {signal.ids.max()}, the vocabulary has {rules.vocab_size}")
        if len(headers) == 1:
            return [signal]
        parts = [slice(*bounds) for bounds in pairwise(accumulate(lengths, initial=0))]
        ids, logprobs, tail = signal.ids, signal.logprobs, signal.log_tail_mass
        return [cls(ids[own], logprobs[own], tail[own], signal.temperature) for own in parts]

    def columns(self) -> tuple[dict[str, Array], Array]:
        kept = self.ids >= 0
        return {"signal_ids": self.ids[kept], "signal_logprobs": self.logprobs[kept]}, kept.sum(1)

    def most_likely(self, count: int, head: Callable[[], Any]) -> tuple[Int32, Float32]:
        return self.ids[:, :count], np.exp(self.logprobs[:, :count])


def _check_shapes(signal: TopK, record: Record, rules: Rules) -> None:
    ids, logprobs, tail = signal.ids, signal.logprobs, signal.log_tail_mass
    num_tokens, most = len(record.completion_ids), rules.k or rules.vocab_size
    if ids.shape != logprobs.shape or len(ids) != num_tokens or len(tail) != num_tokens or not ids.shape[1]:
        shapes = f"ids {list(ids.shape)}, logprobs {list(logprobs.shape)}, log_tail_mass {list(tail.shape)}"
        refuse(record, f"signal has {shapes}; expected [{num_tokens}, K] twice and [{num_tokens}], K >= 1")
    if ids.shape[1] > most:
        refuse(
            record,
            f"signal keeps {ids.shape[1]} ids a token; expected at most {most}, as the fingerprint says",
        )
    if np.float32(signal.temperature) != np.float32(rules.temperature):  # float32, as it is packed
        refuse(record, f"signal is at temperature {signal.temperature}; expected {rules.temperature}")


def _check_order(record: Record, ids: Int32, logprobs: Float32) -> None:
    kept = ids >= 0
    name = "signal.logprobs"
    refuse_where(record, name, kept & ~np.isfinite(logprobs), logprobs, "a finite logprob for a kept id")
    refuse_where(record, name, ~kept & (logprobs != -np.inf), logprobs, "-inf in an empty slot")
    gap = np.zeros_like(kept)
    gap[:, 1:] = kept[:, 1:] & ~kept[:, :-1]
    refuse_where(record, "signal.ids", gap, ids, "empty slots (id -1) last")
    rising = np.zeros_like(kept)
    rising[:, 1:] = kept[:, 1:] & (logprobs[:, 1:] > logprobs[:, :-1])
    refuse_where(record, name, rising, logprobs, "falling logprobs, the most likely id in slot 0")
    ordered = np.sort(ids, axis=1)
    twice = np.zeros_like(kept)
    twice[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        position, slot = np.argwhere(twice)[0]
        refuse(
            record, f"signal.ids[{position}] keeps id {ordered[position, slot]} twice; expected each id once"
        )


def _check_columns(signal: TopK, record: Record, tolerance: float) -> None:
    """Reject columns that differ from the signal by more than `tolerance` (nats; a share for the tail)."""
    assert record.top1_id is not None
    assert record.top1_logprob is not None
    assert record.log_tail_mass is not None
    first, filled = signal.ids[:, 0], signal.ids[:, 0] >= 0
    bad = filled & (record.top1_id != first)
    refuse_where(record, "top1_id", bad, record.top1_id, "the id in the signal's slot 0")
    with np.errstate(invalid="ignore"):
        bad = filled & ~(np.abs(record.top1_logprob - signal.logprobs[:, 0]) <= tolerance)
    refuse_where(record, "top1_logprob", bad, record.top1_logprob, "the logprob in the signal's slot 0")
    difference = np.abs(np.exp(record.log_tail_mass) - np.exp(signal.log_tail_mass))
    bad = ~(difference <= min(tolerance, 3 * MASS_TOLERANCE))
    refuse_where(record, "log_tail_mass", bad, record.log_tail_mass, "the signal's own log_tail_mass")


def _check_header(header: Header, rules: Rules) -> None:
    most = rules.k or rules.vocab_size
    if not 1 <= header.width <= most:
        raise ValueError(f"it keeps {header.width} ids a token, the fingerprint allows {most}")
    if header.temperature != np.float32(rules.temperature):
        raise ValueError(
            f"it is at temperature {header.temperature}, the fingerprint's is {rules.temperature}"
        )


def _planes(signal: TopK, num_bits: int) -> Iterator[Bytes]:
    """Kept counts, ids, mass word per token, first steps, other steps, escapes."""
    kept = signal.ids >= 0
    first = np.where(kept[:, :1], signal.logprobs[:, :1], 0)
    gaps = np.where(kept, first - signal.logprobs, 0)
    with np.errstate(divide="ignore"):
        log_kept = np.log(np.where(kept, np.exp(-gaps), 0).sum(1, dtype=np.float64)) + first[:, 0]
    yield from split(kept.sum(1).astype("<u4"), bytes_for(kept.shape[1]))
    ids = (signal.ids if kept.all() else signal.ids[kept]).reshape(-1).view("<u4")
    *low, high = split(ids, (num_bits + 7) // 8)
    yield from (*low, pack_bits(high, bits_in_highest_plane(num_bits)))
    yield from split(_mass_word(log_kept, signal.log_tail_mass.astype(np.float64)), 3)
    steps = np.diff(_codes_of(gaps), axis=1).astype("<u4")
    escapes = []
    for own in (steps[:, :1][kept[:, 1:2]], steps[:, 1:][kept[:, 2:]]):
        yield from split(np.minimum(own, _ESCAPE).astype("<u4"), 2)
        escapes.append(own[own >= _ESCAPE])
    yield np.concatenate(escapes).view(np.uint8)


def _codes_of(gaps: Float32) -> npt.NDArray[np.int32]:
    """Return the nearest grid codes of gaps >= 0 (nats), monotone in the gap."""
    return np.rint(np.minimum(gaps * np.float32(1 / STEP_NATS), np.float32(_LARGEST_CODE))).astype(np.int32)


def _unpack(
    header: Header, sources: Sequence[Source], lengths: Sequence[int]
) -> tuple[Int32, Float32, Float32]:
    """Ids, logprobs and tail of signals of `lengths` tokens, one after the other. `header`: any one's."""
    _, num_bits, _, width, _ = header
    if not 1 <= num_bits <= 31:
        raise ValueError(f"ids of {num_bits} bits")
    counts = join(sources, lengths, bytes_for(width)).astype(np.int64)
    if counts.max(initial=0) > width:
        raise ValueError(f"a token keeps {counts.max()} ids of {width}")
    kept = np.arange(width) < counts[:, None]
    is_full = bool(kept.all())
    num_planes, bits = (num_bits + 7) // 8, bits_in_highest_plane(num_bits)
    found = join(sources, _sums(counts, lengths), num_planes, bits_per_number=bits).view("<i4")
    if is_full:
        ids = found.reshape(kept.shape)
    else:
        ids = np.full(kept.shape, -1, np.int32)
        ids[kept] = found
    log_kept, log_tail = _masses(join(sources, lengths, 3))
    gaps = _read_codes(sources, lengths, kept, is_full).astype(np.float32) * np.float32(STEP_NATS)
    shares = np.exp(-gaps)
    if not is_full:
        shares *= kept
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (log_kept - np.log(shares.sum(1, dtype=np.float64))).astype(np.float32)
        logprobs = first[:, None] - gaps
    if not is_full:
        logprobs[~kept] = -np.inf
    return ids, logprobs, log_tail.astype(np.float32)


def _sums(values: Array, lengths: Sequence[int]) -> list[int]:
    """The sums of successive parts of these lengths."""
    totals = np.concatenate([[0], np.cumsum(values)])
    return np.diff(totals[[0, *accumulate(lengths)]]).tolist()


def _read_codes(
    sources: Sequence[Source], lengths: Sequence[int], kept: Array, is_full: bool
) -> npt.NDArray[np.int64]:
    """Read the grid codes [T, K] of all slots; zero in slot 0."""
    sizes = [_sums(own.sum(1), lengths) for own in (kept[:, 1:2], kept[:, 2:])]
    first, others = (join(sources, own, 2) for own in sizes)
    missing = [first == _ESCAPE, others == _ESCAPE]
    counts = [_sums(own, number) for own, number in zip(missing, sizes, strict=True)]
    read = [s.read(4 * (n + m)).view("<u4") for s, n, m in zip(sources, *counts, strict=True)]
    first[missing[0]] = np.concatenate([own[:n] for own, n in zip(read, counts[0], strict=True)])
    others[missing[1]] = np.concatenate([own[n:] for own, n in zip(read, counts[0], strict=True)])
    steps = np.zeros(kept.shape, np.int64)
    if is_full:
        steps[:, 1:2] = first.reshape(len(steps), -1)
        steps[:, 2:] = others.reshape(len(steps), -1)
    else:
        steps[:, 1:2][kept[:, 1:2]] = first
        steps[:, 2:][kept[:, 2:]] = others
    return np.cumsum(steps, axis=1, out=steps)


def _mass_word(log_kept: Array, log_tail: Array) -> npt.NDArray[np.uint32]:
    """Top 24 bits of a float32: ln of the tail's share if it is the smaller, else −ln of the kept share."""
    log_total = np.logaddexp(log_kept, log_tail)
    tail = log_tail - log_total
    word = np.where(tail < _LN_HALF, tail, log_total - log_kept).astype("<f4").view("<u4")
    return ((word + 0x80) >> 8).astype(np.uint32)


def _masses(words: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return ln of the kept and of the tail's share; the two masses add up to 1."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a damaged word may be a signalling NaN
        word = (words << 8).view("<f4").astype(np.float64)
        smaller = -np.abs(word)
        larger = np.log1p(-np.exp(smaller))
    is_tail = word < 0
    return np.where(is_tail, larger, smaller), np.where(is_tail, smaller, larger)
