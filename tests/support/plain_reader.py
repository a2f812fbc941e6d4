"""Read packed signals from cache/FORMAT.md alone, one number at a time, without code from `cache`."""

import math
import struct
from typing import Any

import zstandard


def read_signal(packed: bytes) -> dict[str, Any]:
    """`ids`, `logprobs` (ragged lists), `log_tail_mass` of a top-k signal; else the matrix's raw `bytes`."""
    version, kind, dtype, zero, T, width, temperature = struct.unpack_from("<BBBBIIf", packed)
    assert (version, zero) == (2, 0)
    planes = _planes(packed[16:])
    if kind != 1:
        size = (2, 2, 4)[dtype]
        assert len(planes) == size
        return {"kind": kind, "dtype": dtype, "shape": (T, width), "bytes": _unrotate(planes, size)}
    num_count_planes = max(1, (width.bit_length() + 7) // 8)
    counts = _join(planes[:num_count_planes])
    num_id_planes = -(-dtype // 8)
    *low, high = planes[num_count_planes : num_count_planes + num_id_planes]
    ids = _join([*low, _uncrowd(high, dtype - 8 * (num_id_planes - 1), sum(counts))])
    rest = planes[num_count_planes + num_id_planes :]
    words, first, others = _join(rest[0:3]), _join(rest[3:5]), _join(rest[5:7])
    (last,) = rest[7:]
    escapes = list(struct.unpack(f"<{len(last) // 4}I", last))
    first = [escapes.pop(0) if step == 65535 else step for step in first]
    others = [escapes.pop(0) if step == 65535 else step for step in others]
    assert not escapes
    found = {
        "kind": kind,
        "shape": (T, width),
        "temperature": temperature,
        "ids": [],
        "logprobs": [],
        "log_tail_mass": [],
    }
    for t in range(T):
        steps = ([0] + [first.pop(0) for _ in range(counts[t] > 1)])[: counts[t]]
        steps += [others.pop(0) for _ in range(counts[t] - 2)]
        found["ids"].append([ids.pop(0) for _ in range(counts[t])])
        logprobs, tail = _logprobs(steps, words[t])
        found["logprobs"].append(logprobs)
        found["log_tail_mass"].append(tail)
    assert not ids
    assert not first
    assert not others
    return found


def _planes(body: bytes) -> list[bytes]:
    planes = []
    while body:
        (length,) = struct.unpack_from("<I", body)
        planes.append(zstandard.ZstdDecompressor().decompress(body[4 : 4 + length]) if length else b"")
        body = body[4 + length :]
    return planes


def _join(planes: list[bytes]) -> list[int]:
    return [int.from_bytes(bytes(parts), "little") for parts in zip(*planes, strict=True)]


def _uncrowd(plane: bytes, used_bits: int, size: int) -> bytes:
    width = next(w for w in (1, 2, 4, 8) if w >= used_bits)
    numbers = [(byte >> shift) & (2**width - 1) for byte in plane for shift in range(0, 8, width)]
    return bytes(numbers[:size])


def _unrotate(planes: list[bytes], size: int) -> bytes:
    numbers = ((n >> 1) | ((n & 1) << (8 * size - 1)) for n in _join(planes))
    return b"".join(n.to_bytes(size, "little") for n in numbers)


def _logprobs(steps: list[int], word: int) -> tuple[list[float], float]:
    (mass,) = struct.unpack("<f", struct.pack("<I", word << 8))
    smaller = math.exp(-abs(mass))
    other = math.log1p(-smaller) if smaller < 1 else -math.inf
    log_kept, log_tail = (other, mass) if mass < 0 else (-mass, other)
    gaps, code = [], 0
    for step in steps:
        code += step
        gaps.append(code / 256)
    if not gaps:
        return [], log_tail
    first = log_kept - math.log(sum(math.exp(-gap) for gap in gaps))
    return [first - gap for gap in gaps], log_tail
