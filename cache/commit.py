"""The commit protocol: sealed JSON files and commit records.

See FORMAT.md. A shard is published under a unique name. Its rows exist once its commit record has been
created, exclusively.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any
from urllib.parse import quote

from cache.schema import FORMAT_VERSION, CacheError
from cache.statistics import check_statistics
from cache.store import MOST_BYTES_READ, TEMPORARY_NAME, Store

COMMITS, SHARDS, HEADS = "commits", "shards", "heads"
FINGERPRINT, TOKENIZER, HEAD = "fingerprint.json", "tokenizer.json", "head.json"
SHARD_NAME = re.compile(r"shards/(?!\.)[A-Za-z0-9_.~ +=@,%-]{1,160}-[0-9a-f]{12}-[0-9a-f]{8}\.arrow")
DIGEST = re.compile("[0-9a-f]{64}")
_ROW_IDS = re.compile("(?:[0-9a-f]{32})+")
_ADVICE = "Delete it and rerun stage one, which fills in its rows; other committed rows are kept."
_MOST = 2**63


def leftovers(store: Store, referenced: Iterable[str]) -> dict[str, int]:
    """Return temporary files and uncommitted shards, with sizes in bytes, of running or crashed writers.

    Files whose names do not match this format are foreign and not listed.
    """
    known = set(referenced)
    found = {}
    for folder in ("", COMMITS, SHARDS, HEADS):
        for file, size in store.sizes(folder).items():
            name = f"{folder}/{file}" if folder else file
            if TEMPORARY_NAME.fullmatch(file) or (SHARD_NAME.fullmatch(name) and name not in known):
                found[name] = size
    return found


@contextmanager
def explain_os_errors(root: str, count_kept: Callable[[], int]) -> Iterator[None]:
    """Turn an OSError during a write into a CacheError that states what is kept and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "No space left on" if full else f"{error.strerror or error} while writing to"
        remedy = "free space" if full else "fix that"
        raise CacheError(
            f"{problem} {root}: {count_kept()} committed rows are kept; {remedy} and rerun."
        ) from error


def canonical_json(value: Any) -> bytes:
    """Return a JSON value in canonical form, the input of digests."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def seal(body: dict[str, Any]) -> bytes:
    """Return `body` as a JSON file that contains its own sha256."""
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    return canonical_json({**body, "sha256": digest}) + b"\n"


_MOST_VALUES = 1_000_000


def unseal(path: str, data: bytes, advice: str, *, apart: str = "", before: str = "") -> dict[str, Any]:
    """Return the body of a sealed JSON file.

    CacheError, naming `path` and ending in `advice`, unless every byte is correct. The digest covers the
    file's own bytes without the seal, so nothing is serialised again. The value of key `apart`, which
    precedes the last key `before`, is returned undecoded, as bytes under `<apart>_json`.
    """
    text, start, end = data, data.find(f',"{apart}":'.encode()), data.rfind(f',"{before}":'.encode())
    if apart and 0 <= start < end:
        text = data[:start] + data[end:]
    try:
        if text.count(b"{") + text.count(b"[") > _MOST_VALUES:
            raise ValueError("more objects than any writer makes")
        body = _DECODER.decode(text.decode())
        digest = body.pop("sha256")
        seal_in_order = f'"sha256":"{digest}"'.encode()
        if b"\\u" in text:  # reject escaped surrogates
            canonical_json(body)
        if text is not data:
            body[f"{apart}_json"] = data[start + len(apart) + 4 : end]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(f"{path} is not a sealed JSON file ({len(data)} bytes). {advice}") from error
    head, _, tail = data.rpartition(seal_in_order)
    content = head.removesuffix(b",") + tail if tail == b"}\n" else head + tail.removeprefix(b",")
    actual = hashlib.sha256(content.removesuffix(b"\n")).hexdigest()
    if actual != digest or not content.endswith(b"}\n"):
        raise CacheError(
            f"{path}: the sha256 of its content is {actual[:8]}…, but it says {str(digest)[:8]}…. {advice}"
        )
    assert isinstance(body, dict)
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def is_digest(value: Any) -> bool:
    """Return whether a value is a sha256 in hex."""
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def is_count(value: Any, least: int = 0, end: int = _MOST) -> bool:
    """Return whether a value is an integer (not a bool) with least <= value < end."""
    return type(value) is int and least <= value < end


@dataclass(frozen=True)
class BatchEntry:
    """A record batch in a shard: byte range of its message, number of rows, sha256."""

    offset: int
    num_bytes: int
    num_rows: int
    sha256: str


@dataclass(frozen=True)
class CommitRecord:
    """Commits a shard: its digests, the identity of its rows (in shard order) and its statistics.

    `policies` are distinct (run_id, policy_step, policy_hash, refresh_index); `policy_of_row` points into
    them.
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
    statistics_json: bytes  # half of a record's text; decoded on demand
    head_sha256: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """The record's file name. Writers of the same rows under the same unit compete for it."""
        rows = hashlib.sha256("".join(sorted(self.row_ids)).encode()).hexdigest()
        return f"{file_stem(self.unit)}-{rows[:12]}.json"

    @cached_property
    def row_edges(self) -> list[int]:
        """The first row of each record batch, and the number of rows."""
        return list(accumulate((entry.num_rows for entry in self.batches), initial=0))

    @property
    def num_bytes(self) -> int:
        """Total bytes of the shard and this record."""
        return self.shard_bytes + len(self.sealed())

    @property
    def statistics(self) -> dict[str, Any]:
        """Sums and histograms over the rows, as from `Statistics.to_json`; CacheError if they are invalid."""
        expected = (len(self.row_ids), sum(self.num_prompt_tokens), sum(self.num_completion_tokens))
        with suppress(ValueError, RecursionError):
            part: dict[str, Any] = _DECODER.decode(self.statistics_json.decode())
            if check_statistics(part, expected):
                return part
        raise CacheError(f"{record_path(self.name)}: its statistics are invalid. {_ADVICE}")

    def sealed(self) -> bytes:
        """Return the bytes of the record's file."""
        body = asdict(self)
        del body["statistics_json"]
        return seal({**body, "statistics": self.statistics})


def file_stem(unit: str) -> str:
    """Return a unit's name as used in file names."""
    stem = quote(unit, safe=" +=@,")
    if not unit or len(stem) > 160 or stem.startswith("."):
        raise CacheError(f"the unit name {unit!r} cannot be a file name; expected 1 to 160 plain characters.")
    return stem


def write_record(store: Store, record: CommitRecord) -> bool:
    """Commit a published shard; return False if another writer committed the same rows first."""
    data = record.sealed()
    if len(data) > MOST_BYTES_READ:
        raise CacheError(
            f"unit {record.unit} has {len(record.row_ids):,} rows, whose commit record takes {len(data):,}"
            f" bytes; expected at most {MOST_BYTES_READ:,}: use smaller units."
        )
    return store.create(record_path(record.name), data)


def record_path(name: str) -> str:
    return f"{COMMITS}/{name}"


def read_record(store: Store, name: str) -> CommitRecord:
    """Read the commit record of that file name; CacheError if it is damaged."""
    return _parse(store, name, store.read(record_path(name)))


def _parse(store: Store, name: str, data: bytes) -> CommitRecord:
    path = store.path(record_path(name))
    body = unseal(path, data, _ADVICE, apart="statistics", before="unit")
    if body.get("format_version") != FORMAT_VERSION:
        version = body.get("format_version")
        raise CacheError(
            f"{path} has format version {version}, this program reads version {FORMAT_VERSION}; read the"
            " cache with the program that wrote it."
        )
    try:
        record = CommitRecord(**{**body, "batches": [BatchEntry(**entry) for entry in body["batches"]]})
        wrong = next(_wrong_fields(record), None)
    except (TypeError, KeyError) as error:
        raise CacheError(f"{path} is not a commit record ({error}). {_ADVICE}") from error
    if wrong:
        raise CacheError(f"{path} is not a commit record: invalid {wrong}. {_ADVICE}")
    if record.name != name:  # else removing this record's rows would remove the record whose name it bears
        raise Misnamed(f"{path} should be named {record.name}; rename it.")
    return record


class Misnamed(CacheError):
    """A commit record stored under another record's file name; its rows may be sound."""


def _wrong_fields(record: CommitRecord) -> Iterator[str]:
    """Yield the names of invalid fields. Checks types before values, and counts before sums."""
    if not (isinstance(record.unit, str) and _is_stem(record.unit)):
        yield "unit"
    if not (is_digest(record.fingerprint) and is_digest(record.shard_sha256)):
        yield "fingerprint or shard_sha256"
    if record.head_sha256 is not None and not is_digest(record.head_sha256):
        yield "head_sha256"
    if not (
        isinstance(record.shard, str) and SHARD_NAME.fullmatch(record.shard) and is_count(record.shard_bytes)
    ):
        yield "shard or shard_bytes"
    if not all(_is_entry(entry, record.shard_bytes) for entry in record.batches):
        yield "batches"
    num_rows = sum(entry.num_rows for entry in record.batches)
    of_rows = (record.row_ids, record.prompt_ids, record.num_prompt_tokens, record.num_completion_tokens)
    if any(
        type(values) is not list or len(values) != num_rows for values in (*of_rows, record.policy_of_row)
    ):
        yield "number of rows"
    if not (num_rows and _are_names(record.row_ids) and len(set(record.row_ids)) == num_rows):
        yield "row_ids"
    if set(map(len, record.row_ids)) != {32} or not _ROW_IDS.fullmatch("".join(record.row_ids)):
        yield "row_ids"
    if not _are_names(record.prompt_ids):
        yield "prompt_ids"
    if not (_are_counts(record.num_prompt_tokens, 1) and _are_counts(record.num_completion_tokens, 1)):
        yield "num_prompt_tokens or num_completion_tokens"
    if not (type(record.policies) is list and all(map(_is_policy, record.policies))):
        yield "policies"
    if not _are_counts(record.policy_of_row, 0, len(record.policies)):
        yield "policy_of_row"
    if not isinstance(record.statistics_json, bytes):
        yield "statistics"


def _are_names(values: list[Any]) -> bool:
    return set(map(type, values)) == {str} and all(values)


def _are_counts(values: list[Any], least: int, end: int = 2**31) -> bool:
    return set(map(type, values)) == {int} and least <= min(values) and max(values) < end


def _is_stem(unit: str) -> bool:
    try:
        return bool(file_stem(unit))
    except CacheError:
        return False


def _is_entry(entry: BatchEntry, shard_bytes: int) -> bool:
    counts = is_count(entry.offset) and is_count(entry.num_bytes, 1) and is_count(entry.num_rows, 1, 2**31)
    return counts and entry.offset + entry.num_bytes <= shard_bytes and is_digest(entry.sha256)


def _is_policy(policy: Any) -> bool:
    if type(policy) is not list or len(policy) != 4:
        return False
    run_id, step, digest, refresh = policy
    names = all(isinstance(name, str) and name for name in (run_id, digest))
    return names and is_count(step) and is_count(refresh, 0, 2**31)


def read_records(
    store: Store, known: dict[str, CommitRecord], *, checks_shards: bool = True
) -> dict[str, CommitRecord]:
    """Return all commit records, sorted by file name; those in `known` are reused.

    `checks_shards`: reuse a record only while its shard exists. Rows that were withdrawn and rewritten keep
    the record's name but have a new shard.
    """
    found = record_names(store)
    shards = set(store.names(SHARDS)) if known and checks_shards else set()
    kept = {
        name: known[name]
        for name in found
        if name in known and (not checks_shards or known[name].shard.split("/")[-1] in shards)
    }
    missing = [name for name in found if name not in kept]
    for name, data in zip(missing, store.read_many([record_path(name) for name in missing]), strict=True):
        if data is not None:
            kept[name] = _parse(store, name, data)
    return {name: kept[name] for name in found if name in kept} if missing else kept


def record_names(store: Store) -> list[str]:
    return [name for name in store.names(COMMITS) if name.endswith(".json")]
