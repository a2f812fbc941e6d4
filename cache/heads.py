"""The teacher's head in a cache of hidden states: stored once, as safetensors named by its sha256."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from cache.commit import HEAD, HEADS, CommitRecord, is_count, is_digest, seal, unseal
from cache.matrices import STATE_DTYPES, TeacherHead
from cache.planes import Array
from cache.schema import CacheError, Rules
from cache.signals import needs_head
from cache.store import Store

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # in safetensors
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MOST_HEADER_BYTES = 1 << 16
_ADVICE = "Delete head.json and the file it names, and rerun stage one, which writes the head again."


def store_head(store: Store, head: TeacherHead, records: Iterable[CommitRecord]) -> str:
    """Write the head unless the cache has it; return its sha256.

    CacheError if the cache has a different head, or rows (`records`) written with a different one.
    """
    parts = _parts(head)
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    digest = hashed.hexdigest()
    stored, is_new = head_digest(store), False
    if stored in (None, digest):
        check_heads(store, records, digest)
    if stored in (None, digest) and (is_new := store.size(_file(digest)) is None):
        draft = store.draft(HEADS)
        try:
            for part in parts:
                draft.write(part)
            draft.publish(_file(digest))
        finally:
            draft.discard()
    if stored is None:
        store.create(HEAD, seal({"file": _file(digest), "file_sha256": digest}))
        stored = head_digest(store)
    if stored != digest:
        if is_new:
            store.remove(_file(digest))
        raise CacheError(
            f"{store.root}: the cache's teacher head has sha256 {str(stored)[:8]}…, this teacher's has"
            f" {digest[:8]}…. Rows of both cannot share a cache: use another cache directory, or the teacher"
            " that the cache was written with."
        )
    return digest


def check_heads(store: Store, records: Iterable[CommitRecord], digest: str | None) -> None:
    """Raise CacheError unless all rows were written with this head; states are meaningless without it."""
    for record in records:
        if record.head_sha256 != digest:
            own, other = (
                f"teacher head {d[:8]}…" if d else "no teacher head" for d in (record.head_sha256, digest)
            )
            raise CacheError(
                f"{store.path(HEAD)}: the rows of {record.shard} were written with {own}, but the cache has"
                f" {other}. Restore the head.json and the file in heads/ that belong to these rows, or use"
                " another cache directory. Nothing was changed."
            )


def head_digest(store: Store) -> str | None:
    """Return the sha256 of the cache's head, or None if it has none."""
    try:
        body = unseal(store.path(HEAD), store.read(HEAD), _ADVICE)
    except FileNotFoundError:
        return None
    digest = str(body.get("file_sha256"))
    if not is_digest(digest) or body != {"file": _file(digest), "file_sha256": digest}:
        raise CacheError(f"{store.path(HEAD)} does not name a head of this cache. {_ADVICE}")
    return digest


def with_head_width(store: Store, rules: Rules) -> Rules:
    """Return the rules with D, from the file of the cache's head, if there is one and rows need it."""
    digest = head_digest(store) if needs_head(rules.kind) else None
    if digest is None:
        return rules
    header, _ = _header(store, _file(digest))
    return replace(rules, width=int(header["weight"]["shape"][1]))


def head_files(store: Store) -> list[str]:
    """Return the files that hold the head."""
    digest = head_digest(store)
    return [] if digest is None else [HEAD, _file(digest)]


def load_head(store: Store) -> TeacherHead | None:
    """Return the cache's head, memory-mapped, after checking its digest; None without a head."""
    digest = head_digest(store)
    if digest is None:
        return None
    path = store.path(_file(digest))
    try:
        actual = store.hash(_file(digest))
    except FileNotFoundError:
        raise CacheError(f"{path} is missing, though head.json names it. {_ADVICE}") from None
    if actual != digest:
        raise CacheError(f"{path}: sha256 is {actual[:8]}…, head.json says {digest[:8]}…. {_ADVICE}")
    return _read(store, _file(digest))


def _file(digest: str) -> str:
    return f"{HEADS}/{digest}.safetensors"


def _parts(head: TeacherHead) -> list[bytes | memoryview]:
    """Return the header and arrays of a safetensors file."""
    tensors: list[tuple[str, str, Array]] = [("weight", _NAMES[head.dtype], head.weight)]
    if head.bias is not None:
        tensors.append(("bias", "F32", head.bias))
    header: dict[str, Any] = {"__metadata__": {"scale": repr(head.scale), "softcap": repr(head.softcap)}}
    start = 0
    for name, dtype, array in tensors:
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(array.data.cast("B") for _, _, array in tensors)]


def _header(store: Store, file: str) -> tuple[dict[str, Any], int]:
    """Return a safetensors header and the offset of the arrays; CacheError unless it describes a head."""
    size = store.size(file) or 0
    length = int.from_bytes(memoryview(store.read_range(file, 0, 8)), "little")
    wrong = CacheError(f"{store.path(file)} is not a teacher head ({size:,} bytes). {_ADVICE}")
    if not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
        raise wrong
    try:
        header = json.loads(bytes(memoryview(store.read_range(file, 8, length))).decode())
        scale, softcap = (float(header["__metadata__"][name]) for name in ("scale", "softcap"))
        weight, room = header["weight"], size - 8 - length
        is_right = math.isfinite(scale) and 0 <= softcap < math.inf and _fits(weight, 2, room)
        is_right = is_right and header.keys() <= {"__metadata__", "weight", "bias"}
        if "bias" in header:
            is_right = is_right and _fits(header["bias"], 1, room) and header["bias"]["dtype"] == "F32"
            is_right = is_right and header["bias"]["shape"] == weight["shape"][:1]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise wrong from None
    if not is_right:
        raise wrong
    return header, 8 + length


def _fits(entry: dict[str, Any], rank: int, num_bytes: int) -> bool:
    """Return whether a header's array lies within the file and its size matches dtype and shape."""
    (first, last), shape, dtype = entry["data_offsets"], entry["shape"], _DTYPES.get(entry["dtype"])
    counts = all(is_count(n) for n in (first, last)) and all(is_count(n, 1) for n in shape)
    if dtype is None or not counts or len(shape) != rank:
        return False
    return first <= last <= num_bytes and last - first == math.prod(shape) * STATE_DTYPES[dtype].itemsize


def _read(store: Store, file: str) -> TeacherHead:
    header, start = _header(store, file)
    data = np.memmap(store.local_copy(file), np.uint8, "r")
    arrays: dict[str, Array] = {}
    for name in header.keys() - {"__metadata__"}:
        first, last = header[name]["data_offsets"]
        dtype = STATE_DTYPES[_DTYPES[header[name]["dtype"]]]
        arrays[name] = data[start + first : start + last].view(dtype).reshape(header[name]["shape"])
    scale, softcap = (float(header["__metadata__"][name]) for name in ("scale", "softcap"))
    return TeacherHead(
        arrays["weight"], _DTYPES[header["weight"]["dtype"]], arrays.get("bias"), scale, softcap
    )
