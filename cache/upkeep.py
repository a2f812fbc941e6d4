"""Prunes and merges caches.

Signals are copied in packed form. Both commands can be killed and rerun: a shard's replacement is committed
before the shard is removed, and readers see a duplicate row once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from cache import commit
from cache.commit import CommitRecord, explain_os_errors
from cache.fingerprint import load_fingerprint, store_fingerprint
from cache.heads import check_heads, head_digest, store_head, with_head_width
from cache.reader import Snapshot, open_cache
from cache.schema import CacheError, Rules
from cache.shard import OpenShard, read_batch
from cache.signals import needs_head
from cache.store import Root, Store, open_store

_CHUNK = 1 << 24
_IsDoomed: TypeAlias = Callable[[str, int, str], bool]  # run_id, policy_step, policy_hash


@dataclass
class Pruned:
    """Result of a prune: removed rows, their completion tokens, removed shards and freed bytes.

    In a dry run, `num_bytes` counts a partly pruned shard in proportion to its removed tokens.
    """

    rows: int = 0
    scored_tokens: int = 0
    shards: int = 0
    num_bytes: int = 0


def prune(
    root: Root,
    *,
    max_age: int | None = None,
    at_step: int | None = None,
    run_id: str | None = None,
    policies: Sequence[str] = (),
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Remove rows of the cache at `root` by one rule; with `dry_run` only count them.

    A partly pruned shard is rewritten under the same unit. Snapshots opened earlier lose the removed rows and
    must be refreshed. Stage one writes pruned rows again if asked for the same refresh.

    Args:
        max_age, at_step: remove rows of `run_id` that are more than `max_age` optimizer steps old at step
            `at_step`; rows of other runs have no age and stay.
        run_id: the run to which these steps belong; optional if all rows are of one run.
        policies: remove the rows of these policies, given by prefixes of `policy_hash`.
        max_bytes: remove whole shards, lowest policy step first, until the cache (`summary()["bytes"]`) fits.

    Raises CacheError unless there is exactly one rule, with runs and policies that the cache has.
    """
    snapshot = open_cache(root)
    plan = _plan(snapshot, max_age, at_step, run_id, policies, max_bytes)
    pruned, store = Pruned(), snapshot.store
    rules = with_head_width(store, snapshot.fingerprint.rules)
    named = Counter(record.shard for record in snapshot.commit_records())
    with explain_os_errors(snapshot.root, lambda: len(open_cache(root))):
        for record, stay in plan:
            gone = set(range(len(record.row_ids))).difference(stay)
            tokens = sum(record.num_completion_tokens[row] for row in gone)
            freed = record.num_bytes
            if stay and dry_run:
                freed = freed * tokens // sum(record.num_completion_tokens)
            elif stay:
                freed -= _rewrite(store, record, stay, rules).num_bytes
            named[record.shard] -= 1
            if not dry_run:
                store.remove(commit.record_path(record.name))
            if not dry_run and not named[record.shard]:  # shard names are never reused
                store.remove(record.shard)
            pruned.rows += len(gone)
            pruned.scored_tokens += tokens
            pruned.shards += not stay
            pruned.num_bytes += freed
    return pruned


def _plan(
    snapshot: Snapshot,
    max_age: int | None,
    at_step: int | None,
    run_id: str | None,
    policies: Sequence[str],
    max_bytes: int | None,
) -> list[tuple[CommitRecord, list[int]]]:
    """Return the shards that lose rows, each with the rows that stay."""
    if [max_age is not None, bool(policies), max_bytes is not None].count(True) != 1:
        raise CacheError("prune takes one rule: an age (with a step), policies, or a size.")
    if max_age is None and (at_step, run_id) != (None, None):
        raise CacheError(
            "at_step and run_id apply to max_age only; policies and sizes cover all runs. Nothing was"
            " removed."
        )
    if max_bytes is not None:
        return [(record, []) for record in _oldest(snapshot, max_bytes)]
    if max_age is not None:
        is_doomed = _too_old(snapshot, max_age, at_step, run_id)
    else:
        is_doomed = _of_policies(snapshot, policies)
    plan = []
    for record in snapshot.commit_records():
        doomed = [is_doomed(*policy[:3]) for policy in record.policies]
        stay = [row for row, policy in enumerate(record.policy_of_row) if not doomed[policy]]
        if len(stay) < len(record.row_ids):
            plan.append((record, stay))
    return plan


def _too_old(snapshot: Snapshot, max_age: int, at_step: int | None, run_id: str | None) -> _IsDoomed:
    if at_step is None or max_age < 0:
        raise CacheError("max_age must be at least 0 and needs at_step, the step at which ages are counted.")
    runs = sorted({policy[0] for record in snapshot.commit_records() for policy in record.policies})
    if run_id is None and len(runs) == 1:
        run_id = runs[0]
    if run_id not in runs:
        which = "at_step is a step of which run?" if run_id is None else f"there is no run {run_id}."
        raise CacheError(
            f"{snapshot.root}: {which} It holds rows of {', '.join(runs) or 'no run'}; set run_id to"
            " one of them."
        )
    return lambda run, step, _: run == run_id and at_step - step > max_age


def _of_policies(snapshot: Snapshot, policies: Sequence[str]) -> _IsDoomed:
    known = {policy[2] for record in snapshot.commit_records() for policy in record.policies}
    for policy in policies:
        found = [name for name in known if policy and name.startswith(policy)]
        if len(found) != 1:
            raise CacheError(
                f"{snapshot.root}: {len(found)} policies begin with {policy!r}; expected one (see `summary`)."
            )
    return lambda _run, _step, name: name.startswith(tuple(policies))


def _oldest(snapshot: Snapshot, max_bytes: int) -> list[CommitRecord]:
    """Return the oldest shards, whose removal reduces the cache to at most `max_bytes`."""
    records = snapshot.commit_records()
    left = snapshot.summary()["bytes"]
    beside = left - sum(record.num_bytes for record in records)
    if beside > max_bytes:
        raise CacheError(
            f"{snapshot.root} needs {beside:,} bytes even with no rows; max_bytes is {max_bytes:,}: raise"
            " max_bytes."
        )
    found = []
    for record in sorted(records, key=lambda r: (min(policy[1] for policy in r.policies), r.name)):
        if left <= max_bytes:
            break
        found.append(record)
        left -= record.num_bytes
    return found


def _rewrite(store: Store, record: CommitRecord, rows: list[int], rules: Rules) -> CommitRecord:
    """Commit some rows of a shard as a new shard, copying their packed signals."""
    shard = OpenShard(store)
    try:
        for index, (first, end) in enumerate(pairwise(record.row_edges)):
            batch = read_batch(store, record, index, rules)
            for row in sorted(set(rows).intersection(range(first, end))):
                shard.append(batch.record(row - first), batch.packed(row - first))
        stem = commit.file_stem(record.unit)
        new = shard.publish(record.unit, stem, record.fingerprint, record.head_sha256)
    finally:
        shard.discard()
    if not commit.write_record(store, new):  # an earlier prune got this far
        store.remove(new.shard)
    return new


@dataclass
class Merged:
    """Result of a merge.

    Attributes:
        shards, rows, num_bytes: copied; rows include those that the target already has in other shards.
        shards_there: shards that the target already had.
        differences: one sentence for each recorded field of a fingerprint that differs from the target's.
    """

    shards: int
    rows: int
    num_bytes: int
    shards_there: int
    differences: list[str]


def merge(target: Root, sources: Sequence[Root]) -> Merged:
    """Copy every committed shard of `sources` into the cache at `target`, creating it if needed.

    Shards are copied byte for byte under their own names and verified on the way. Readers see a row in
    several shards once. CacheError, before anything is written, unless all fingerprints and teacher heads
    match.
    """
    store = open_store(target)
    snapshots = [open_cache(source) for source in sources]
    if not snapshots or any(snapshot.root == store.root for snapshot in snapshots):
        raise CacheError(
            "merge copies one or more caches into another one; give sources that differ from the target."
        )
    first, heads = snapshots[0], _check_same_meaning(store, snapshots)
    with explain_os_errors(
        store.root, lambda: sum(len(record.row_ids) for record in commit.read_records(store, {}).values())
    ):
        store.check_create()
        text = _tokenizer_text(first)
        own = list(commit.read_records(store, {}).values())
        committed_as = next((record.fingerprint for record in own), None)
        if needs_head(first.fingerprint.rules.kind):
            check_heads(store, own, next(iter(heads), None))
        stored = store_fingerprint(store, first.fingerprint, text, committed_as)
        for snapshot in snapshots:
            if head_digest(store) is None and (head := snapshot.head()):
                store_head(store, head, own)
        there = set(commit.record_names(store))
        copied = []
        for snapshot in snapshots:
            for record in snapshot.commit_records():
                if record.name not in there and _copy(snapshot.store, store, record):
                    copied.append(record)
                there.add(record.name)
    differences = [
        text for snapshot in snapshots for text in stored.compare(snapshot.fingerprint, store.root)
    ]
    return Merged(
        shards=len(copied),
        rows=sum(len(record.row_ids) for record in copied),
        num_bytes=sum(record.num_bytes for record in copied),
        shards_there=sum(len(snapshot.commit_records()) for snapshot in snapshots) - len(copied),
        differences=list(dict.fromkeys(differences)),
    )


def _check_same_meaning(store: Store, snapshots: list[Snapshot]) -> set[str]:
    """The digests of the teacher heads, at most one; CacheError if the caches are incompatible."""
    known, first = load_fingerprint(store), snapshots[0]
    for snapshot in snapshots if known else snapshots[1:]:
        (known or first.fingerprint).compare(snapshot.fingerprint, store.root if known else first.root)
    heads = {digest for place in (store, *(s.store for s in snapshots)) if (digest := head_digest(place))}
    if len(heads) > 1:
        raise CacheError(
            "the caches hold different teacher heads, so their rows cannot share a cache; nothing was"
            " changed."
        )
    return heads


def _tokenizer_text(snapshot: Snapshot) -> str | None:
    path = snapshot.tokenizer_file()
    try:
        return path.read_bytes().decode() if path else None
    except UnicodeDecodeError as error:
        raise CacheError(f"{snapshot.store.path(commit.TOKENIZER)} is not UTF-8 text ({error}).") from error


def _copy(source: Store, target: Store, record: CommitRecord) -> bool:
    """Copy a shard and commit it; return False if another process did so meanwhile."""
    if target.size(record.shard) is not None and target.hash(record.shard) != record.shard_sha256:
        raise CacheError(
            f"{target.path(record.shard)} exists and differs from the file of this name in"
            f" {source.root}; it was not overwritten, and what was copied is kept. Move one of the two to a"
            " separate cache."
        )
    if source.size(record.shard) != record.shard_bytes:
        raise CacheError(
            f"{source.path(record.shard)} does not match its commit record, which names"
            f" {record.shard_bytes:,} bytes; run `dualkl cache verify` on that cache. What was copied is"
            " kept."
        )
    draft = target.draft(commit.SHARDS)
    try:
        for start in range(0, record.shard_bytes, _CHUNK):
            draft.write(
                memoryview(source.read_range(record.shard, start, min(_CHUNK, record.shard_bytes - start)))
            )
        if draft.sha256 != record.shard_sha256:
            raise CacheError(
                f"{source.path(record.shard)} is damaged: it does not match its commit"
                f" record (sha256 {draft.sha256[:8]}…, recorded {record.shard_sha256[:8]}…); run `dualkl"
                " cache verify` on that cache. What was copied is kept."
            )
        draft.publish(record.shard)
    finally:
        draft.discard()
    return commit.write_record(target, record)
