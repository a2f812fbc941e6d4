"""One shard, an Arrow IPC file: written with a digest per batch, read one verified batch at a time.

A batch is verified by digest before Arrow decodes it, and against commit record and fingerprint afterwards.
"""

from __future__ import annotations

import hashlib
import io
import secrets
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
    to_batch,
    wrong_value,
)
from cache.statistics import Statistics
from cache.store import Store

TOKENS_PER_BATCH = 8_192
SIGNAL_BYTES_PER_BATCH = 4 * 2**20  # a batch, the unit of random access, ends at either limit
_MAGIC_BYTES = 8


class OpenShard:
    """A shard being written as a draft; buffers at most one record batch of rows in memory."""

    def __init__(self, store: Store) -> None:
        self.row_ids: list[str] = []
        self.seen: set[str] = set()
        self._file = store.draft(SHARDS)
        self._sink = _Sink()
        self._ipc = ipc.new_file(self._sink, SCHEMA.with_metadata(_metadata()), options=_options())
        self._records: list[Record] = []
        self._signals: list[bytes | memoryview | None] = []
        self._tokens = self._signal_bytes = 0
        self._batches: list[BatchEntry] = []
        self._index = _RowIndex()

    def append(self, record: Record, signal: bytes | memoryview | None) -> None:
        self.row_ids.append(record.row_id)
        self.seen.add(record.row_id)
        self._index.add(record)
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
            row_ids=self.row_ids,
            head_sha256=head,
            **self._index.columns(),
        )

    def discard(self) -> None:
        self._file.discard()

    def _write_batch(self) -> None:
        first = not self._batches
        batch = to_batch(self._records, self._signals)
        self._ipc.write_batch(batch)
        self._index.add_signals(_stored_bytes(self._signals))
        data = self._sink.take()
        start = _schema_end(data) if first else 0
        message = memoryview(data)[start:]
        if batch.nbytes > most_bytes(len(message)):  # never for real rows; readers would refuse it
            raise CacheError(
                f"a record batch of {batch.nbytes:,} bytes packs to {len(message):,}, which no real rows do;"
                f" the one that begins with row {self._records[0].row_id} was not written."
            )
        digest = hashlib.sha256(message).hexdigest()
        self._batches.append(
            BatchEntry(self._file.num_bytes + start, len(message), len(self._records), digest)
        )
        self._file.write(data)
        self._records, self._signals, self._tokens, self._signal_bytes = [], [], 0, 0


class _Sink(io.RawIOBase):
    """Buffers Arrow's output; positions count from the start of the file."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self._position += len(self._parts[-1])
        return len(self._parts[-1])

    def take(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data


class _RowIndex:
    """Collects the commit record's per-row columns while rows are appended."""

    def __init__(self) -> None:
        self._policies: dict[tuple[Any, ...], int] = {}
        self._lists: dict[str, list[Any]] = {
            "policy_of_row": [],
            "prompt_ids": [],
            "num_prompt_tokens": [],
            "num_completion_tokens": [],
        }
        self._statistics = Statistics()

    def add_signals(self, num_bytes: int) -> None:
        self._statistics.signal_bytes += num_bytes

    def add(self, record: Record) -> None:
        policy = (record.run_id, record.policy_step, record.policy_hash, record.refresh_index)
        self._lists["policy_of_row"].append(self._policies.setdefault(policy, len(self._policies)))
        self._lists["prompt_ids"].append(record.prompt_id)
        self._lists["num_prompt_tokens"].append(len(record.prompt_ids))
        self._lists["num_completion_tokens"].append(len(record.completion_ids))
        self._statistics.add(record)

    def columns(self) -> dict[str, Any]:
        policies = [list(policy) for policy in self._policies]
        return {
            **self._lists,
            "policies": policies,
            "statistics_json": canonical_json(self._statistics.to_json()),
        }


def _metadata() -> dict[str, str]:
    return {
        "cache.format_version": str(FORMAT_VERSION),
        "cache.signal_codec_version": str(codec.CODEC_VERSION),
        "cache.description": "one row per rollout; logprobs, entropies and masses in nats; see FORMAT.md",
    }


def _stored_bytes(signals: list[bytes | memoryview | None]) -> int:
    """Return the bytes that a batch's signals take in the file: their buffer after Arrow's compression."""
    joined = b"".join(signal for signal in signals if signal is not None)
    return len(_arrow_codec().compress(joined)) if joined else 0


def _arrow_codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=3)


def _options() -> ipc.IpcWriteOptions:
    return ipc.IpcWriteOptions(compression=_arrow_codec(), use_threads=False)


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
        fields: dict[str, Any] = {name: self.batch.column(name)[row].as_py() for name in SCALAR_COLUMNS}
        fields |= dict.fromkeys(TOKEN_COLUMNS)
        for name, (offsets, values, is_valid) in self._lists.items():
            if is_valid[row]:
                fields[name] = values[offsets[row] : offsets[row + 1]].copy()
        packed = self.packed(row)
        if packed is None:
            return Record(**fields)
        try:
            return Record(**fields, signal=codec.decode(packed, len(fields["completion_ids"]), self._rules))
        except OtherVersionError:
            raise
        except CacheError as error:
            raise CacheError(f"row {fields['row_id']}: {error}") from error

    def packed(self, row: int) -> memoryview | None:
        """Return row `row`'s packed signal."""
        buffer = self.batch.column("signal")[row].as_buffer()
        return None if buffer is None else memoryview(buffer)


def read_batch(
    store: Store, record: CommitRecord, index: int, rules: Rules | None, check: bool = True
) -> BatchRows:
    """Read record batch `index` of a shard; `check` verifies its digest first. CacheError on any damage."""
    entry = record.batches[index]
    try:
        if check and (size := store.size(record.shard)) != record.shard_bytes:
            if size is None:
                raise FileNotFoundError
            raise damage(store, record, f"has {size} bytes, its commit record says {record.shard_bytes}")
        message = store.read_range(record.shard, entry.offset, entry.num_bytes)
    except FileNotFoundError:
        raise damage(store, record, "is missing, though a commit record names it") from None
    digest = hashlib.sha256(message).hexdigest() if check else entry.sha256
    if digest != entry.sha256:
        first = sum(batch.num_rows for batch in record.batches[:index])
        raise damage(
            store,
            record,
            f"sha256 of record batch {index} (rows {first} to {first + entry.num_rows - 1}) is"
            f" {digest[:8]}…, its commit record says {entry.sha256[:8]}…",
        )
    return decode_batch(store, record, index, message, rules)


def decode_batch(
    store: Store, record: CommitRecord, index: int, message: pa.Buffer, rules: Rules | None
) -> BatchRows:
    """Decode a message whose digest is correct. CacheError unless the rows match record and fingerprint.

    Digests protect against accidents, not attackers, so the whole message is validated before use.
    """
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
    first = sum(entry.num_rows for entry in record.batches[:index])
    rows = slice(first, first + record.batches[index].num_rows)
    if batch.num_rows != record.batches[index].num_rows:
        raise CacheError(
            f"record batch {index} has {batch.num_rows} rows, not {record.batches[index].num_rows}"
        )
    is_scored = rules.kind != "none" if rules else batch.column("signal").null_count == 0
    for name in SCHEMA.names:
        expected = 0 if is_scored or name not in (*TEACHER_COLUMNS, "signal") else batch.num_rows
        if name != OPTIONAL_COLUMN and batch.column(name).null_count != expected:
            raise CacheError(f"column {name} has {batch.column(name).null_count} nulls, not {expected}")
    policies = [record.policies[number] for number in record.policy_of_row[rows]]
    scalars = ("run_id", "policy_step", "policy_hash", "refresh_index")
    said = {name: [policy[i] for policy in policies] for i, name in enumerate(scalars)}
    said |= {"row_id": record.row_ids[rows], "prompt_id": record.prompt_ids[rows]}
    for name, values in said.items():
        if batch.column(name).to_pylist() != values:
            raise CacheError(f"column {name} is not what the commit record says")
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
        raise CacheError(f"column {name} has other lengths than the commit record says")
    values = column.values.to_numpy()[offsets[0] : offsets[-1]]
    if rules and (wrong := wrong_value(name, values, rules)):
        place, expected = wrong
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
