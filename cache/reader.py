"""Reads committed rows through an immutable snapshot, opened from the commit records alone."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, SupportsIndex, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache import commit
from cache.commit import CommitRecord
from cache.fingerprint import Fingerprint, load_fingerprint, no_cache, tokenizer_problem
from cache.heads import check_heads, head_digest, load_head, with_head_width
from cache.matrices import TeacherHead
from cache.schema import SCHEMA, CacheError, Record, Rules
from cache.shard import BatchRows, read_batch
from cache.signals import needs_head
from cache.store import Root, Store, open_store
from cache.summary import summarise
from cache.verify import Finding, verify

Mapped: TypeAlias = Callable[[Callable[[tuple[int, int]], list[Record]], Iterable[tuple[int, int]]], Any]
BATCH_MEMORY_BYTES = 256 * 2**20
PLAIN_COLUMNS = tuple(name for name in SCHEMA.names if name != "signal")


@dataclass(frozen=True, eq=False)
class Place:
    """Rows of one record batch: batch number `batch` of a shard, and row numbers within it, in file order."""

    shard: CommitRecord
    batch: int
    rows: npt.NDArray[np.int64]


def open_cache(root: Root) -> Snapshot:
    """Return a snapshot of the rows committed at `root`, a directory or fsspec URL (`s3://bucket/folder`).

    CacheError if there is no cache, a commit record is damaged, rows were written under another fingerprint
    or teacher head, or the storage does not answer.
    """
    store = open_store(root)
    fingerprint = load_fingerprint(store)
    if fingerprint is None:
        raise no_cache(store)
    records = commit.read_records(store, {})
    return Snapshot(store, fingerprint, records, _Batches(store, with_head_width(store, fingerprint.rules)))


def exists(root: Root) -> bool:
    """Return whether `root` holds a cache: a writer has opened it, even if nothing is committed yet."""
    try:
        return open_store(root).size(commit.FINGERPRINT) is not None
    except NotADirectoryError:  # a file
        return False


class Snapshot(Sequence[Record]):
    """The rows committed when the snapshot was made, in row-id order. Immutable.

    If two units hold the same row (written concurrently with different plans), it is read from the one whose
    commit record's name sorts first.

    Attributes:
        root: directory or URL of the cache, as text.
        store: the cache's files.
        fingerprint: the cache's fingerprint.
    """

    def __init__(
        self, store: Store, fingerprint: Fingerprint, records: dict[str, CommitRecord], batches: _Batches
    ) -> None:
        self.store = store
        self.root = store.root
        self.fingerprint = fingerprint
        self._records = records
        self._batches = batches
        self._shards = list(records.values())
        digest = fingerprint.digest
        for record in self._shards:
            if record.fingerprint != digest:
                raise CacheError(
                    f"{store.path(record.shard)} was written under another fingerprint"
                    f" ({record.fingerprint[:8]}…) than the cache's ({digest[:8]}…); move it and"
                    f" commits/{record.name} out of this cache."
                )
        if self._shards and needs_head(fingerprint.rules.kind):
            check_heads(store, self._shards, head_digest(store))
        self._locate()

    def _locate(self) -> None:
        """Locate each row: `_shard_of`, an index into `_shards`, and `_row_of`, its row in that shard."""
        counts = [len(record.row_ids) for record in self._shards]
        ids = np.array([row_id for record in self._shards for row_id in record.row_ids], dtype="S32")
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        first = np.ones(len(ids), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        self._kept = order[first]
        self._ids = ordered[first]
        starts = np.cumsum([0, *counts])
        self._shard_of = np.repeat(np.arange(len(counts)), counts)[self._kept]
        self._row_of = self._kept - starts[self._shard_of]

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Record | list[Record]:
        """Return row `index` in row-id order, decoded (a slice: a list). CacheError on damaged bytes."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        shard, row = self._shards[self._shard_of[position]], int(self._row_of[position])
        batch = bisect_right(shard.row_edges, row) - 1
        return self._batches.get(shard, batch).record(row - shard.row_edges[batch])

    def take(self, positions: Sequence[int], mapped: Mapped = map) -> list[Record]:
        """Return the rows at these positions, in order, as `self[i]` does, in less time.

        `mapped`: `map`, or that of a pool of threads, which then decode record batches in parallel.
        """
        places: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for number, position in enumerate(positions):
            shard = int(self._shard_of[position])
            edges, row = self._shards[shard].row_edges, int(self._row_of[position])
            batch = bisect_right(edges, row) - 1
            numbers, rows = places.setdefault((shard, batch), ([], []))
            numbers.append(number)
            rows.append(row - edges[batch])

        def read(place: tuple[int, int]) -> list[Record]:
            return self._batches.get(self._shards[place[0]], place[1]).records(places[place][1])

        found: dict[int, Record] = {}
        for (numbers, _), records in zip(places.values(), mapped(read, places), strict=True):
            found |= dict(zip(numbers, records, strict=True))
        return [found[number] for number in range(len(positions))]

    @cached_property
    def row_ids(self) -> list[str]:
        """Ids of all rows, sorted."""
        return [row_id.decode() for row_id in self._ids.tolist()]

    def position(self, row_id: str) -> int:
        """Return the index of a row. CacheError if this snapshot has no such row."""
        index = int(np.searchsorted(self._ids, row_id.encode()))
        if index == len(self) or self._ids[index].decode() != row_id:
            raise CacheError(f"{self.root} has no row {row_id} among its {len(self)} committed rows.")
        return index

    @cached_property
    def index(self) -> pa.Table:
        """One entry per committed row, in row-id order, from the commit records alone."""
        rows: dict[str, list[Any]] = {name: [] for name in _INDEX_SCHEMA.names}
        for record in self._shards:
            policies = list(zip(*(record.policies[i] for i in record.policy_of_row), strict=True))
            for name, values in zip(_POLICY_COLUMNS, policies, strict=True):
                rows[name].extend(values)
            rows["row_id"] += record.row_ids
            rows["prompt_id"] += record.prompt_ids
            rows["num_prompt_tokens"] += record.num_prompt_tokens
            rows["num_completion_tokens"] += record.num_completion_tokens
            rows["unit"] += [record.unit] * len(record.row_ids)
        return pa.table(rows, schema=_INDEX_SCHEMA).take(pa.array(self._kept))

    def places(self) -> list[Place]:
        """Return the location of every row once, as record batches ordered by their lowest row id."""
        rows: dict[tuple[int, int], list[int]] = {}  # by shard and batch, in order of the lowest row id
        for shard, row in zip(self._shard_of.tolist(), self._row_of.tolist(), strict=True):
            edges = self._shards[shard].row_edges
            batch = bisect_right(edges, row) - 1
            rows.setdefault((shard, batch), []).append(row - edges[batch])
        return [Place(self._shards[s], b, np.sort(np.array(own, np.int64))) for (s, b), own in rows.items()]

    def read_place(self, place: Place) -> list[Record]:
        """Return the decoded rows of a place, without caching the batch. CacheError on damaged bytes."""
        return self._batches.read(place.shard, place.batch).records(place.rows.tolist())

    def read_columns(self, place: Place, columns: Sequence[str]) -> pa.Table:
        """Return plain columns of a place's rows, without caching the batch. CacheError on damaged bytes."""
        batch = self._batches.read(place.shard, place.batch).batch
        return pa.Table.from_batches([batch.select(list(columns))]).take(pa.array(place.rows))

    def head(self) -> TeacherHead | None:
        """Return the teacher's head, memory-mapped and verified; None if the cache has none."""
        return load_head(self.store)

    def tokenizer_file(self) -> Path | None:
        """Return a local tokenizer.json for `tokenizers`; None if the cache has none or has lost it.

        CacheError if it is not the one that the cache was created with.
        """
        if self.store.size(commit.TOKENIZER) is None or self.fingerprint.tokenizer_sha256 is None:
            return None
        if problem := tokenizer_problem(self.store, self.fingerprint):
            raise CacheError(problem)
        return self.store.local_copy(commit.TOKENIZER)

    def refresh(self) -> Snapshot:
        """Return a newer snapshot that shares everything already read and checked."""
        return Snapshot(
            self.store, self.fingerprint, commit.read_records(self.store, self._records), self._batches
        )

    def commit_records(self) -> list[CommitRecord]:
        """Return the commit record of each shard, sorted by file name."""
        return list(self._shards)

    def shard_paths(self) -> list[str]:
        """Return the paths or URLs of the committed shards, in the order of `commit_records`.

        For other Arrow readers. They check no digests, and see a row twice if two units hold it.
        """
        return [self.store.path(record.shard) for record in self._shards]

    def summary(self) -> dict[str, Any]:
        """Return counts, bytes, policies and quantiles as plain JSON (`cache.summary`); reads no shard."""
        return summarise(self.store, self.fingerprint, self._shards, self.index)

    def verify(self) -> list[Finding]:
        """Return every fault of the cache as it is now (`cache.verify`), empty if sound.

        Damage never raises.
        """
        return verify(self.store)

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Load columns of all rows, in row-id order; by default all plain ones.

        `signal` is the packed signal.
        """
        names = list(PLAIN_COLUMNS if columns is None else columns)
        unknown = [name for name in names if name not in SCHEMA.names]
        if unknown:
            raise CacheError(f"the cache has no column {unknown[0]}; it has {', '.join(SCHEMA.names)}.")
        parts = [
            self._batches.get(record, index).batch.select(names)
            for record in self._shards
            for index in range(len(record.batches))
        ]
        schema = pa.schema([SCHEMA.field(name) for name in names])
        return pa.Table.from_batches(parts, schema).take(pa.array(self._kept))


_POLICY_COLUMNS = ("run_id", "policy_step", "policy_hash", "refresh_index")
_INDEX_SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "run_id": pa.string(),
        "policy_step": pa.int64(),
        "policy_hash": pa.string(),
        "refresh_index": pa.int32(),
        "prompt_id": pa.string(),
        "num_prompt_tokens": pa.int32(),
        "num_completion_tokens": pa.int32(),
        "unit": pa.string(),
    }
)


class _Batches:
    """Verified record batches, with an LRU cache of `BATCH_MEMORY_BYTES` bytes."""

    def __init__(self, store: Store, rules: Rules) -> None:
        self._store = store
        self._rules = rules
        self._kept: OrderedDict[tuple[str, int], BatchRows] = OrderedDict()
        self._checked: set[tuple[str, int]] = set()
        self._num_bytes = 0
        self._lock = Lock()

    def get(self, record: CommitRecord, index: int) -> BatchRows:
        key = (record.shard, index)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        rows = self.read(record, index)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = rows
                self._num_bytes += rows.batch.nbytes
            while self._num_bytes > BATCH_MEMORY_BYTES and len(self._kept) > 1:
                self._num_bytes -= self._kept.popitem(last=False)[1].batch.nbytes
        return rows

    def read(self, record: CommitRecord, index: int) -> BatchRows:
        """Read a batch that is not cached; its digest is checked on the first read."""
        key = (record.shard, index)
        rows = read_batch(self._store, record, index, self._rules, check=key not in self._checked)
        with self._lock:
            self._checked.add(key)
        return rows
