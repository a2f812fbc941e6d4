"""Validates an encapsulated Arrow message, layout and memory use, before Arrow decodes it.

A record batch's buffers are compressed and declare their unpacked sizes: a hundred bytes can declare
gigabytes. The message's metadata is a FlatBuffer (arrow.apache.org/docs/format/Columnar.html), of which only
the buffers' positions are read.
"""

from __future__ import annotations

import struct

from cache.schema import CacheError

FREE_BYTES = 128 * 2**20
_BYTES_PER_BYTE = (
    256  # beyond FREE_BYTES; plain columns and packed signals of real rows unpack to less than 8
)
_MOST_BUFFERS = 256
_RECORD_BATCH, _ZSTD = 3, 1  # MessageHeader, CompressionType
_BUFFER = struct.Struct("<qq")


def most_bytes(num_bytes: int) -> int:
    """Return the maximum unpacked size of a message of `num_bytes` bytes."""
    return FREE_BYTES + _BYTES_PER_BYTE * num_bytes


def check_message(message: memoryview) -> None:
    """Raise CacheError unless the message is a zstd record batch with buffers inside it.

    The unpacked size may be up to `most_bytes`.
    """
    try:
        total = _unpacked_bytes(message)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise CacheError(f"its record batch is not a valid Arrow message ({error})") from None
    if total > most_bytes(len(message)):
        raise CacheError(f"its record batch of {len(message):,} bytes declares that it unpacks to {total:,}")


def _unpacked_bytes(message: memoryview) -> int:
    continuation, length = struct.unpack_from("<Ii", message)
    if continuation != 0xFFFFFFFF or not 0 < length <= len(message) - 8:
        raise ValueError("no message begins there")
    metadata, body = message[8 : 8 + length], message[8 + length :]
    root = _Table(metadata, _at("<I", metadata, 0))
    if root.scalar(1, "<B") != _RECORD_BATCH or root.scalar(3, "<q") != len(body):
        raise ValueError("the message is no record batch of this length")
    batch = root.table(2)
    compression = batch.position(3)
    if compression is not None and batch.table(3).scalar(0, "<b") != _ZSTD:
        raise ValueError("the buffers are not compressed with zstd")
    first, count = batch.vector(2)
    if not 0 <= count <= _MOST_BUFFERS:
        raise ValueError(f"{count} buffers")
    total = 0
    for number in range(count):
        offset, size = _BUFFER.unpack_from(metadata, first + number * _BUFFER.size)
        if offset < 0 or size < 0 or offset % 8 or offset + size > len(body):
            raise ValueError(f"buffer {number} lies outside the message")
        declared = _at("<q", body[offset : offset + size], 0) if size and compression is not None else -1
        if declared < -1:
            raise ValueError(f"buffer {number} declares {declared} bytes")
        total += size if declared == -1 else declared
    return total


class _Table:
    """A FlatBuffers table; its vtable gives the position of each field, or marks it absent."""

    def __init__(self, data: memoryview, start: int) -> None:
        self._data = data
        self._start = start
        self._vtable = start - _at("<i", data, start)

    def position(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry >= _at("<H", self._data, self._vtable):
            return None
        offset = _at("<H", self._data, self._vtable + entry)
        return self._start + offset if offset else None

    def scalar(self, field: int, form: str) -> int:
        position = self.position(field)
        return 0 if position is None else _at(form, self._data, position)

    def table(self, field: int) -> _Table:
        return _Table(self._data, self._follow(field))

    def vector(self, field: int) -> tuple[int, int]:
        """Return the position of the first element, and the number of elements."""
        start = self._follow(field)
        return start + 4, _at("<I", self._data, start)

    def _follow(self, field: int) -> int:
        position = self.position(field)
        if position is None:
            raise ValueError(f"field {field} of the metadata is missing")
        return position + _at("<I", self._data, position)


def _at(form: str, data: memoryview, position: int) -> int:
    if position < 0:
        raise ValueError("the metadata points before its beginning")
    value: int = struct.unpack_from(form, data, position)[0]
    return value
