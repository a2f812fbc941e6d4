"""The teacher's head beside a cache of hidden states: stored once, as safetensors named by their sha256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from cache.commit import HEAD, HEADS, seal, unseal
from cache.schema import STATE_DTYPES, Array, CacheError, TeacherHead
from cache.store import Store

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ADVICE = "Delete head.json and the file it names, and rerun stage one, which writes the head again."


def store_head(store: Store, head: TeacherHead) -> str:
    """Writes the head unless the cache has it; returns its sha256. CacheError if the cache has another one."""
    parts = _parts(head)
    digest = _sha256(parts)
    stored = head_digest(store)
    if stored in (None, digest) and store.size(_file(digest)) is None:
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
        store.remove(_file(digest))
        raise CacheError(
            f"{store.root}: the cache's teacher head has sha256 {str(stored)[:8]}…, this teacher's has {digest[:8]}…. Rows of"
            " both would not mean the same: use another cache directory, or the teacher the cache was written with."
        )
    return digest


def _sha256(parts: list[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def head_digest(store: Store) -> str | None:
    """sha256 of the cache's head, or None where it has none."""
    try:
        return str(unseal(store.path(HEAD), store.read(HEAD), _ADVICE)["file_sha256"])
    except FileNotFoundError:
        return None


def head_files(store: Store) -> list[str]:
    """The files that hold the head."""
    digest = head_digest(store)
    return [] if digest is None else [HEAD, _file(digest)]


def load_head(store: Store) -> TeacherHead | None:
    """The cache's head, memory-mapped, after checking its digest; None where it has none."""
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
    return _read(store.local_copy(_file(digest)))


def _file(digest: str) -> str:
    return f"{HEADS}/{digest}.safetensors"


def _parts(head: TeacherHead) -> list[bytes | memoryview]:
    """Header and arrays of a safetensors file."""
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


def _read(path: Path) -> TeacherHead:
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    arrays: dict[str, Array] = {}
    for name in header.keys() - {"__metadata__"}:
        first, last = header[name]["data_offsets"]
        dtype = {v: STATE_DTYPES[k] for k, v in _NAMES.items()}[header[name]["dtype"]]
        arrays[name] = data[start + first : start + last].view(dtype).reshape(header[name]["shape"])
    dtype_name = {v: k for k, v in _NAMES.items()}[header["weight"]["dtype"]]
    settings = header["__metadata__"]
    return TeacherHead(
        arrays["weight"], dtype_name, arrays.get("bias"), float(settings["scale"]), float(settings["softcap"])
    )
