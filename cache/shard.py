"""One shard as it is written: an Arrow IPC file, batch by batch, with a digest of each (`batch.py` reads them)."""

from __future__ import annotations

import hashlib
import io
import secrets
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from cache import codec
from cache.commit import SHARDS, BatchEntry, CommitRecord, canonical_json
from cache.message import most_bytes
from cache.schema import FORMAT_VERSION, SCHEMA, CacheError, Record, to_batch
from cache.statistics import Statistics
from cache.store import Store

TOKENS_PER_BATCH = 8_192
SIGNAL_BYTES_PER_BATCH = 4 * 2**20  # a batch, the unit of random access, ends at either bound
_MAGIC_BYTES = 8


class OpenShard:
    """A shard being written as a draft; rows wait in memory for at most one record batch."""

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
        """Completes the file, makes it durable under its final name, and returns the record that would commit it."""
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
        if batch.nbytes > most_bytes(len(message)):  # never of real rows, and readers refuse it
            raise CacheError(
                f"a record batch of {batch.nbytes:,} bytes packs to {len(message):,}, which no real rows do; the one"
                f" that begins with row {self._records[0].row_id} was not written."
            )
        digest = hashlib.sha256(message).hexdigest()
        self._batches.append(
            BatchEntry(self._file.num_bytes + start, len(message), len(self._records), digest)
        )
        self._file.write(data)
        self._records, self._signals, self._tokens, self._signal_bytes = [], [], 0, 0


class _Sink(io.RawIOBase):
    """Collects what Arrow writes until it is taken; positions count from the start of the file."""

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
    """What a commit record says about each row, gathered while rows are appended."""

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
    """What the signals of a batch take in the file: their buffer as Arrow compresses it."""
    joined = b"".join(signal for signal in signals if signal is not None)
    return len(_arrow_codec().compress(joined)) if joined else 0


def _arrow_codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=3)


def _options() -> ipc.IpcWriteOptions:
    return ipc.IpcWriteOptions(compression=_arrow_codec(), use_threads=False)


def _schema_end(data: bytes) -> int:
    """Where the schema message that opens an Arrow file ends: magic, continuation, length, that many bytes."""
    return _MAGIC_BYTES + 8 + int.from_bytes(data[12:16], "little")
