"""Finds and withdraws damage: checks every digest, row invariant and file that a commit record needs.

Nothing is deleted: a damaged shard and its commit record move to `withdrawn/`, and stage one rewrites the
rows.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from cache import commit
from cache.commit import CommitRecord
from cache.fingerprint import Fingerprint, load_fingerprint, no_cache, tokenizer_problem
from cache.heads import head_digest, load_head, with_head_width
from cache.plain import plain
from cache.schema import CacheError, OtherVersionError, Rules
from cache.shard import advice, read_batch
from cache.signals import check_record
from cache.store import Root, Store, StoreError, open_store

_NAMED_SHARD = re.compile(f'"shard":"({commit.SHARD_NAME.pattern})"'.encode())


@dataclass(frozen=True)
class Finding:
    """One fault, described in a sentence or two: what is wrong, where, and what to do.

    Attributes:
        file: the damaged file, relative to the cache.
        rows: first and last damaged row of a shard, if known.
        record: the commit record to withdraw so that stage one rewrites the rows, if that is the remedy.
    """

    file: str
    message: str
    rows: tuple[int, int] | None = None
    record: str | None = None

    def __str__(self) -> str:
        return plain(self.message)


def verify(root: Root) -> list[Finding]:
    """Return all faults of the cache at `root`, empty if it is sound. Damage never raises.

    Anything that looks damaged is read a second time. If the second read is correct, the finding blames the
    machine and costs no rows. Shards are checked in parallel, one thread per CPU. Temporary files and shards
    without a commit record are not faults, because readers ignore them. CacheError only if there is no cache
    or the storage fails.
    """
    store = open_store(root)
    record_names = commit.record_names(store)
    if store.size(commit.FINGERPRINT) is None and not record_names:
        raise no_cache(store)
    findings = _look(store, commit.FINGERPRINT, partial(_verify_fingerprint, store))
    fingerprint = None if findings else load_fingerprint(store)
    if fingerprint is not None:
        findings += _look(store, commit.TOKENIZER, partial(_verify_tokenizer, store, fingerprint))
    head_findings = _look(store, commit.HEAD, partial(_verify_head, store))
    findings += head_findings
    heads = [] if head_findings else [head_digest(store)]
    digest, rules = (fingerprint.digest, fingerprint.rules) if fingerprint else (None, None)
    if rules and heads:
        rules = with_head_width(store, rules)

    def look(name: str) -> list[Finding]:
        find = partial(_verify_commit, store, name, digest, rules, heads)
        return _look(store, commit.record_path(name), find, name)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(look, record_names):
            findings += found
    return findings


def _look(
    store: Store, file: str, find: Callable[[], Iterator[Finding]], record: str | None = None
) -> list[Finding]:
    """The findings of `find` if two runs both report some; a single bad read is not damage."""
    if not _collect(store, file, find, record):
        return []
    found = _collect(store, file, find, record)
    if found and record is not None and store.size(commit.record_path(record)) is None:
        return []  # withdrawn meanwhile
    if found:
        return found
    path = store.path(file)
    text = f"{path}: it, or a file that it names, failed to verify once but passed on re-read"
    return [Finding(file, f"{text}. Nothing is damaged; check this machine's memory, disk and network.")]


def _collect(
    store: Store, file: str, find: Callable[[], Iterator[Finding]], record: str | None = None
) -> list[Finding]:
    """Collect what `find` yields; errors caused by damage become findings."""
    found: list[Finding] = []
    try:
        found.extend(find())
    except (StoreError, OtherVersionError):  # says nothing about the file
        raise
    except commit.Misnamed as error:
        found.append(Finding(file, str(error)))
    except CacheError as error:
        found.append(Finding(file, str(error), record=record))
    except FileNotFoundError:
        remedy = "Rerun stage one, which writes what is missing; other committed rows are kept."
        found.append(Finding(file, f"{store.path(file)} is missing. {remedy}", record=record))
    return found


def _verify_fingerprint(store: Store) -> Iterator[Finding]:
    if load_fingerprint(store) is None:
        remedy = "Rerun stage one with the settings that wrote the cache, which restores it."
        yield Finding(commit.FINGERPRINT, f"{store.path(commit.FINGERPRINT)} is missing. {remedy}")


def _verify_tokenizer(store: Store, fingerprint: Fingerprint) -> Iterator[Finding]:
    if problem := tokenizer_problem(store, fingerprint):
        yield Finding(commit.TOKENIZER, problem)


def _verify_head(store: Store) -> Iterator[Finding]:
    load_head(store)
    return iter(())


def _verify_commit(
    store: Store, name: str, fingerprint: str | None, rules: Rules | None, heads: list[str | None]
) -> Iterator[Finding]:
    """Yield the faults of one shard.

    `fingerprint` is None, and `heads` empty, if that file is itself damaged.
    """
    record = commit.read_record(store, name)
    path = store.path(record.shard)
    _ = record.statistics  # decoded and checked here
    if fingerprint not in (None, record.fingerprint):
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
        yield from _verify_rows(store, record, rules)


def _foreign(path: str, record: CommitRecord, file: str, how: str) -> Finding:
    """A sound shard next to a wrong `file`. Withdrawing it would only lose rows, so no record is named."""
    remedy = f"Restore the {file} of these rows, or move the shard and its commit record to a separate cache."
    return Finding(record.shard, f"{path} was written {how} than the cache's. {remedy}")


def _locate(store: Store, record: CommitRecord, problem: str) -> Iterator[Finding]:
    """Yield the damaged record batches of a shard."""
    path = store.path(record.shard)
    is_located = False
    for entry, (first, end) in zip(record.batches, pairwise(record.row_edges), strict=True):
        message = store.read_range(record.shard, entry.offset, entry.num_bytes)
        if hashlib.sha256(message).hexdigest() != entry.sha256:
            is_located, last = True, end - 1
            text = f"{path}: {problem}; rows {first} to {last} are damaged. {advice(record)}"
            yield Finding(record.shard, text, (first, last), record.name)
    if not is_located:
        text = f"{path}: {problem}; its rows are intact, but the bytes around them are not. {advice(record)}"
        yield Finding(record.shard, text, record=record.name)


def _verify_rows(store: Store, record: CommitRecord, rules: Rules | None) -> Iterator[Finding]:
    """Decode every row and apply the writer's checks."""
    path = store.path(record.shard)
    for index, (first, end) in enumerate(pairwise(record.row_edges)):
        try:
            rows = read_batch(store, record, index, rules)
        except StoreError:
            raise
        except CacheError as error:
            yield Finding(record.shard, str(error), (first, end - 1), record.name)
            continue
        for number in range(first, end):
            try:
                decoded = rows.record(number - first)
                if rules is not None:
                    check_record(decoded, rules, packed=True)
            except OtherVersionError:
                raise
            except CacheError as error:
                text = f"{path} row {number}: {error} {advice(record)}"
                yield Finding(record.shard, text, (number, number), record.name)


def withdraw(root: Root, findings: Iterable[Finding]) -> list[str]:
    """Move the commit records named in `findings`, then their shards, to `withdrawn/`; return their names.

    Shards named by other records stay. Findings without a record (fingerprint, tokenizer, head, a file name,
    a machine with read errors) are ignored: withdrawing rows would not fix them.
    """
    store = open_store(root)
    names = sorted({finding.record for finding in findings if finding.record is not None})
    there = [f"{commit.SHARDS}/{file}" for file in store.names(commit.SHARDS)] if names else []
    shards = {shard for name in names for shard in _shards_of(store, name, there)}
    others = [name for name in commit.record_names(store) if name not in names] if shards else []
    shards -= {_shard_of(store, name) for name in others}  # read before moving anything: it may fail
    moved = [*map(commit.record_path, names), *sorted(shards)]
    for file in moved:
        store.set_aside(file)
    return moved


def _shards_of(store: Store, name: str, there: list[str]) -> list[str]:
    """Return the shard named by a record if it is in `there`, else every shard written for its unit.

    If a shard named only by a damaged record stayed, a writer would later remove it as a leftover.
    """
    named, stem = _shard_of(store, name), f"{commit.SHARDS}/{name.rpartition('-')[0]}"
    if named in there:
        return [named]
    return [
        shard for shard in there if commit.SHARD_NAME.fullmatch(shard) and shard.rsplit("-", 2)[0] == stem
    ]


def _shard_of(store: Store, name: str) -> str | None:
    """Return the shard named by a commit record, if still readable; the record may be damaged."""
    try:
        data = store.read(commit.record_path(name))
    except StoreError:
        raise
    except (CacheError, FileNotFoundError):
        return None
    found = _NAMED_SHARD.search(data)
    return found[1].decode() if found else None
