"""The packed form of a row's signal: a 16-byte header, then byte planes, each a zstandard frame.

Other modules use only `encode` and `decode`; FORMAT.md specifies the bytes. T tokens, K slots, n kept ids.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import zstandard

from cache.schema import (
    MASS_TOLERANCE,
    STATE_DTYPES,
    Array,
    CacheError,
    Float32,
    Full,
    Hidden,
    OtherVersionError,
    Rules,
    Signal,
    TopK,
)

CODEC_VERSION = 2
STEP_NATS = 1 / 256  # grid of logprob gaps to the most likely id; the error does not grow with the gap
_LARGEST_CODE = 2**31 - 128  # fits int32, exact in float32: 8.4e6 nats
ROUNDING_NATS = 1 / 32 + 2 * MASS_TOLERANCE  # how far packing may move a top-1 logprob
_HEADER = struct.Struct(
    "<BBBxIIf"
)  # codec version, kind, dtype (for top-k: bits of an id), T, width (K, D or V), temperature
_LENGTH = struct.Struct("<I")
_TOPK, _HIDDEN, _FULL = 1, 2, 3
_KINDS = {"topk": _TOPK, "nucleus": _TOPK, "hidden": _HIDDEN, "full": _FULL}
_FREE_NUMBERS, _NUMBERS_PER_BYTE = (
    2**25,
    16,
)  # maximum T * width of a signal; unpacking then takes less than 1 GB
_MATRICES: dict[int, type[Hidden] | type[Full]] = {_HIDDEN: Hidden, _FULL: Full}
_DTYPES = tuple(STATE_DTYPES)
_LEVEL = 1
_ESCAPE = 0xFFFF  # marks a step too large for two planes
_LN_HALF = np.log(0.5)
Bytes = npt.NDArray[np.uint8]


def encode(signal: Signal) -> bytes:
    """Pack a signal. Hidden states and logits are packed losslessly.

    A top-k signal is normalised over its kept ids and tail. Ids are exact. Each logprob's gap to slot 0 is
    accurate to 1/512 nat, however large, and ln of the smaller of kept and tail mass to a relative 2**-17.
    CacheError if the result is so small that readers would refuse to unpack it, which cannot happen with real
    signals.
    """
    packed = _encode_topk(signal) if isinstance(signal, TopK) else _encode_matrix(signal)
    _, _, _, num_tokens, width, _ = _HEADER.unpack_from(packed)
    _check_size(num_tokens, width, len(packed))
    return packed


def _encode_topk(signal: TopK) -> bytes:
    num_bits = max(1, int(signal.ids.max(initial=0)).bit_length())
    header = _HEADER.pack(CODEC_VERSION, _TOPK, num_bits, *signal.ids.shape, signal.temperature)
    return header + b"".join(_pack(plane) for plane in _topk_planes(signal, num_bits))


def _encode_matrix(signal: Hidden | Full) -> bytes:
    kind, array = (_HIDDEN, signal.states) if isinstance(signal, Hidden) else (_FULL, signal.logits)
    header = _HEADER.pack(CODEC_VERSION, kind, _DTYPES.index(signal.dtype), *array.shape, 0.0)
    size = array.dtype.itemsize
    bits = array.reshape(-1).view(f"u{size}")
    rotated = (bits << 1) | (
        bits >> (8 * size - 1)
    )  # put the exponent alone in the highest byte (bfloat16, float32)
    return header + b"".join(_pack(plane) for plane in _split(rotated, size))


def decode(packed: bytes | memoryview, num_tokens: int | None = None, rules: Rules | None = None) -> Signal:
    """Unpack a signal; a top-k signal's kept ids and tail are normalised together.

    CacheError on damaged bytes. Before unpacking anything, also CacheError on a signal that does not match
    `num_tokens` or `rules` (None: any), or that declares far more values than its bytes can hold.
    """
    try:
        version, kind, dtype, T, width, temperature = _HEADER.unpack_from(packed)
        if version != CODEC_VERSION:
            raise OtherVersionError(
                f"the signal has codec version {version}, this program reads version {CODEC_VERSION}; read"
                " the cache with the program that wrote it, or write it again."
            )
        _check_size(T, width, len(packed))
        if num_tokens not in (None, T):
            raise ValueError(f"it is of {T} tokens, its row has {num_tokens}")
        if rules is not None:
            _check_rules(kind, width, temperature, rules)
        source = _Source(memoryview(packed)[_HEADER.size :])
        if kind == _TOPK:
            topk = _decode_topk(source, T, width, dtype, temperature)
            _check_topk(topk, rules)
            signal: Signal = topk
        else:
            array = _decode_matrix(source, T * width, STATE_DTYPES[_DTYPES[dtype]])
            signal = _MATRICES[kind](array.reshape(T, width), _DTYPES[dtype])
            _check_finite(array, _DTYPES[dtype])
        source.finish()
        return signal
    except CacheError:
        raise
    except (struct.error, zstandard.ZstdError, IndexError, KeyError, ValueError, MemoryError) as error:
        raise CacheError(
            f"the packed signal does not decode ({error}); run `python -m cache verify` on it."
        ) from error


def _check_size(num_tokens: int, width: int, num_bytes: int) -> None:
    if num_tokens * width > _FREE_NUMBERS + _NUMBERS_PER_BYTE * num_bytes:
        raise CacheError(
            f"a signal of {num_bytes:,} packed bytes stands for {num_tokens:,} x {width:,} numbers, more"
            " than real ones of this length; run `python -m cache verify` on the cache."
        )


def _check_rules(kind: int, width: int, temperature: float, rules: Rules) -> None:
    """Raise ValueError unless a signal's header matches the fingerprint."""
    if kind != _KINDS.get(rules.kind):
        raise ValueError(f"its kind is {kind}, the fingerprint says {rules.kind}")
    if kind == _TOPK:
        if not 1 <= width <= (rules.k or rules.vocab_size):
            raise ValueError(
                f"it keeps {width} ids a token, the fingerprint allows {rules.k or rules.vocab_size}"
            )
        if temperature != np.float32(rules.temperature):
            raise ValueError(f"it is at temperature {temperature}, the fingerprint's is {rules.temperature}")
    expected = {_HIDDEN: rules.width, _FULL: rules.vocab_size}.get(kind)
    if expected is not None and width != expected:
        raise ValueError(f"it has {width} numbers a token, expected {expected}")


def _check_topk(signal: TopK, rules: Rules | None) -> None:
    """Cheap checks of a decoded top-k signal (ValueError); `verify` checks the rest."""
    first = signal.logprobs[:, 0][signal.ids[:, 0] >= 0]  # the other gaps are finite by construction
    if not np.isfinite(first).all() or np.isnan(signal.log_tail_mass).any():
        raise ValueError("a logprob or a mass is no number")
    if rules and signal.ids.max(initial=0) >= rules.vocab_size:
        raise ValueError(f"it keeps id {signal.ids.max()}, the vocabulary has {rules.vocab_size}")


def _check_finite(array: Array, dtype: str) -> None:
    is_finite = ((array & 0x7F80) != 0x7F80).all() if dtype == "bfloat16" else np.isfinite(array).all()
    if not is_finite:
        raise ValueError("a state or a logit is not finite")


def _topk_planes(signal: TopK, num_bits: int) -> Iterator[Bytes]:
    """Kept counts, ids, mass word per token, first steps, other steps, escapes."""
    kept = signal.ids >= 0
    first = np.where(kept[:, :1], signal.logprobs[:, :1], 0)
    gaps = np.where(kept, first - signal.logprobs, 0)
    with np.errstate(divide="ignore"):
        log_kept = np.log(np.where(kept, np.exp(-gaps), 0).sum(1, dtype=np.float64)) + first[:, 0]
    yield from _split(kept.sum(1).astype("<u4"), _bytes_for(kept.shape[1]))
    ids = (signal.ids if kept.all() else signal.ids[kept]).reshape(-1).view("<u4")
    *low, high = _split(ids, (num_bits + 7) // 8)
    yield from (*low, _pack_bits(high, _bits_in_highest_plane(num_bits)))
    yield from _split(_mass_word(log_kept, signal.log_tail_mass.astype(np.float64)), 3)
    steps = np.diff(_codes_of(gaps), axis=1).astype("<u4")
    escapes = []
    for own in (steps[:, :1][kept[:, 1:2]], steps[:, 1:][kept[:, 2:]]):
        yield from _split(np.minimum(own, _ESCAPE).astype("<u4"), 2)
        escapes.append(own[own >= _ESCAPE])
    yield np.concatenate(escapes).view(np.uint8)


def _codes_of(gaps: Float32) -> npt.NDArray[np.int32]:
    """Return the nearest grid codes of gaps >= 0 (nats), monotone in the gap."""
    return np.rint(np.minimum(gaps * np.float32(1 / STEP_NATS), np.float32(_LARGEST_CODE))).astype(np.int32)


def _decode_topk(source: _Source, num_tokens: int, width: int, num_bits: int, temperature: float) -> TopK:
    if not 1 <= num_bits <= 31:
        raise ValueError(f"ids of {num_bits} bits")
    counts = source.join(num_tokens, _bytes_for(width)).astype(np.int64)
    if counts.max(initial=0) > width:
        raise ValueError(f"a token keeps {counts.max()} ids of {width}")
    kept = np.arange(width) < counts[:, None]
    is_full = bool(kept.all())
    found = source.join(
        int(counts.sum()), (num_bits + 7) // 8, bits_per_number=_bits_in_highest_plane(num_bits)
    ).view("<i4")
    ids = found.reshape(kept.shape) if is_full else _in_slots(found, kept, np.int32, -1)
    log_kept, log_tail = _masses(source.join(num_tokens, 3))
    gaps = _read_codes(source, kept, is_full).astype(np.float32) * np.float32(STEP_NATS)
    shares = np.exp(-gaps)
    if not is_full:
        shares *= kept
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (log_kept - np.log(shares.sum(1, dtype=np.float64))).astype(np.float32)
        logprobs = first[:, None] - gaps
    if not is_full:
        logprobs[~kept] = -np.inf
    return TopK(ids, logprobs, log_tail.astype(np.float32), temperature)


def _read_codes(source: _Source, kept: Array, is_full: bool) -> npt.NDArray[np.int64]:
    """Read the grid codes [T, K] of all slots; zero in slot 0."""
    first = source.join(int(kept[:, 1:2].sum()), 2)
    others = source.join(int(kept[:, 2:].sum()), 2)
    missing = [first == _ESCAPE, others == _ESCAPE]
    counts = [int(own.sum()) for own in missing]
    escapes = source.read(4 * sum(counts)).view("<u4")
    first[missing[0]], others[missing[1]] = escapes[: counts[0]], escapes[counts[0] :]
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
    word = (words << 8).view("<f4").astype(np.float64)
    smaller = -np.abs(word)
    with np.errstate(divide="ignore"):
        larger = np.log1p(-np.exp(smaller))
    is_tail = word < 0
    return np.where(is_tail, larger, smaller), np.where(is_tail, smaller, larger)


def _decode_matrix(source: _Source, size: int, dtype: np.dtype) -> Array:
    num_planes = dtype.itemsize
    rotated = source.join(size, num_planes, num_planes)
    return ((rotated >> 1) | (rotated << (8 * num_planes - 1))).view(dtype)


def _in_slots(values: Array, kept: Array, dtype: npt.DTypeLike, fill: float) -> Array:
    """Scatter the kept slots' values into a [T, K] array filled with `fill`."""
    array = np.full(kept.shape, fill, dtype)
    array[kept] = values
    return array


def _bytes_for(largest: int) -> int:
    """Return the number of bytes needed for integers from 0 to `largest`."""
    return max(1, (largest.bit_length() + 7) // 8)


def _split(values: Array, num_planes: int) -> Iterator[Bytes]:
    """Yield the `num_planes` lowest bytes of little-endian integers, lowest first, each as an array."""
    bytes_of = values.view(np.uint8).reshape(len(values), values.dtype.itemsize)
    return (np.ascontiguousarray(bytes_of[:, i]) for i in range(num_planes))


def _bits_in_highest_plane(num_bits: int) -> int:
    """Bits used in the highest plane of a `num_bits`-bit number, rounded up to 1, 2, 4 or 8."""
    used = (num_bits - 1) % 8 + 1
    return 1 << (used - 1).bit_length()


def _pack_bits(plane: Bytes, width: int) -> Bytes:
    """Pack `width`-bit numbers, 8 / width to a byte, the first in the lowest bits, padded with zeros."""
    per_byte = 8 // width
    padded = np.zeros(-(-len(plane) // per_byte) * per_byte, np.uint8)
    padded[: len(plane)] = plane
    shifted = padded.reshape(-1, per_byte) << np.arange(0, 8, width, dtype=np.uint8)
    return np.bitwise_or.reduce(shifted, axis=1, dtype=np.uint8)


def _unpack_bits(packed: Bytes, width: int, size: int) -> Bytes:
    shifted = packed[:, None] >> np.arange(0, 8, width, dtype=np.uint8)
    plane: Bytes = (shifted & ((1 << width) - 1)).astype(np.uint8, copy=False).reshape(-1)[:size]
    return plane


class _Tools(threading.local):
    """zstandard contexts, one per thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()


def _pack(plane: Bytes) -> bytes:
    frame: bytes = _tools.compressor.compress(plane.data) if len(plane) else b""
    return _LENGTH.pack(len(frame)) + frame


class _Source:
    """Reads planes in the order in which they were packed; ValueError on unexpected sizes."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def read(self, size: int) -> Bytes:
        (length,) = _LENGTH.unpack_from(self._data, self._position)
        start = self._position + _LENGTH.size
        self._position = start + length
        frame = self._data[start : self._position]
        if not size and not length:
            return np.zeros(0, np.uint8)
        declared = zstandard.frame_content_size(frame)
        if len(frame) != length or declared != size:
            raise ValueError(f"a plane declares {declared} bytes in {length}, expected {size}")
        return np.frombuffer(_tools.decompressor.decompress(frame), np.uint8)

    def join(self, size: int, num_planes: int, num_bytes: int = 4, bits_per_number: int = 8) -> Array:
        """Read `size` integers of `num_bytes` bytes from the planes of their lowest `num_planes` bytes.

        In the last plane each number has `bits_per_number` bits.
        """
        joined = np.zeros((size, num_bytes), np.uint8)
        for i in range(num_planes - 1):
            joined[:, i] = self.read(size)
        last = self.read(-(-size * bits_per_number // 8))
        joined[:, num_planes - 1] = (
            last if bits_per_number == 8 else _unpack_bits(last, bits_per_number, size)
        )
        return joined.reshape(-1).view(f"<u{num_bytes}")

    def finish(self) -> None:
        if self._position != len(self._data):
            raise ValueError(f"{len(self._data) - self._position} bytes follow the last plane")
