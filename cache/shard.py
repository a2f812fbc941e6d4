"""One shard, an Arrow IPC file: written with a digest per batch, read one verified batch at a time.

A batch is verified by digest before Arrow decodes it, and against commit record and fingerprint afterwards.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from cache import codec
from cache.commit import SHARDS, BatchEntry, CommitRecord, canonical_json
from cache.message import check_message, most_bytes
from cache.schema import (
    FORMAT_VERSION,
    OPTIONAL_COLUMN,
    SCALAR_COLUMNS,
    SCHEMA,
    TEACHER_COLUMNS,
    TOKEN_COLUMNS,
    Array,
    CacheError,
    OtherVersionError,
    Record,
    Rules,
    bad_values,
    to_batch,
)
from cache.statistics import Statistics
from cache.store import Store

TOKENS_PER_BATCH = 8_192
SIGNAL_BYTES_PER_BATCH = 4 * 2**20  # a batch, the unit of random access, ends at either limit
_MAGIC_BYTES = 8
_ARROW_CODEC = pa.Codec("zstd", compression_level=3)
_METADATA = {
    "cache.format_version": str(FORMAT_VERSION),
    "cache.signal_codec_version": str(codec.CODEC_VERSION),
    "cache.description": "one row per rollout; logprobs, entropies and masses in nats; see FORMAT.md",
}
_COLUMNS = ("row_ids", "prompt_ids", "num_prompt_tokens", "num_completion_tokens", "policy_of_row")


class OpenShard:
    """A shard being written as a draft; buffers at most one record batch of rows in memory."""

    def __init__(self, store: Store) -> None:
        self._columns: dict[str, Any] = {name: [] for name in _COLUMNS}  # of the commit record
        self.row_ids: list[str] = self._columns["row_ids"]
        self.seen: set[str] = set()
        self._policies: dict[tuple[Any, ...], int] = {}
        self._statistics = Statistics()
        self._file = store.draft(SHARDS)
        self._sink = _Sink()
        options = ipc.IpcWriteOptions(compression=_ARROW_CODEC, use_threads=False)
        self._ipc = ipc.new_file(self._sink, SCHEMA.with_metadata(_METADATA), options=options)
        self._records: list[Record] = []
        self._signals: list[bytes | memoryview | None] = []
        self._tokens = self._signal_bytes = 0
        self._batches: list[BatchEntry] = []

    def append(self, record: Record, signal: bytes | memoryview | None) -> None:
        self.seen.add(record.row_id)
        policy = (record.run_id, record.policy_step, record.policy_hash, record.refresh_index)
        number = self._policies.setdefault(policy, len(self._policies))
        counts = len(record.prompt_ids), len(record.completion_ids)
        for name, value in zip(_COLUMNS, (record.row_id, record.prompt_id, *counts, number), strict=True):
            self._columns[name].append(value)
        self._records.append(record)
        self._signals.append(signal)
        self._tokens += len(record.completion_ids)
        self._signal_bytes += 0 if signal is None else len(signal)
        if self._tokens >= TOKENS_PER_BATCH or self._signal_bytes >= SIGNAL_BYTES_PER_BATCH:
            self._write_batch()

    def publish(self, unit: str, stem: str, fingerprint: str, head: str | None) -> CommitRecord:
        """Complete the file, publish it durably under its final name, and return its commit record."""
        if self._records:
            self._write_batch()
        self._ipc.close()
        self._file.write(self._sink.take())
        digest = self._file.sha256
        name = f"{SHARDS}/{stem}-{digest[:12]}-{secrets.token_hex(4)}.arrow"
        self._file.publish(name)
        return CommitRecord(
            unit=unit,
            fingerprint=fingerprint,
            shard=name,
            shard_bytes=self._file.num_bytes,
            shard_sha256=digest,
            batches=self._batches,
            policies=[list(policy) for policy in self._policies],
            statistics_json=canonical_json(self._statistics.to_json()),
            head_sha256=head,
            **self._columns,
        )

    def discard(self) -> None:
        self._file.discard()

    def _write_batch(self) -> None:
        self._statistics.add(self._records)
        batch = to_batch(self._records, self._signals)
        self._ipc.write_batch(batch)
        packed = b"".join(signal for signal in self._signals if signal is not None)
        self._statistics.signal_bytes += len(_ARROW_CODEC.compress(packed)) if packed else 0  # as in the file
        data = self._sink.take()
        start = 0 if self._batches else _schema_end(data)
        message = memoryview(data)[start:]
        if batch.nbytes > most_bytes(len(message)):  # never for real rows; readers would refuse it
            raise CacheError(
                f"the record batch that begins with row {self._records[0].row_id} shrinks from"
                f" {batch.nbytes:,} to {len(message):,} bytes, which no real rows do; it was not written."
            )
        digest = hashlib.sha256(message).hexdigest()
        place = self._file.num_bytes + start
        self._batches.append(BatchEntry(place, len(message), len(self._records), digest))
        self._file.write(data)
        self._records, self._signals, self._tokens, self._signal_bytes = [], [], 0, 0


class _Sink(io.BytesIO):
    """Buffers Arrow's output; positions count from the start of the file."""

    _num_taken = 0

    def tell(self) -> int:
        return self._num_taken + super().tell()

    def take(self) -> bytes:
        data = self.getvalue()
        self.seek(0)
        self.truncate()
        self._num_taken += len(data)
        return data


def _schema_end(data: bytes) -> int:
    """Return the end of an Arrow file's first message, the schema (magic, continuation, length, body)."""
    return _MAGIC_BYTES + 8 + int.from_bytes(data[12:16], "little")


class BatchRows:
    """A record batch as rows, decoded on demand.

    Commit record, fingerprint (`rules`) and stored bytes bound the memory per row.
    """

    def __init__(self, batch: pa.RecordBatch, rules: Rules | None) -> None:
        self.batch = batch
        self._rules = rules
        self._lists: dict[str, tuple[Array, Array, Array]] = {}
        for name in TOKEN_COLUMNS:
            column = batch.column(name)
            if column.null_count < len(column):
                is_valid = column.is_valid().to_numpy(zero_copy_only=False)
                self._lists[name] = (column.offsets.to_numpy(), column.values.to_numpy(), is_valid)

    def record(self, row: int) -> Record:
        """Return row `row`, with its signal decoded and normalised; CacheError if the signal is damaged."""
        fields, packed = self._fields(row), self.packed(row)
        if packed is None:
            return Record(**fields)
        try:
            return Record(**fields, signal=codec.decode(packed, len(fields["completion_ids"]), self._rules))
        except OtherVersionError:
            raise
        except CacheError as error:
            raise CacheError(f"row {fields['row_id']}: {error}") from error

    def records(self, rows: Sequence[int]) -> list[Record]:
        """Return these rows, in order, as `record` does, in less time."""
        fields, packed = [self._fields(row) for row in rows], [self.packed(row) for row in rows]
        there = [own for own in packed if own is not None]
        if len(there) < len(packed):
            return [self.record(row) for row in rows]
        try:
            signals = codec.decode_together(
                there, [len(own["completion_ids"]) for own in fields], self._rules
            )
        except CacheError:
            return [self.record(row) for row in rows]  # names the damaged row
        return [Record(**own, signal=signal) for own, signal in zip(fields, signals, strict=True)]

    def _fields(self, row: int) -> dict[str, Any]:
        """The plain columns of a row."""
        fields: dict[str, Any] = {name: values[row] for name, values in self._scalars.items()}
        fields |= dict.fromkeys(TOKEN_COLUMNS)
        for name, (offsets, values, is_valid) in self._lists.items():
            if is_valid[row]:
                fields[name] = values[offsets[row] : offsets[row + 1]].copy()
        return fields

    @cached_property
    def _scalars(self) -> dict[str, list[Any]]:
        return {name: self.batch.column(name).to_pylist() for name in SCALAR_COLUMNS}

    def packed(self, row: int) -> memoryview | None:
        """Return row `row`'s packed signal."""
        buffer = self.batch.column("signal")[row].as_buffer()
        return None if buffer is None else memoryview(buffer)


def read_batch(
    store: Store, record: CommitRecord, index: int, rules: Rules | None, check: bool = True
) -> BatchRows:
    """Read record batch `index` of a shard. CacheError on any damage, or unless record and rules hold.

    `check` verifies its digest first. Digests protect against accidents, not attackers, so the whole message
    is validated before use.
    """
    entry = record.batches[index]
    try:
        if check and (size := store.size(record.shard)) != record.shard_bytes:
            if size is None:
                raise FileNotFoundError
            raise damage(store, record, f"has {size} bytes, but its commit record says {record.shard_bytes}")
        message = store.read_range(record.shard, entry.offset, entry.num_bytes)
    except FileNotFoundError:
        raise damage(store, record, "is missing, though a commit record names it") from None
    digest = hashlib.sha256(message).hexdigest() if check else entry.sha256
    if digest != entry.sha256:
        first, end = record.row_edges[index : index + 2]
        problem = f"sha256 of record batch {index} (rows {first} to {end - 1}) is {digest[:8]}…"
        raise damage(store, record, f"{problem}, but its commit record says {entry.sha256[:8]}…")
    try:
        check_message(memoryview(message))
        batch = ipc.read_record_batch(message, SCHEMA)
        batch.validate(full=True)
        _check_columns(batch, record, index, rules)
        return BatchRows(batch, rules)
    except CacheError as error:
        raise damage(store, record, f"is not what was committed: {error}") from error
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise damage(store, record, f"cannot be read ({error})") from error


def _check_columns(batch: pa.RecordBatch, record: CommitRecord, index: int, rules: Rules | None) -> None:
    """Check the plain columns of all rows at once against the commit record and the format's ranges."""
    rows = slice(*record.row_edges[index : index + 2])
    if batch.num_rows != record.batches[index].num_rows:
        raise CacheError(
            f"record batch {index} has {batch.num_rows} rows; expected {record.batches[index].num_rows}"
        )
    is_scored = rules.kind != "none" if rules else batch.column("signal").null_count == 0
    for name in SCHEMA.names:
        expected = 0 if is_scored or name not in (*TEACHER_COLUMNS, "signal") else batch.num_rows
        if name != OPTIONAL_COLUMN and batch.column(name).null_count != expected:
            raise CacheError(f"column {name} has {batch.column(name).null_count} nulls; expected {expected}")
    policies = [record.policies[number] for number in record.policy_of_row[rows]]
    scalars = ("run_id", "policy_step", "policy_hash", "refresh_index")
    said = {name: [policy[i] for policy in policies] for i, name in enumerate(scalars)}
    said |= {"row_id": record.row_ids[rows], "prompt_id": record.prompt_ids[rows]}
    for name, values in said.items():
        if batch.column(name).to_pylist() != values:
            raise CacheError(f"column {name} differs from the commit record")
    for name in TOKEN_COLUMNS:
        if batch.column(name).null_count < batch.num_rows:
            counts = record.num_prompt_tokens if name == "prompt_ids" else record.num_completion_tokens
            _check_lists(name, batch.column(name), counts[rows], rules, record.row_ids[rows])


def _check_lists(
    name: str, column: pa.ListArray, counts: list[int], rules: Rules | None, row_ids: list[str]
) -> None:
    offsets = column.offsets.to_numpy()
    expected_lengths = np.where(column.is_valid().to_numpy(zero_copy_only=False), counts, 0)
    if column.values.null_count or not np.array_equal(np.diff(offsets), expected_lengths):
        raise CacheError(f"column {name} has other lengths than in the commit record")
    values = column.values.to_numpy()[offsets[0] : offsets[-1]]
    bad, expected = bad_values(name, values, rules) if rules else (np.zeros(0, bool), "")
    if bad.any():
        place = int(bad.argmax())
        row = int(np.searchsorted(offsets - offsets[0], place, side="right")) - 1
        position = place - int(offsets[row] - offsets[0])
        raise CacheError(f"row {row_ids[row]}: {name}[{position}] is {values[place]}; expected {expected}")


def damage(store: Store, record: CommitRecord, problem: str) -> CacheError:
    """Return the error for a shard that differs from what was committed."""
    return CacheError(f"{store.path(record.shard)} {problem}. {advice(record)}")


def advice(record: CommitRecord) -> str:
    """Return the remedy for a damaged shard."""
    gone = f"Delete it and commits/{record.name}"
    return f"{gone} and rerun stage one, which fills in its rows; other rows are kept."
