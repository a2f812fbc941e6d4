"""Withdraws damaged shards, so that stage one writes their rows again."""

from __future__ import annotations

import contextlib
from os import PathLike
from pathlib import Path

from cache import commit
from cache.schema import CacheError
from cache.soundness import Finding, verify


def repair(root: str | PathLike[str]) -> tuple[list[str], list[Finding]]:
    """Removes the commit record of every damaged shard, then the shard; rows of other shards are not touched.

    Returns the names of the withdrawn commit records, and what `verify` still finds (fingerprint, tokenizer, head:
    faults that withdrawing rows does not mend). CacheError where there is no cache.
    """
    path = Path(root)
    names = sorted({finding.record for finding in verify(path) if finding.record is not None})
    shards = [_shard_of(path, name) for name in names]
    for name in names:
        (path / commit.COMMITS / name).unlink(missing_ok=True)
    left = {_shard_of(path, name) for name in commit.record_names(path)}
    for shard in shards:
        if shard is not None and shard not in left:
            (path / shard).unlink(missing_ok=True)
    remaining = verify(path) if left or (path / commit.FINGERPRINT).exists() else []
    return names, remaining


def _shard_of(root: Path, name: str) -> str | None:
    """The shard that a commit record names, or None where the record itself is damaged."""
    with contextlib.suppress(CacheError, OSError):
        return commit.read_record(root, name).shard
    return None
