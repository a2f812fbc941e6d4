"""The packed form of a row's signal, version 1: a header of 16 bytes, then one zstandard frame over plain arrays.

Everything outside this file sees `encode` and `decode` only; FORMAT.md has the bytes.
"""

from __future__ import annotations

import struct

import numpy as np
import zstandard

from cache.schema import STATE_DTYPES, CacheError, Full, Hidden, Signal, TopK

CODEC_VERSION = 1
_HEADER = struct.Struct("<BBBxIIf")  # codec version, kind, dtype, T, width (K, D or V), temperature
_TOPK, _HIDDEN, _FULL = 1, 2, 3
_MATRICES: dict[int, type[Hidden] | type[Full]] = {_HIDDEN: Hidden, _FULL: Full}
_DTYPES = tuple(STATE_DTYPES)
_LEVEL = 3


def encode(signal: Signal) -> bytes:
    """Packs a signal; `decode` gives it back, bit for bit but for the normalising of a top-k signal."""
    if isinstance(signal, TopK):
        parts = (signal.ids.astype("<i4"), signal.logprobs.astype("<f4"), signal.log_tail_mass.astype("<f4"))
        header = _HEADER.pack(CODEC_VERSION, _TOPK, 0, *signal.ids.shape, signal.temperature)
        return header + _compress(b"".join(part.tobytes() for part in parts))
    kind, array = (_HIDDEN, signal.states) if isinstance(signal, Hidden) else (_FULL, signal.logits)
    header = _HEADER.pack(CODEC_VERSION, kind, _DTYPES.index(signal.dtype), *array.shape, 0.0)
    return header + _compress(array.astype(array.dtype.newbyteorder("<"), copy=False).data)


def decode(packed: bytes | memoryview) -> Signal:
    """Unpacks a signal; a top-k signal's kept ids and tail are normalised together. CacheError on damaged bytes."""
    try:
        version, kind, dtype, num_tokens, width, temperature = _HEADER.unpack_from(packed)
        if version != CODEC_VERSION:
            raise CacheError(
                f"the signal has codec version {version}, this program reads version {CODEC_VERSION};"
                " read the cache with the program that wrote it, or write it anew."
            )
        data = zstandard.ZstdDecompressor().decompress(memoryview(packed)[_HEADER.size :])
        if kind == _TOPK:
            return _decode_topk(data, num_tokens, width, temperature)
        array = np.frombuffer(data, STATE_DTYPES[_DTYPES[dtype]]).reshape(num_tokens, width)
        return _MATRICES[kind](array, _DTYPES[dtype])
    except CacheError:
        raise
    except (struct.error, zstandard.ZstdError, IndexError, KeyError, ValueError) as error:
        raise CacheError(f"the packed signal does not decode ({error}); run `python -m cache verify` on it.") from error


def _compress(data: bytes | memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def _decode_topk(data: bytes, num_tokens: int, width: int, temperature: float) -> TopK:
    size = num_tokens * width
    ids = np.frombuffer(data, "<i4", size)
    logprobs = np.frombuffer(data, "<f4", size, 4 * size)
    tail = np.frombuffer(data, "<f4", num_tokens, 8 * size)
    return normalise(TopK(ids.reshape(num_tokens, width), logprobs.reshape(num_tokens, width), tail, temperature))


def normalise(signal: TopK) -> TopK:
    """The same signal with the masses of kept ids and tail adding up to 1 at every position (sums in float64)."""
    logprobs, tail = signal.logprobs.astype(np.float64), signal.log_tail_mass.astype(np.float64)
    log_total = np.log(np.exp(logprobs).sum(1) + np.exp(tail))
    return TopK(
        signal.ids,
        (logprobs - log_total[:, None]).astype(np.float32),
        (tail - log_total).astype(np.float32),
        signal.temperature,
    )
