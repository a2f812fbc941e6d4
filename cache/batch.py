"""Record batches as they are read: checked by digest, before and after Arrow decodes them, and against their record."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from cache import codec
from cache.commit import CommitRecord
from cache.message import check_message
from cache.schema import (
    SCALAR_COLUMNS,
    SCHEMA,
    TEACHER_COLUMNS,
    TOKEN_COLUMNS,
    Array,
    CacheError,
    Record,
    Rules,
    wrong_value,
)
from cache.store import Store


class BatchRows:
    """A record batch as rows: each decoded when asked for.

    What one row is takes no more memory than its record, the fingerprint (`rules`) and its stored bytes allow.
    """

    def __init__(self, batch: pa.RecordBatch, rules: Rules | None) -> None:
        self.batch = batch
        self._rules = rules
        self._lists: dict[str, tuple[Array, Array]] = {}
        for name in TOKEN_COLUMNS:
            column = batch.column(name)
            if column.null_count == 0:
                self._lists[name] = (column.offsets.to_numpy(), column.values.to_numpy())

    def record(self, row: int) -> Record:
        """Row `row` of the batch, its signal decoded and normalised. CacheError if the signal is damaged."""
        fields: dict[str, Any] = {name: self.batch.column(name)[row].as_py() for name in SCALAR_COLUMNS}
        fields |= {
            name: values[offsets[row] : offsets[row + 1]].copy()
            for name, (offsets, values) in self._lists.items()
        }
        packed = self.packed(row)
        if packed is None:
            return Record(**fields)
        try:
            return Record(**fields, signal=codec.decode(packed, len(fields["completion_ids"]), self._rules))
        except CacheError as error:
            raise CacheError(f"row {fields['row_id']}: {error}") from error

    def packed(self, row: int) -> memoryview | None:
        """The signal of row `row` as it is stored."""
        buffer = self.batch.column("signal")[row].as_buffer()
        return None if buffer is None else memoryview(buffer)


def read_batch(
    store: Store, record: CommitRecord, index: int, rules: Rules | None, check: bool = True
) -> BatchRows:
    """Record batch `index` of a shard; with `check` its digest is compared first. CacheError on any damage."""
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
    """The rows of a message whose digest is right. CacheError unless it holds what record and fingerprint say.

    Digests protect against accidents, not people: nothing of the message is used before it is found to hold together.
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
    """The columns beside the signal, all rows at once: what the record says of them, and the format's ranges."""
    first = sum(entry.num_rows for entry in record.batches[:index])
    rows = slice(first, first + record.batches[index].num_rows)
    if batch.num_rows != record.batches[index].num_rows:
        raise CacheError(
            f"record batch {index} has {batch.num_rows} rows, not {record.batches[index].num_rows}"
        )
    is_scored = rules.kind != "none" if rules else batch.column("signal").null_count == 0
    for name in SCHEMA.names:
        expected = 0 if is_scored or name not in (*TEACHER_COLUMNS, "signal") else batch.num_rows
        if batch.column(name).null_count != expected:
            raise CacheError(f"column {name} has {batch.column(name).null_count} nulls, not {expected}")
    policies = [record.policies[number] for number in record.policy_of_row[rows]]
    scalars = ("run_id", "policy_step", "policy_hash", "refresh_index")
    said = {name: [policy[i] for policy in policies] for i, name in enumerate(scalars)}
    said |= {"row_id": record.row_ids[rows], "prompt_id": record.prompt_ids[rows]}
    for name, values in said.items():
        if batch.column(name).to_pylist() != values:
            raise CacheError(f"column {name} is not what the commit record says")
    for name in TOKEN_COLUMNS:
        if batch.column(name).null_count == 0:
            counts = record.num_prompt_tokens if name == "prompt_ids" else record.num_completion_tokens
            _check_lists(name, batch.column(name), counts[rows], rules, record.row_ids[rows])


def _check_lists(
    name: str, column: pa.ListArray, counts: list[int], rules: Rules | None, row_ids: list[str]
) -> None:
    offsets = column.offsets.to_numpy()
    if column.values.null_count or not np.array_equal(np.diff(offsets), counts):
        raise CacheError(f"column {name} has other lengths than the commit record says")
    values = column.values.to_numpy()[offsets[0] : offsets[-1]]
    if rules and (wrong := wrong_value(name, values, rules)):
        place, expected = wrong
        row = int(np.searchsorted(offsets - offsets[0], place, side="right")) - 1
        position = place - int(offsets[row] - offsets[0])
        raise CacheError(f"row {row_ids[row]}: {name}[{position}] is {values[place]}; expected {expected}")


def damage(store: Store, record: CommitRecord, problem: str) -> CacheError:
    """The error of a shard that is not what was committed."""
    return CacheError(f"{store.path(record.shard)} {problem}. {advice(record)}")


def advice(record: CommitRecord) -> str:
    """What to do about a damaged shard."""
    return f"Delete it and commits/{record.name} and rerun stage one, which fills in its rows; other rows are kept."
