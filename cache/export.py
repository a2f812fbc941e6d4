"""`dualkl cache export`: writes all rows, decoded, to a folder of Parquet files.

Rows are processed in the order of `Snapshot.places`, one record batch at a time; memory is independent of the
cache's size. T tokens of a row, K kept ids, V vocabulary, D teacher width; logprobs in nats.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.planes import Array
from cache.reader import PLAIN_COLUMNS, Snapshot
from cache.schema import SCHEMA, CacheError, Record, to_batch
from cache.signals import KINDS
from cache.store import sync

FILE_BYTES = 500 * 10**6  # a file is closed once it reaches this size
_MOST_VALUES = 2**31 - 1  # limit of the 32-bit offsets of an Arrow list column


@dataclass(frozen=True)
class Exported:
    """Result of an export: `rows`, number of files, and their total bytes."""

    rows: int
    files: int
    bytes: int


def export(snapshot: Snapshot, out: str) -> Exported:
    """Write all rows to the folder `out` as Parquet: the plain columns, then the signal's (see `_schema`).

    Files are written to a locked folder `.NAME-<hex>.partial` beside `out`, which is renamed when complete.
    Leftovers of a killed process are removed by the next export to `out`. CacheError if `out` exists and is
    not an empty folder, if it cannot be written, or if the cache is damaged.
    """
    target = _target(out)
    held: int | None = None
    partial = target.parent / f".{target.name}-{secrets.token_hex(4)}.partial"
    try:
        _remove_unlocked(target)
        partial.mkdir(parents=True)
        held = _lock(partial)
        _write_files(snapshot, partial)
        sizes = [path.stat().st_size for path in partial.iterdir()]
        sync(partial)
        partial.rename(target)  # fails unless `target` is absent or empty
        sync(target.parent)
    except OSError as error:
        raise CacheError(f"{out} cannot be written ({error}); nothing was exported.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)
    return Exported(len(snapshot), len(sizes), sum(sizes))


def _lock(folder: Path) -> int | None:
    """Return a descriptor that locks the folder until closed (or process exit); None if already locked."""
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
        raise CacheError(f"{out} exists and is not a folder; give a new or empty one. Nothing was changed.")
    if path.is_dir() and any(path.iterdir()):
        raise CacheError(f"{out} is not empty; give a new folder or an empty one. Nothing was changed.")
    return path


def _write_files(snapshot: Snapshot, folder: Path) -> None:
    """Write `part-00000.parquet` etc.: zstd, a row group per record batch, the fingerprint as metadata.

    A new file starts when one reaches `FILE_BYTES`; an empty cache gives one file.
    """
    import pyarrow.parquet as parquet

    schema = _schema(snapshot).with_metadata(_metadata(snapshot))
    source = _batches(snapshot, schema)
    batch, number = next(source, None), 0
    while batch is not None or not number:
        path = folder / f"part-{number:05}.parquet"
        with (
            pa.OSFile(str(path), "wb") as sink,
            parquet.ParquetWriter(sink, schema, compression="zstd") as writer,
        ):
            is_full = False  # every file gets at least one batch
            while batch is not None and not is_full:
                writer.write_batch(batch)
                is_full = sink.tell() >= FILE_BYTES
                batch = next(source, None)
        sync(path)
        number += 1


def _batches(snapshot: Snapshot, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for place in snapshot.places():
        yield _batch(snapshot.read_place(place), schema)


def _metadata(snapshot: Snapshot) -> dict[str, str]:
    """The fingerprint as Parquet metadata: one key `cache.<name>` per part, with a JSON value."""
    fingerprint = snapshot.fingerprint
    parts = {
        "must_match": fingerprint.must_match,
        "recorded": fingerprint.recorded,
        "temperature": fingerprint.rules.temperature,
    }
    return {
        f"cache.{name}": json.dumps(value, ensure_ascii=False, sort_keys=True)
        for name, value in parts.items()
    }


def _schema(snapshot: Snapshot) -> pa.Schema:
    """The plain columns, followed by the signal's, each list<list<type>> with a list a token.

    top-k and nucleus: `signal_ids` and `signal_logprobs`, without empty slots. hidden: `signal_states`; full:
    `signal_logits`; both halffloat if the first row is in float16, else float, which represents bfloat16
    exactly. none: no further columns.
    """
    own = KINDS[snapshot.fingerprint.rules.kind]
    types = dict(own.column_types) if own else {}
    first = snapshot[0].signal if len(snapshot) else None
    if first is not None:
        types = {name: pa.from_numpy_dtype(values.dtype) for name, values in first.columns()[0].items()}
    fields = [pa.field(name, SCHEMA.field(name).type) for name in PLAIN_COLUMNS]
    fields += [pa.field(name, pa.list_(pa.list_(kind))) for name, kind in types.items()]
    return pa.schema(fields)


def _batch(records: list[Record], schema: pa.Schema) -> pa.RecordBatch:
    """Convert rows to a record batch of `_schema`; CacheError on other states in a float16 cache."""
    plain = to_batch(records, [None] * len(records)).select(list(PLAIN_COLUMNS))
    columns = [*plain.columns, *_signal_columns(records, schema)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _signal_columns(records: list[Record], schema: pa.Schema) -> list[pa.Array]:
    """The columns of `schema` that follow the plain ones."""
    names = schema.names[len(PLAIN_COLUMNS) :]
    parts = [record.signal.columns() for record in records if record.signal is not None]
    row_lengths = [len(record.completion_ids) for record in records]
    found = []
    for name in names:
        wanted = np.dtype(schema.field(name).type.value_type.value_type.to_pandas_dtype())
        values = [_cast(*pair, wanted) for pair in zip(records, (own[name] for own, _ in parts), strict=True)]
        found.append(_lists(records[0], values, np.concatenate([widths for _, widths in parts]), row_lengths))
    return found


def _cast(record: Record, values: Array, wanted: np.dtype) -> Array:
    if not np.can_cast(values.dtype, wanted):
        raise CacheError(
            f"row {record.row_id}: its signal is in {values.dtype}, that of the cache's first row in"
            f" {wanted}; they do not fit one column. Read this cache with `cache.open`."
        )
    return values.astype(wanted, copy=False)


def _lists(
    first: Record, values: list[Array], widths: npt.NDArray[np.integer], row_lengths: list[int]
) -> pa.ListArray:
    """list<list>: `values` split into one list per token by `widths`, then into rows by `row_lengths`."""
    inner, outer = _offsets(widths), _offsets(row_lengths)
    if inner[-1] > _MOST_VALUES:
        raise CacheError(
            f"the record batch that begins with row {first.row_id} decodes to {inner[-1]:,} numbers; an"
            f" Arrow list column holds at most {_MOST_VALUES:,}. Read this cache with `cache.open`."
        )
    tokens = pa.ListArray.from_arrays(pa.array(inner, pa.int32()), pa.array(np.concatenate(values)))
    return pa.ListArray.from_arrays(pa.array(outer, pa.int32()), tokens)


def _offsets(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
