"""Looks for damage: every digest, every row's invariants, every file that a commit record counts on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from cache import commit
from cache.codec import ROUNDING_NATS
from cache.commit import BatchEntry, CommitRecord
from cache.fingerprint import Fingerprint, load_fingerprint, tokenizer_digest
from cache.heads import head_digest, load_head
from cache.reader import BatchRows
from cache.schema import CacheError, check_record
from cache.shard import advice, read_batch
from cache.store import Root, Store, StoreError, open_store


@dataclass(frozen=True)
class Finding:
    """One fault, as text a sentence or two: what is wrong, where, and what to do.

    Attributes:
        file: the damaged file, relative to the cache.
        rows: first and last damaged row of a shard, where that is known.
        record: the commit record to withdraw so that stage one writes the rows again, if that is the remedy.
    """

    file: str
    message: str
    rows: tuple[int, int] | None = None
    record: str | None = None

    def __str__(self) -> str:
        return self.message


def verify(root: Root) -> list[Finding]:
    """All faults of the cache at `root`, empty if it is sound; damage never raises.

    CacheError only where there is no cache at all, or where the storage does not answer. Temporary files and shards
    without a commit record are no faults: readers ignore them.
    """
    store = open_store(root)
    record_names = commit.record_names(store)
    if store.size(commit.FINGERPRINT) is None and not record_names:
        raise CacheError(f"{store.root} holds no cache (no fingerprint.json); give the directory that stage one wrote.")
    findings = _collect(store, commit.FINGERPRINT, partial(_verify_fingerprint, store))
    fingerprint = None if findings else load_fingerprint(store)
    head_findings = _collect(store, commit.HEAD, partial(_verify_head, store))
    heads = set() if head_findings else {head_digest(store)}
    findings += head_findings
    for name in record_names:
        find = partial(_verify_commit, store, name, fingerprint, heads)
        findings += _collect(store, commit.record_path(name), find, name)
    return findings


def _collect(
    store: Store, file: str, find: Callable[[], Iterator[Finding]], record: str | None = None
) -> list[Finding]:
    """What `find` yields; what damage makes it raise becomes a finding too."""
    found: list[Finding] = []
    try:
        found.extend(find())
    except StoreError:  # tells nothing about the file
        raise
    except CacheError as error:
        found.append(Finding(file, str(error), record=record))
    except Exception as error:  # damage takes any form: a missing key, a file that is a folder, an Arrow error
        remedy = "Delete it and rerun stage one; other committed rows are kept."
        found.append(Finding(file, f"{store.path(file)} cannot be read ({error!r}). {remedy}", record=record))
    return found


def _verify_fingerprint(store: Store) -> Iterator[Finding]:
    fingerprint = load_fingerprint(store)
    if fingerprint is None:
        remedy = "Rerun stage one with the settings that wrote the cache: it writes it again."
        yield Finding(commit.FINGERPRINT, f"{store.path(commit.FINGERPRINT)} is missing. {remedy}")
        return
    expected = tokenizer_digest(store)
    actual = None if store.size(commit.TOKENIZER) is None else store.hash(commit.TOKENIZER)
    if expected is not None and actual != expected:
        state = "is missing" if actual is None else f"has sha256 {actual[:8]}…, fingerprint.json says {expected[:8]}…"
        remedy = "Put the tokenizer's tokenizer.json there; rows do not depend on it."
        yield Finding(commit.TOKENIZER, f"{store.path(commit.TOKENIZER)} {state}. {remedy}")


def _verify_head(store: Store) -> Iterator[Finding]:
    head = load_head(store)
    if head is not None and head.bias is not None and len(head.bias) != len(head.weight):
        yield Finding(commit.HEAD, f"{store.path(commit.HEAD)}: bias and weight of the head differ in length.")


def _verify_commit(
    store: Store, name: str, fingerprint: Fingerprint | None, heads: set[str | None]
) -> Iterator[Finding]:
    """Faults of one shard; `heads` holds the digest of the cache's head, or nothing where that is damaged itself."""
    record = commit.read_record(store, name)
    path = store.path(record.shard)
    if name != record.name:
        file = commit.record_path(name)
        yield Finding(file, f"{store.path(file)} should be called {record.name}; give it that name.")
    if fingerprint and record.fingerprint != fingerprint.digest:
        yield _foreign(path, record, commit.FINGERPRINT, "under another fingerprint")
    if heads and record.head_sha256 not in heads:
        yield _foreign(path, record, commit.HEAD, "with another teacher head")
    size = store.size(record.shard)
    if size is None:
        message = f"{path} is missing, though a commit record names it. {advice(record)}"
        yield Finding(record.shard, message, record=name)
        return
    actual = store.hash(record.shard)
    if actual != record.shard_sha256:
        problem = f"sha256 is {actual[:8]}…, its commit record says {record.shard_sha256[:8]}…"
        if size != record.shard_bytes:
            problem += f"; it has {size} bytes of {record.shard_bytes}"
        yield from _locate(store, record, problem)
    else:
        yield from _verify_rows(store, record, fingerprint)


def _foreign(path: str, record: CommitRecord, file: str, how: str) -> Finding:
    """A sound shard beside a file that is not the one it was written with: withdrawing it would lose rows for nothing."""
    remedy = f"Put the {file} of these rows back, or move the shard and its commit record to a cache of their own."
    return Finding(record.shard, f"{path} was written {how} than the cache's. {remedy}")


def _locate(store: Store, record: CommitRecord, problem: str) -> Iterator[Finding]:
    """Which record batches of a damaged shard are not what was committed."""
    path = store.path(record.shard)
    is_located = False
    for first, entry in _first_rows(record):
        message = store.read_range(record.shard, entry.offset, entry.num_bytes)
        if hashlib.sha256(message).hexdigest() != entry.sha256:
            is_located = True
            last = first + entry.num_rows - 1
            text = f"{path}: {problem}; rows {first} to {last} are damaged. {advice(record)}"
            yield Finding(record.shard, text, (first, last), record.name)
    if not is_located:
        text = f"{path}: {problem}; its rows are intact, the file's frame is not. {advice(record)}"
        yield Finding(record.shard, text, record=record.name)


def _first_rows(record: CommitRecord) -> Iterator[tuple[int, BatchEntry]]:
    first = 0
    for entry in record.batches:
        yield first, entry
        first += entry.num_rows


def _verify_rows(store: Store, record: CommitRecord, fingerprint: Fingerprint | None) -> Iterator[Finding]:
    """Decodes every row and checks it as the writer did."""
    finding = partial(Finding, record.shard, record=record.name)
    path = store.path(record.shard)
    found: list[str] = []
    for index in range(len(record.batches)):
        rows = BatchRows(read_batch(store, record, index))
        for row in range(rows.batch.num_rows):
            try:
                decoded = rows.record(row)
                if fingerprint:
                    check_record(decoded, fingerprint.rules, ROUNDING_NATS)
            except CacheError as error:
                yield finding(f"{path} row {len(found)}: {error} {advice(record)}", (len(found), len(found)))
            found.append(rows.batch["row_id"][row].as_py())
    if found != record.row_ids:
        yield finding(f"{path} holds other rows than its commit record names. {advice(record)}")
