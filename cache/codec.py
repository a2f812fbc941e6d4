"""The packed form of a row's signal: a header of 16 bytes, then byte planes; specified in FORMAT.md."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import zstandard

from cache.planes import Header, Source, pack
from cache.schema import CacheError, OtherVersionError, Rules, Signal
from cache.signals import CLASSES, KINDS

CODEC_VERSION = 2
HEADER = struct.Struct("<BBBxIIf")  # codec version, then the fields of `Header`
_DAMAGE = (struct.error, zstandard.ZstdError, IndexError, KeyError, ValueError, MemoryError)
_FREE_NUMBERS, _NUMBERS_PER_BYTE = 2**25, 16  # bound T * width, so that unpacking takes less than 1 GB


def encode(signal: Signal) -> bytes:
    """Pack a signal: hidden states and logits bit for bit, top-k as `TopK.pack` says.

    CacheError if the result is so small that readers would refuse to unpack it, which cannot happen with real
    signals.
    """
    header, planes = signal.pack()
    packed = HEADER.pack(CODEC_VERSION, *header) + b"".join(map(pack, planes))
    _check_size(header, len(packed))
    return packed


def decode_together(
    packed: Sequence[bytes | memoryview], num_tokens: Sequence[int], rules: Rules | None = None
) -> list[Signal]:
    """`decode` of several signals, in less time; CacheError if any is damaged."""
    found: dict[int, Signal] = {}
    try:
        opened = [_open(own, number, rules) for own, number in zip(packed, num_tokens, strict=True)]
        for places in _alike([header for header, _ in opened]):
            headers, sources = zip(*(opened[place] for place in places), strict=True)
            signals = CLASSES[headers[0].kind].unpack_together(headers, sources, rules)
            found |= dict(zip(places, signals, strict=True))
        for _, source in opened:
            source.finish()
    except (CacheError, *_DAMAGE):  # one by one, the error is that of the damaged one
        return [decode(own, number, rules) for own, number in zip(packed, num_tokens, strict=True)]
    return [found[place] for place in range(len(packed))]


def _alike(headers: Sequence[Header]) -> Iterator[list[int]]:
    """Places of headers that differ in `num_tokens` alone, few enough that a bounded size is unpacked."""
    groups: dict[Header, list[int]] = {}
    for place, header in enumerate(headers):
        groups.setdefault(header._replace(num_tokens=0), []).append(place)
    for group in groups.values():
        alike: list[int] = []
        numbers = 0
        for place in group:
            own = headers[place].num_tokens * headers[place].width
            if alike and numbers + own > _FREE_NUMBERS:
                yield alike
                alike, numbers = [], 0
            alike.append(place)
            numbers += own
        yield alike


def decode(packed: bytes | memoryview, num_tokens: int | None = None, rules: Rules | None = None) -> Signal:
    """Unpack a signal; a top-k signal's kept ids and tail are normalised together.

    CacheError on damaged bytes. Before unpacking anything, also CacheError on a signal that does not match
    `num_tokens` or `rules` (None: any), or that declares far more values than its bytes can hold.
    """
    try:
        header, source = _open(packed, num_tokens, rules)
        signal = CLASSES[header.kind].unpack(header, source, rules)
        source.finish()
        return signal
    except CacheError:
        raise
    except _DAMAGE as error:
        raise CacheError(
            f"the packed signal cannot be decoded ({error}); run `dualkl cache verify` on the cache."
        ) from error


def _open(packed: bytes | memoryview, num_tokens: int | None, rules: Rules | None) -> tuple[Header, Source]:
    """The checked header and the planes."""
    version, *fields = HEADER.unpack_from(packed)
    header = Header(*fields)
    if version != CODEC_VERSION:
        raise OtherVersionError(
            f"the signal has codec version {version}, this program reads version {CODEC_VERSION}; read"
            " the cache with the program that wrote it, or write it again."
        )
    _check_size(header, len(packed))
    if num_tokens not in (None, header.num_tokens):
        raise ValueError(f"it has {header.num_tokens} tokens, its row has {num_tokens}")
    own = CLASSES[header.kind]
    if rules is not None and KINDS[rules.kind] is not own:
        raise ValueError(f"its kind is {own.__name__.lower()}, the fingerprint says {rules.kind}")
    return header, Source(memoryview(packed)[HEADER.size :])


def _check_size(header: Header, num_bytes: int) -> None:
    if header.num_tokens * header.width > _FREE_NUMBERS + _NUMBERS_PER_BYTE * num_bytes:
        raise CacheError(
            f"a signal of {num_bytes:,} packed bytes claims to hold {header.num_tokens:,} x {header.width:,}"
            " numbers, more than any real signal of that size; run `dualkl cache verify` on the cache."
        )
