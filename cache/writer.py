"""Writer of a cache: validates rows as they are appended and commits them unit by unit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from cache import codec, commit
from cache.commit import CommitRecord, explain_os_errors
from cache.fingerprint import Fingerprint, store_fingerprint
from cache.heads import check_heads, head_digest, store_head
from cache.matrices import TeacherHead
from cache.schema import CacheError, Record
from cache.shard import OpenShard
from cache.signals import check_record, needs_head
from cache.store import Root, open_store

_QUICK_SECONDS = 0.1
_SHARE = 10  # slow listings take at most 1 / _SHARE of the time


@dataclass(frozen=True)
class CommitResult:
    """Result of a commit; all counts are 0 if other writers had committed every row.

    Attributes:
        rows: newly committed rows.
        scored_tokens: their completion tokens.
        num_bytes: bytes of the shard and of its commit record.
        signal_bytes: bytes of the packed signals in the shard.
        rows_left_out: appended rows already committed under any unit, and therefore not written.
    """

    unit: str
    rows: int
    scored_tokens: int
    num_bytes: int
    signal_bytes: int
    rows_left_out: int


class Writer:
    """Appends rows to the cache at `root` and commits them unit by unit; writers may share a cache.

    Creates the cache if there is none. CacheError if the fingerprint or teacher head does not match the
    cache's. Leaving the context after an exception drops uncommitted rows; leaving it normally with
    uncommitted rows is a caller's bug (AssertionError).

    Args:
        root: directory or fsspec URL of the cache.
        fingerprint: this writer's fingerprint.
        tokenizer_json: text of the tokenizer's tokenizer.json; the first writer's is kept in the cache.
        head: the teacher's head, required by a cache of hidden states before its first commit.

    Attributes:
        fingerprint: the cache's, as its first writer stored it.
        differences: one sentence for each recorded field in which this writer's fingerprint differs.
    """

    def __init__(
        self,
        root: Root,
        fingerprint: Fingerprint,
        tokenizer_json: str | None = None,
        head: TeacherHead | None = None,
    ) -> None:
        self.store = open_store(root)
        self.root = self.store.root
        self._shard: OpenShard | None = None
        self._left_out: set[str] = set()
        self._records: dict[str, CommitRecord] = {}
        self._committed: set[str] = set()
        self._look_again_at = 0.0
        with self._all_or_nothing():
            self.store.check_create()
            self._refresh()
            committed_as = next((record.fingerprint for record in self._records.values()), None)
            self.fingerprint = store_fingerprint(self.store, fingerprint, tokenizer_json, committed_as)
            self.differences = self.fingerprint.compare(fingerprint, self.root)
            self._head = self._checked_head(head)
            self.store.remove_stale(commit.leftovers(self.store, [r.shard for r in self._records.values()]))

    def _checked_head(self, head: TeacherHead | None) -> str | None:
        """Return the digest of the cache's head, storing `head` if it has none; CacheError on a mismatch."""
        records = self._records.values() if needs_head(self.fingerprint.rules.kind) else ()
        if head:
            return store_head(self.store, head, records)
        digest = head_digest(self.store)
        check_heads(self.store, records, digest)
        return digest

    @property
    def committed_ids(self) -> set[str]:
        """Return the ids of all committed rows, of any writer, as of opening or this writer's last commit."""
        return set(self._committed)

    def append(self, record: Record) -> None:
        """Add a row to the current unit; a row already committed is left out (see `commit`).

        CacheError, naming row, field and position, if the row violates an invariant of the format.
        """
        try:
            check_record(record, self.fingerprint.rules)
        except CacheError as error:
            raise CacheError(f"{error} The row was not written. This is a bug in the caller.") from None
        if record.row_id in self._left_out or (self._shard and record.row_id in self._shard.seen):
            raise CacheError(f"row {record.row_id} was appended twice to one unit; expected each row once.")
        if record.row_id in self._committed:
            self._left_out.add(record.row_id)
            return
        packed = None if record.signal is None else codec.encode(record.signal)
        with self._all_or_nothing():
            self._shard = self._shard or OpenShard(self.store)
            self._shard.append(record, packed)

    def commit(self, unit: str) -> CommitResult:
        """Commit the rows appended since the last commit, as one shard named after `unit`.

        The commit is atomic: all rows become visible at once or, if this raises or the process dies, none.
        Rows committed first by another unit or writer are not written twice; the result counts them.
        """
        stem, left_out = commit.file_stem(unit), len(self._left_out)
        if not self._num_pending:
            raise CacheError(f"unit {unit} has no rows; append at least one before its commit.")
        record, rows = None, list(self._shard.row_ids) if self._shard else []
        with self._all_or_nothing():
            if time.monotonic() >= self._look_again_at:
                self._refresh()
            if self._shard and not self._committed.issuperset(rows):
                record = self._publish(self._shard, unit, stem)
            self._drop()
            self._committed.update(rows)
        if record is None:
            return CommitResult(unit, 0, 0, 0, 0, left_out + len(rows))
        statistics = record.statistics
        tokens, signal_bytes = statistics["scored_tokens"], statistics["signal_bytes"]
        return CommitResult(unit, len(rows), tokens, record.num_bytes, signal_bytes, left_out)

    def _publish(self, shard: OpenShard, unit: str, stem: str) -> CommitRecord | None:
        """Return the commit record, or None if another writer committed the same rows first."""
        if needs_head(self.fingerprint.rules.kind) and self._head is None:
            raise CacheError(
                f"{self.root}: hidden states need the teacher's head; give it to the Writer and rerun."
            )
        record = shard.publish(unit, stem, self.fingerprint.digest, self._head)
        try:
            is_first = commit.write_record(self.store, record)
            if is_first and self.store.size(record.shard) is None:  # a writer that slept for a day in between
                self.store.remove(commit.record_path(record.name))
                raise CacheError(
                    f"{self.store.path(record.shard)} was removed before its rows could be committed;"
                    " none of them are. Rerun stage one, which writes them again."
                )
        except (
            OSError
        ):  # on a directory; on an object store a failed put may still arrive, so its shard stays
            if self.store.size(commit.record_path(record.name)) is None:
                self.store.remove(record.shard)
            raise
        if not is_first:
            self.store.remove(record.shard)
            return None
        self._records[record.name] = record
        return record

    @property
    def _num_pending(self) -> int:
        return len(self._left_out) + (len(self._shard.row_ids) if self._shard else 0)

    def _refresh(self) -> None:
        """Load what other writers have committed.

        Slow listings (10,000 records in a bucket take a second) are skipped at some commits, so that they
        take at most a tenth of the time. Rows written twice meanwhile are read once.
        """
        began = time.monotonic()
        known, self._records = (
            self._records,
            commit.read_records(self.store, self._records, checks_shards=False),
        )
        seconds = time.monotonic() - began
        self._look_again_at = began + (_SHARE * seconds if seconds > _QUICK_SECONDS else 0)
        if known.keys() - self._records.keys():
            known, self._committed = {}, set()
        for name in self._records.keys() - known.keys():
            self._committed.update(self._records[name].row_ids)

    def _drop(self) -> None:
        shard, self._shard = self._shard, None
        self._left_out = set()
        if shard:
            shard.discard()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Drop the current unit on any error; turn a failed write into a CacheError about what is kept."""
        try:
            with explain_os_errors(self.root, lambda: len(self._committed)):
                yield
        except BaseException:
            self._drop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        num_rows = self._num_pending
        self._drop()
        if kind is None and num_rows:
            raise AssertionError(
                f"{num_rows} appended rows were not committed; call commit(unit) before leaving."
            )
