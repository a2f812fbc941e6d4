"""Withdraws damaged shards, so that stage one writes their rows again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from cache import commit
from cache.schema import CacheError
from cache.soundness import Finding
from cache.store import Root, Store, open_store


def withdraw(root: Root, findings: Iterable[Finding]) -> list[str]:
    """Removes the commit records that findings of `verify` name, then their shards; returns the records' names.

    Shards that another record names stay. Findings without a record (fingerprint, tokenizer, head, a file name) are
    faults that withdrawing rows does not mend: they change nothing.
    """
    store = open_store(root)
    names = sorted({finding.record for finding in findings if finding.record is not None})
    shards = {_shard_of(store, name) for name in names}
    for name in names:
        store.remove(commit.record_path(name))
    for shard in shards - {_shard_of(store, name) for name in commit.record_names(store)} - {None}:
        store.remove(str(shard))
    return names


def _shard_of(store: Store, name: str) -> str | None:
    """The shard that a commit record names, or None where the record itself is damaged."""
    with suppress(CacheError, OSError):
        return commit.read_record(store, name).shard
    return None
