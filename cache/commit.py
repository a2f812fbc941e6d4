"""How data becomes part of a cache: sealed JSON and commit records.

The protocol is in FORMAT.md: a shard is published under a name of its own; then its commit record is created
exclusively, and that alone makes its rows exist.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from cache.schema import FORMAT_VERSION, CacheError
from cache.store import TEMPORARY, Store

COMMITS, SHARDS, HEADS = "commits", "shards", "heads"
FINGERPRINT, TOKENIZER, HEAD = "fingerprint.json", "tokenizer.json", "head.json"


def leftovers(store: Store, referenced: Iterable[str]) -> dict[str, int]:
    """Temporary files and shards without a commit record, with their bytes: of writers at work, or that died."""
    known = set(referenced)
    found = {}
    for folder in ("", COMMITS, SHARDS, HEADS):
        for file, size in store.sizes(folder).items():
            name = f"{folder}/{file}" if folder else file
            if file.startswith(TEMPORARY) or (folder == SHARDS and not file.startswith(".") and name not in known):
                found[name] = size
    return found


@contextmanager
def explain_os_errors(root: str, count_kept: Callable[[], int]) -> Iterator[None]:
    """Turns an OSError of a write into a CacheError that says what is kept and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "No space left on" if full else f"{error.strerror or error} while writing to"
        remedy = "free space" if full else "mend that"
        raise CacheError(f"{problem} {root}: {count_kept()} committed rows are kept; {remedy} and rerun.") from error


def canonical_json(value: Any) -> bytes:
    """The one form of a JSON value that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal(body: dict[str, Any]) -> bytes:
    """`body` as a JSON file that carries its own sha256."""
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    return canonical_json({**body, "sha256": digest}) + b"\n"


def unseal(path: str, data: bytes, advice: str) -> dict[str, Any]:
    """The body of a sealed JSON file; CacheError, naming `path` and ending in `advice`, unless every byte is right."""
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
        sealed = seal(body)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is not a sealed JSON file ({len(data)} bytes). {advice}") from error
    if sealed != data:
        actual = hashlib.sha256(canonical_json(body)).hexdigest()
        raise CacheError(f"{path}: its content has sha256 {actual[:8]}…, it says {str(digest)[:8]}…. {advice}")
    assert isinstance(body, dict)
    return body


@dataclass(frozen=True)
class BatchEntry:
    """Where a record batch's message lies in its shard (bytes), its rows and its sha256."""

    offset: int
    num_bytes: int
    num_rows: int
    sha256: str


@dataclass(frozen=True)
class CommitRecord:
    """What makes a shard exist: its digests, the identity of its rows (in shard order) and its statistics.

    `policies` are distinct (run_id, policy_step, policy_hash, refresh_index); `policy_of_row` points into them.
    """

    unit: str
    fingerprint: str
    shard: str
    shard_bytes: int
    shard_sha256: str
    batches: list[BatchEntry]
    policies: list[list[Any]]
    policy_of_row: list[int]
    row_ids: list[str]
    prompt_ids: list[str]
    num_prompt_tokens: list[int]
    num_completion_tokens: list[int]
    statistics: dict[str, Any]
    head_sha256: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """File name of this record: writers of the same rows under the same unit compete for it."""
        rows = hashlib.sha256("".join(sorted(self.row_ids)).encode()).hexdigest()
        return f"{file_stem(self.unit)}-{rows[:12]}.json"

    @property
    def num_bytes(self) -> int:
        """Bytes of the shard and of this record."""
        return self.shard_bytes + len(seal(asdict(self)))


def file_stem(unit: str) -> str:
    """A unit's name as part of a file name."""
    stem = quote(unit, safe=" +=@,")
    if not unit or len(stem) > 160 or stem.startswith("."):
        raise CacheError(f"the unit name {unit!r} cannot be a file name; expected 1 to 160 plain characters.")
    return stem


def write_record(store: Store, record: CommitRecord) -> bool:
    """Commits a published shard; says False if the same rows were committed first by another writer."""
    return store.create(record_path(record.name), seal(asdict(record)))


def record_path(name: str) -> str:
    return f"{COMMITS}/{name}"


def read_record(store: Store, name: str) -> CommitRecord:
    """The commit record of that file name; CacheError if it is damaged."""
    return _parse(store.path(record_path(name)), store.read(record_path(name)))


def _parse(path: str, data: bytes) -> CommitRecord:
    advice = "Delete it and rerun stage one, which fills in its rows; other committed rows are kept."
    body = unseal(path, data, advice)
    if body.get("format_version") != FORMAT_VERSION:
        version = body.get("format_version")
        raise CacheError(
            f"{path} has format version {version}, this program reads version {FORMAT_VERSION};"
            " read the cache with the program that wrote it."
        )
    try:
        return CommitRecord(**{**body, "batches": [BatchEntry(**entry) for entry in body["batches"]]})
    except (TypeError, KeyError) as error:
        raise CacheError(f"{path} is not a commit record ({error}). {advice}") from error


def read_records(store: Store, known: dict[str, CommitRecord]) -> dict[str, CommitRecord]:
    """All commit records by file name, in its order; those in `known` are not read again while their shard is there.

    Rows that were withdrawn and written again have the record's name of before and another shard.
    """
    found = record_names(store)
    shards = store.sizes(SHARDS) if known else {}
    kept = {name: known[name] for name in found if name in known and known[name].shard.split("/")[-1] in shards}
    missing = [name for name in found if name not in kept]
    for name, data in zip(missing, store.read_many([record_path(name) for name in missing]), strict=True):
        if data is not None:
            kept[name] = _parse(store.path(record_path(name)), data)
    return {name: kept[name] for name in found if name in kept}


def record_names(store: Store) -> list[str]:
    return [name for name in store.names(COMMITS) if name.endswith(".json")]
