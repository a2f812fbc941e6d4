"""The packed form of a row's signal: a header of 16 bytes, then byte planes; specified in FORMAT.md."""

from __future__ import annotations

import struct

import zstandard

from cache.planes import Header, Source, pack
from cache.schema import CacheError, OtherVersionError, Rules, Signal
from cache.signals import CLASSES, KINDS

CODEC_VERSION = 2
HEADER = struct.Struct("<BBBxIIf")  # codec version, then the fields of `Header`
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


def decode(packed: bytes | memoryview, num_tokens: int | None = None, rules: Rules | None = None) -> Signal:
    """Unpack a signal; a top-k signal's kept ids and tail are normalised together.

    CacheError on damaged bytes. Before unpacking anything, also CacheError on a signal that does not match
    `num_tokens` or `rules` (None: any), or that declares far more values than its bytes can hold.
    """
    try:
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
        source = Source(memoryview(packed)[HEADER.size :])
        signal = own.unpack(header, source, rules)
        source.finish()
        return signal
    except CacheError:
        raise
    except (struct.error, zstandard.ZstdError, IndexError, KeyError, ValueError, MemoryError) as error:
        raise CacheError(
            f"the packed signal cannot be decoded ({error}); run `python -m cache verify` on the cache."
        ) from error


def _check_size(header: Header, num_bytes: int) -> None:
    if header.num_tokens * header.width > _FREE_NUMBERS + _NUMBERS_PER_BYTE * num_bytes:
        raise CacheError(
            f"a signal of {num_bytes:,} packed bytes claims to hold {header.num_tokens:,} x {header.width:,}"
            " numbers, more than any real signal of that size; run `python -m cache verify` on the cache."
        )
