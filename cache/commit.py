"""How data becomes part of a cache: the few storage operations (local directories), sealed JSON, commit records.

Nothing else in this package writes, renames or deletes a file. The protocol is in FORMAT.md: a shard is written under
a temporary name and published; then its commit record is created exclusively, and that alone makes its rows exist.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cache.schema import FORMAT_VERSION, CacheError

COMMITS, SHARDS, HEADS = "commits", "shards", "heads"
FINGERPRINT, TOKENIZER, HEAD = "fingerprint.json", "tokenizer.json", "head.json"
TEMPORARY = ".tmp-"
STALE_SECONDS = 24 * 3600
_CHUNK = 1 << 24


class TemporaryFile:
    """A file that nobody reads yet: `write`, then `publish` under its final name, or `discard`."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _sync_folder(folder.parent)
        self.path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._hash.update(chunk)
            written = 0
            while written < len(chunk):
                written += os.write(self._fd, chunk[written:])
        self.num_bytes += len(view)

    def publish(self, path: Path) -> None:
        """Durably gives the file its final name, replacing a file of that name."""
        self._finish()
        self.path.rename(path)
        _sync_folder(path.parent)

    def publish_first(self, path: Path) -> bool:
        """Durably gives the file its final name unless that is taken; says whether it did."""
        self._finish()
        try:
            path.hardlink_to(self.path)
        except FileExistsError:
            return False
        finally:
            self.path.unlink()
        _sync_folder(path.parent)
        return True

    def discard(self) -> None:
        """Removes the file; harmless after it was published."""
        self._close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _finish(self) -> None:
        os.fsync(self._fd)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def create(path: Path, data: bytes) -> bool:
    """Durably writes a whole file unless one of that name exists; says whether it did."""
    temporary = TemporaryFile(path.parent)
    try:
        temporary.write(data)
        return temporary.publish_first(path)
    finally:
        temporary.discard()


def names(folder: Path) -> list[str]:
    """The published files of a folder, sorted; none if there is no such folder."""
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


def leftovers(root: Path, referenced: Iterable[str]) -> list[Path]:
    """Temporary files and shards without a commit record: of writers at work, or of ones that died."""
    known = set(referenced)
    found = []
    for folder in (root, root / COMMITS, root / SHARDS, root / HEADS):
        with suppress(FileNotFoundError):
            found += [path for path in folder.iterdir() if path.name.startswith(TEMPORARY)]
    found += [root / SHARDS / name for name in names(root / SHARDS) if f"{SHARDS}/{name}" not in known]
    return sorted(found)


def remove_stale(paths: Iterable[Path]) -> None:
    """Removes the leftovers that nobody has written to for `STALE_SECONDS`; a commit takes a fraction of a second."""
    for path in paths:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def remove(path: Path) -> None:
    """Removes a published file, if it is there."""
    with suppress(FileNotFoundError):
        path.unlink()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def explain_os_errors(root: Path, count_kept: Callable[[], int]) -> Iterator[None]:
    """Turns an OSError of a write into a CacheError that says what is kept and what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = "No space left on" if full else f"{error.strerror or error} while writing to"
        remedy = "free space" if full else "mend that"
        raise CacheError(f"{problem} {root}: {count_kept()} committed rows are kept; {remedy} and rerun.") from error


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def canonical_json(value: Any) -> bytes:
    """The one form of a JSON value that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal(body: dict[str, Any]) -> bytes:
    """`body` as a JSON file that carries its own sha256."""
    digest = hashlib.sha256(canonical_json(body)).hexdigest()
    return canonical_json({**body, "sha256": digest}) + b"\n"


def unseal(path: Path, advice: str) -> dict[str, Any]:
    """The body of a sealed JSON file; CacheError, ending in `advice`, unless every byte is as it was sealed."""
    data = path.read_bytes()
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is not a sealed JSON file ({len(data)} bytes). {advice}") from error
    if seal(body) != data:
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


def write_record(root: Path, record: CommitRecord) -> bool:
    """Commits a published shard; says False if the same rows were committed first by another writer."""
    return create(root / COMMITS / record.name, seal(asdict(record)))


def read_record(root: Path, name: str) -> CommitRecord:
    """The commit record of that file name; CacheError if it is damaged."""
    advice = "Delete it and rerun stage one, which fills in its rows; other committed rows are kept."
    path = root / COMMITS / name
    body = unseal(path, advice)
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


def read_records(root: Path, known: dict[str, CommitRecord]) -> dict[str, CommitRecord]:
    """All commit records by file name, in its order; those in `known` are not read again."""
    return {name: known.get(name) or read_record(root, name) for name in record_names(root)}


def record_names(root: Path) -> list[str]:
    return [name for name in names(root / COMMITS) if name.endswith(".json")]
