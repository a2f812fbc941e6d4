"""Withdraws damaged shards, so that stage one writes their rows again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path

from cache import commit
from cache.schema import CacheError
from cache.soundness import Finding


def withdraw(root: str | PathLike[str], findings: Iterable[Finding]) -> list[str]:
    """Removes the commit records that findings of `verify` name, then their shards; returns the records' names.

    Shards that another record names stay. Findings without a record (fingerprint, tokenizer, head, a file name) are
    faults that withdrawing rows does not mend: they change nothing.
    """
    path = Path(root)
    names = sorted({finding.record for finding in findings if finding.record is not None})
    shards = {_shard_of(path, name) for name in names}
    for name in names:
        commit.remove(path / commit.COMMITS / name)
    for shard in shards - {_shard_of(path, name) for name in commit.record_names(path)} - {None}:
        commit.remove(path / str(shard))
    return names


def _shard_of(root: Path, name: str) -> str | None:
    """The shard that a commit record names, or None where the record itself is damaged."""
    with suppress(CacheError, OSError):
        return commit.read_record(root, name).shard
    return None
