"""Withdraws damaged shards, so that stage one writes their rows again. Nothing is deleted: both files are moved aside."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cache import commit
from cache.schema import CacheError
from cache.soundness import Finding
from cache.store import Root, Store, StoreError, open_store

_NAMED_SHARD = re.compile(f'"shard":"({commit.SHARD_NAME.pattern})"'.encode())


def withdraw(root: Root, findings: Iterable[Finding]) -> list[str]:
    """Moves the commit records that findings of `verify` name, then their shards, to the folder `withdrawn`.

    Returns what it moved. Shards that another record names stay. Findings without a record (fingerprint, tokenizer, head,
    a file name, a machine that reads wrong) are faults that withdrawing rows does not mend: they change nothing.
    """
    store = open_store(root)
    names = sorted({finding.record for finding in findings if finding.record is not None})
    there = [f"{commit.SHARDS}/{file}" for file in store.names(commit.SHARDS)] if names else []
    shards = {shard for name in names for shard in _shards_of(store, name, there)}
    others = [name for name in commit.record_names(store) if name not in names] if shards else []
    shards -= {_shard_of(store, name) for name in others}  # read before anything is moved: it may fail
    moved = [*map(commit.record_path, names), *sorted(shards)]
    for file in moved:
        store.set_aside(file)
    return moved


def _shards_of(store: Store, name: str, there: list[str]) -> list[str]:
    """The shard that a record names, of those that are `there`; else all that were written for its unit.

    Left where it is, a shard that only a damaged record named would be removed as a leftover.
    """
    named, stem = _shard_of(store, name), f"{commit.SHARDS}/{name.rpartition('-')[0]}"
    if named in there:
        return [named]
    return [
        shard for shard in there if commit.SHARD_NAME.fullmatch(shard) and shard.rsplit("-", 2)[0] == stem
    ]


def _shard_of(store: Store, name: str) -> str | None:
    """The shard that a commit record names, a damaged one too, where that can still be read in it."""
    try:
        data = store.read(commit.record_path(name))
    except StoreError:
        raise
    except (CacheError, FileNotFoundError):
        return None
    found = _NAMED_SHARD.search(data)
    return found[1].decode() if found else None
