"""`python -m cache export`: all rows, decoded, as Parquet files or as a folder that `datasets.load_from_disk` opens.

Rows are in the order of `Snapshot.places`, one record batch after the other, so that a few of them fill the memory
whatever the cache's size.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.ipc as ipc

from cache.decoded import decoded_batch, decoded_schema
from cache.reader import Snapshot
from cache.schema import CacheError
from cache.store import sync

_Writer: TypeAlias = Any  # a ParquetWriter or a RecordBatchStreamWriter
FILE_BYTES = 500 * 10**6  # a file that has grown to this is closed; `datasets` cuts at the same size
_DATASETS_NAMES = {
    "halffloat": "float16",
    "float": "float32",
}  # where `datasets` does not say what Arrow says


@dataclass(frozen=True)
class Exported:
    """What an export wrote: `rows`, and the files of the folder and their bytes."""

    rows: int
    files: int
    bytes: int


def export(snapshot: Snapshot, form: str, out: str) -> Exported:
    """Writes all rows to the folder `out`, in one of `FORMS`; the columns are those of `cache.decoded`.

    The folder appears under its name when it is complete; until then it is `.NAME-<hex>.partial` beside it, locked. What a
    killed process left of it the next export to `out` removes. CacheError if `out` is neither absent nor an empty folder, if it cannot be
    written, or if bytes of the cache are damaged.
    """
    target = _target(out)
    held: int | None = None
    partial = target.parent / f".{target.name}-{secrets.token_hex(4)}.partial"
    try:
        _remove_unlocked(target)
        partial.mkdir(parents=True)
        held = _lock(partial)
        FORMS[form](snapshot, partial)
        sizes = [path.stat().st_size for path in partial.iterdir()]
        sync(partial)
        partial.rename(target)  # refused by the system unless `target` is absent or empty
        sync(target.parent)
    except OSError as error:
        raise CacheError(f"{out} cannot be written ({error}); nothing was exported.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)
    return Exported(len(snapshot), len(sizes), sum(sizes))


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed, or its process ends; None while another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_unlocked(target: Path) -> None:
    for left in target.parent.glob(f".{glob.escape(target.name)}-????????.partial"):
        held = _lock(left) if left.is_dir() and not left.is_symlink() else None
        if held is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)


def _target(out: str) -> Path:
    if "://" in out:
        raise CacheError(f"{out} is a URL; export writes to a local folder.")
    path = Path(out).resolve()
    if path.exists() and not path.is_dir():
        raise CacheError(f"{out} exists and is no folder; give a new one. Nothing was changed.")
    if path.is_dir() and any(path.iterdir()):
        raise CacheError(f"{out} is not empty; give a new folder or an empty one. Nothing was changed.")
    return path


def _to_parquet(snapshot: Snapshot, folder: Path) -> None:
    """`part-00000.parquet` and so on: zstd, a row group for each record batch, the fingerprint in the metadata."""
    import pyarrow.parquet as parquet

    schema = decoded_schema(snapshot).with_metadata(_metadata(snapshot))

    def open_file(sink: pa.NativeFile) -> _Writer:
        return parquet.ParquetWriter(sink, schema, compression="zstd")

    _write_files(_batches(snapshot, schema), open_file, lambda number: folder / f"part-{number:05}.parquet")


def _to_datasets(snapshot: Snapshot, folder: Path) -> None:
    """What `Dataset.save_to_disk` of `datasets` 4 and 5 writes: Arrow streams, `state.json`, `dataset_info.json`."""
    schema = decoded_schema(snapshot)
    features = {field.name: _feature(field.type) for field in schema}
    info = json.dumps({"info": {"features": features}})
    schema = schema.with_metadata({**_metadata(snapshot), "huggingface": info})
    parts = _write_files(
        _batches(snapshot, schema),
        lambda sink: ipc.new_stream(sink, schema),
        lambda number: folder / f"{number}.arrow",
    )
    names = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": _content_digest(snapshot)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    description = json.dumps(_meaning(snapshot), ensure_ascii=False, sort_keys=True)
    about = {"citation": "", "description": description, "features": features, "homepage": "", "license": ""}
    for file_name, value in (("state.json", state), ("dataset_info.json", about)):
        (folder / file_name).write_text(json.dumps(value, indent=2), encoding="utf-8")
        sync(folder / file_name)


FORMS: dict[str, Callable[[Snapshot, Path], None]] = {"parquet": _to_parquet, "datasets": _to_datasets}


def _batches(snapshot: Snapshot, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for place in snapshot.places():
        yield decoded_batch(snapshot.read_place(place), schema)


def _write_files(
    batches: Iterable[pa.RecordBatch],
    open_file: Callable[[pa.NativeFile], _Writer],
    path_of: Callable[[int], Path],
) -> list[Path]:
    """Writes batches to files, the next one begun when one has `FILE_BYTES`; one without rows if there are none."""
    source = iter(batches)
    paths: list[Path] = []
    batch = next(source, None)
    while batch is not None or not paths:
        paths.append(path_of(len(paths)))
        with pa.OSFile(str(paths[-1]), "wb") as sink, open_file(sink) as writer:
            is_full = False  # a file takes one batch at least
            while batch is not None and not is_full:
                writer.write_batch(batch)
                is_full = sink.tell() >= FILE_BYTES
                batch = next(source, None)
        sync(paths[-1])
    return paths


def _meaning(snapshot: Snapshot) -> dict[str, Any]:
    """What the rows mean, as plain JSON."""
    fingerprint = snapshot.fingerprint
    return {
        "must_match": fingerprint.must_match,
        "recorded": fingerprint.recorded,
        "temperature": fingerprint.rules.temperature,
    }


def _metadata(snapshot: Snapshot) -> dict[str, str]:
    """`_meaning` as an Arrow schema's metadata: a key `cache.<name>` for each part, its value as JSON."""
    parts = _meaning(snapshot).items()
    return {f"cache.{name}": json.dumps(value, ensure_ascii=False, sort_keys=True) for name, value in parts}


def _content_digest(snapshot: Snapshot) -> str:
    """sha256 over what the rows mean and the digests of all shards: other rows have another one."""
    digest = hashlib.sha256(snapshot.fingerprint.digest.encode())
    for record in snapshot.commit_records():
        digest.update(record.shard_sha256.encode())
    return digest.hexdigest()


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How `datasets` writes the type of a column."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": _DATASETS_NAMES.get(str(kind), str(kind)), "_type": "Value"}
