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

    Returns the records' names. Shards that another record names stay. Findings without a record (fingerprint,
    tokenizer, head, a file name, a machine that reads wrong) are faults that withdrawing rows does not mend: they change
    nothing.
    """
    store = open_store(root)
    names = sorted({finding.record for finding in findings if finding.record is not None})
    shards = {shard for name in names if (shard := _shard_of(store, name))}
    others = [name for name in commit.record_names(store) if name not in names] if shards else []
    shards -= {_shard_of(store, name) for name in others}  # read before anything is moved: it may fail
    for name in names:
        store.set_aside(commit.record_path(name))
    for shard in sorted(shards):
        store.set_aside(shard)
    return names


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
