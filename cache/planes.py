"""Byte planes, of which packed signals are made: each a zstandard frame of one byte of many numbers.

FORMAT.md specifies the bytes. `cache.codec` translates the errors: ValueError, struct.error, ZstdError.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

_LENGTH = struct.Struct("<I")
_LEVEL = 1
Array: TypeAlias = npt.NDArray[Any]
Bytes: TypeAlias = npt.NDArray[np.uint8]


class Header(NamedTuple):
    """The start of a packed signal.

    Attributes:
        kind: the number of its class in `cache.signals`.
        detail: the dtype of states and logits, the bits of an id for top-k.
        width: numbers a token: K, D or V.
        temperature: 0 where the signal has none.
    """

    kind: int
    detail: int
    num_tokens: int
    width: int
    temperature: float


def bytes_for(largest: int) -> int:
    """Return the number of bytes needed for integers from 0 to `largest`."""
    return max(1, (largest.bit_length() + 7) // 8)


def split(values: Array, num_planes: int) -> Iterator[Bytes]:
    """Yield the `num_planes` lowest bytes of little-endian integers, lowest first, each as an array."""
    bytes_of = values.view(np.uint8).reshape(len(values), values.dtype.itemsize)
    return (np.ascontiguousarray(bytes_of[:, i]) for i in range(num_planes))


def bits_in_highest_plane(num_bits: int) -> int:
    """Bits used in the highest plane of a `num_bits`-bit number, rounded up to 1, 2, 4 or 8."""
    used = (num_bits - 1) % 8 + 1
    return 1 << (used - 1).bit_length()


def pack_bits(plane: Bytes, width: int) -> Bytes:
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


def pack(plane: Bytes) -> bytes:
    """Return a plane as it is stored: the length of its frame, then the frame."""
    frame: bytes = _tools.compressor.compress(plane.data) if len(plane) else b""
    return _LENGTH.pack(len(frame)) + frame


class Source:
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
            raise ValueError(f"a plane unpacks to {declared} bytes, expected {size}")
        return np.frombuffer(_tools.decompressor.decompress(frame), np.uint8)

    def finish(self) -> None:
        if self._position != len(self._data):
            raise ValueError(f"{len(self._data) - self._position} bytes follow the last plane")


def join(
    sources: Sequence[Source],
    sizes: Sequence[int],
    num_planes: int,
    num_bytes: int = 4,
    bits_per_number: int = 8,
) -> Array:
    """Read `sizes[i]` integers of `num_bytes` bytes from each source, from the planes of their lowest bytes.

    There are `num_planes` of these. In the last one each number has `bits_per_number` bits.
    """
    joined = np.zeros((sum(sizes), num_bytes), np.uint8)
    for i in range(num_planes):
        if i < num_planes - 1 or bits_per_number == 8:
            parts = [source.read(size) for source, size in zip(sources, sizes, strict=True)]
        else:
            parts = [
                _unpack_bits(source.read(-(-size * bits_per_number // 8)), bits_per_number, size)
                for source, size in zip(sources, sizes, strict=True)
            ]
        joined[:, i] = np.concatenate(parts)
    return joined.reshape(-1).view(f"<u{num_bytes}")
