"""Storage of a cache: its few operations, on a local directory or, through fsspec, an object store.

Only this module writes, renames or deletes a cache's files. Names are relative to the root: FILE or
FOLDER/FILE. A store never touches anything outside its root, whatever the name and wherever links point.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from cache.schema import CacheError

TEMPORARY = ".tmp-"
TEMPORARY_NAME = re.compile(r"\.tmp-[0-9a-f]{16}")
WITHDRAWN = "withdrawn"
STALE_SECONDS = 24 * 3600
MOST_BYTES_READ = 32 * 2**20  # limit for whole files (sealed JSON)
_CHUNK = 1 << 24
_READERS = 16  # concurrent requests to an object store
_PART = re.compile(r"[^/\\\x00-\x1f\x7f]+")

Root: TypeAlias = "str | PathLike[str] | Store"


class StoreError(CacheError):
    """The storage failed (unreachable, permission denied, not working); the data may be intact."""


class Draft:
    """A file not yet visible to readers: `write`, then `publish` it under its final name, or `discard` it."""

    def __init__(self, folder: Path, publish: Callable[[Path, str], None]) -> None:
        self.path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        self.num_bytes = 0
        self._publish = publish
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._hash = hashlib.sha256()

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

    def publish(self, name: str) -> None:
        """Durably publish the file under its final name, replacing any file of that name."""
        self.finish()
        self._publish(self.path, name)

    def finish(self) -> None:
        """Flush to disk and close the file."""
        os.fsync(self._fd)
        self._close()

    def discard(self) -> None:
        """Remove the file; no effect after publishing."""
        self._close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class Store(ABC):
    """The files of one cache. A missing file raises FileNotFoundError, other failures raise OSError.

    Attributes:
        root: the directory or URL, as text.
    """

    root: str

    def path(self, name: str) -> str:
        """Return a file's path or URL, for messages and for other programs."""
        return f"{self.root}/{name}"

    def names(self, folder: str) -> list[str]:
        """Return the published files of a folder, sorted; empty if there is no such folder."""
        return sorted(name for name in self._names(folder) if not name.startswith("."))

    def _names(self, folder: str) -> Iterable[str]:
        return self.sizes(folder)

    def _check(self, name: str) -> None:
        """Raise StoreError unless the name (file or folder) can only lie below the root."""
        parts = name.split("/") if name else []
        if len(parts) > 2 or any(part in (".", "..") or not _PART.fullmatch(part) for part in parts):
            raise StoreError(
                f"{self.root}: {name!r} cannot be the name of a cache's file; expected FILE or FOLDER/FILE."
                " Nothing was changed; move it out of the cache."
            )

    def _check_size(self, name: str, num_bytes: int) -> None:
        if num_bytes > MOST_BYTES_READ:
            raise CacheError(
                f"{self.path(name)} has {num_bytes:,} bytes; expected at most {MOST_BYTES_READ:,}. This"
                " program did not write it: move it out of the cache and rerun."
            )

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of each file in a folder, temporary ones too; empty if it is missing."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if it is missing."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """Return a file's modification time by the storage's clock, in seconds since the epoch."""

    @abstractmethod
    def now(self) -> float:
        """Return the current time by the same clock. Writers' own clocks may be off by hours."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read a whole file; CacheError if it is larger than `MOST_BYTES_READ` bytes."""

    def read_many(self, names: list[str]) -> list[bytes | None]:
        """Read whole files; None for each missing one."""
        return [self.read_or_none(name) for name in names]

    def read_or_none(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError):
            return self.read(name)
        return None

    @abstractmethod
    def read_range(self, name: str, offset: int, num_bytes: int) -> pa.Buffer:
        """Read bytes `offset` to `offset + num_bytes` of a file, or up to its end."""

    @abstractmethod
    def hash(self, name: str) -> str:
        """Return the sha256 of a file's bytes."""

    @abstractmethod
    def local_copy(self, name: str) -> Path:
        """Return a local file with the same content, for memory mapping; it lives as long as this store."""

    @abstractmethod
    def draft(self, folder: str) -> Draft:
        """Create a file to be published in `folder`."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Durably write a whole file unless one of that name exists; return whether it was written."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a published file if it exists."""

    @abstractmethod
    def set_aside(self, name: str) -> str:
        """Move a published file, if it exists, to the folder `withdrawn`; return its new name."""

    @abstractmethod
    def check_create(self) -> None:
        """Raise StoreError if `create` would not be exclusive between two writers."""

    def remove_stale(self, names: Iterable[str]) -> None:
        """Remove files not written to for `STALE_SECONDS` (a commit takes a fraction of a second)."""
        now = None
        for name in names:
            with suppress(OSError):
                now = self.now() if now is None else now
                if now - self.modified(name) > STALE_SECONDS:
                    self.remove(name)


def open_store(root: Root) -> Store:
    """Return the store of a directory or fsspec URL. StoreError if no installed package opens the URL."""
    if isinstance(root, Store):
        return root
    text = os.fspath(root)
    if "://" not in text:
        return LocalStore(Path(text))
    if text.startswith(("file://", "local://")):
        return LocalStore(Path(text.split("://", 1)[1]))
    return ObjectStore(text)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn a failed read into StoreError. An I/O error is not evidence of damage."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        what = (
            "no permission to read it" if isinstance(error, PermissionError) else f"{error.strerror or error}"
        )
        raise StoreError(
            f"{path}: {what}; nothing was changed. Check its owner and mode, the disk and the limit on"
            " open files, and rerun."
        ) from error


class LocalStore(Store):
    """A directory on a file system with hard links and atomic rename."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self._folder = folder

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def _locate(self, name: str, *, follow: bool = True) -> Path:
        """Return the file's path; StoreError if it leaves the root, through links too.

        `follow`: also check the file itself for being a link.
        """
        return Path(self._text(name, follow=follow))

    def _text(self, name: str, *, follow: bool = True) -> str:
        self._check(name)
        path = f"{self.root}/{name}" if name else self.root
        folder = f"{self.root}/{name.rpartition('/')[0]}" if "/" in name else ""
        places = [folder] * bool(folder) + [path] * bool(name and follow)
        if any(os.path.islink(place) for place in places):  # noqa: PTH114 - a Path costs more than the call
            target = os.path.realpath(path if follow else folder)
            if not Path(target).is_relative_to(os.path.realpath(self.root)):
                raise StoreError(
                    f"{path} leads to {target}, outside the cache; nothing was changed. Move the file itself"
                    " into the cache, or the cache to where the file is."
                )
        return path

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        """Open a file descriptor for reading; CacheError for a folder, pipe or device."""
        path = self._text(name)
        with _reading(path):
            # O_NONBLOCK: opening a pipe must not wait for a writer
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise CacheError(f"{path} is not a regular file; move it out of the cache and rerun.")
                yield fd
            finally:
                os.close(fd)

    def _names(self, folder: str) -> list[str]:
        path = self._locate(folder)
        with _reading(str(path)), suppress(FileNotFoundError):
            return os.listdir(path)  # noqa: PTH208 - 10,000 names are wanted, no paths
        return []

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        path = self._locate(folder)
        with _reading(str(path)), suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a temporary file that was published meanwhile
                    found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def size(self, name: str) -> int | None:
        path = self._locate(name)
        with _reading(str(path)), suppress(FileNotFoundError):
            return path.stat().st_size
        return None

    def modified(self, name: str) -> float:
        return self._locate(name, follow=False).lstat().st_mtime

    def now(self) -> float:
        draft = self.draft("")
        try:
            draft.write(b"1")
            return draft.path.stat().st_mtime
        finally:
            draft.discard()

    def read(self, name: str) -> bytes:
        with self._open(name) as fd:
            size = os.fstat(fd).st_size
            self._check_size(name, size)
            return _read_at(fd, 0, size)

    def read_range(self, name: str, offset: int, num_bytes: int) -> pa.Buffer:
        with self._open(name) as fd:  # not memory-mapped: a disk error would raise SIGBUS
            left = max(0, os.fstat(fd).st_size - offset)
            return pa.py_buffer(_read_at(fd, offset, min(num_bytes, left)))

    def hash(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._open(name) as fd:
            while chunk := os.read(fd, _CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def local_copy(self, name: str) -> Path:
        return self._locate(name)

    def draft(self, folder: str) -> Draft:
        path = self._locate(folder)
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            sync(path.parent)
        return Draft(path, self._rename)

    def create(self, name: str, data: bytes) -> bool:
        path = self._locate(name, follow=False)
        draft = self.draft(name.rpartition("/")[0])
        try:
            draft.write(data)
            draft.finish()
            path.hardlink_to(draft.path)
        except FileExistsError:
            return False
        finally:
            draft.discard()
        sync(path.parent)
        return True

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._locate(name, follow=False).unlink()

    def set_aside(self, name: str) -> str:
        folder = self._locate(WITHDRAWN)
        folder.mkdir(exist_ok=True)
        path, new = self._locate(name, follow=False), _aside(name)
        with suppress(FileNotFoundError):
            path.rename(self._folder / new)
            sync(folder)
            sync(path.parent)
        return new

    def check_create(self) -> None:
        pass  # a hard link never overwrites a file

    def _rename(self, path: Path, name: str) -> None:
        target = self._locate(name, follow=False)
        path.rename(target)
        sync(target.parent)


def _read_at(fd: int, offset: int, num_bytes: int) -> bytes:
    """Read a file's bytes from `offset`, up to its end."""
    parts = []
    while num_bytes and (part := os.pread(fd, num_bytes, offset)):
        parts.append(part)
        offset, num_bytes = offset + len(part), num_bytes - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _aside(name: str) -> str:
    """Return a new name in `withdrawn/` that distinguishes files withdrawn at different times."""
    return f"{WITHDRAWN}/{secrets.token_hex(4)}-{name.rsplit('/', 1)[-1]}"


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class ObjectStore(Store):
    """Objects under a URL prefix. Writes are atomic; `create` is a put that fails if the key exists."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.root = url.rstrip("/")
        try:
            self._fs, self._prefix = url_to_fs(self.root, use_listings_cache=False)
        except Exception as error:  # an invalid archive, a missing package
            raise StoreError(
                f"{url} cannot be opened ({error}); check its address, and install the package that"
                " its protocol needs."
            ) from error
        self._copies: dict[str, Path] = {}
        self._sizes: dict[str, int] = {}  # as of the last listing
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def sizes(self, folder: str) -> dict[str, int]:
        found = []
        with self._requests(), suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            found = [
                entry for entry in self._fs.ls(self._key(folder), detail=True) if entry["type"] == "file"
            ]
        sizes = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found}
        self._sizes |= {f"{folder}/{name}": size for name, size in sizes.items()}
        return sizes

    def size(self, name: str) -> int | None:
        with self._requests(), suppress(FileNotFoundError):
            return int(self._fs.size(self._key(name)))
        return None

    def modified(self, name: str) -> float:
        with self._requests():
            return float(self._fs.modified(self._key(name)).timestamp())

    def now(self) -> float:
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            self.create(name, b"1")
            return self.modified(name)
        finally:
            self.remove(name)

    def read(self, name: str) -> bytes:
        self._check_size(name, self._sizes.get(name) or self.size(name) or 0)
        with self._requests():
            return bytes(self._fs.cat_file(self._key(name)))

    def read_many(self, names: list[str]) -> list[bytes | None]:
        if not names:
            return []
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.read_or_none, names))

    def read_range(self, name: str, offset: int, num_bytes: int) -> pa.Buffer:
        with self._requests():
            return pa.py_buffer(self._fs.cat_file(self._key(name), start=offset, end=offset + num_bytes))

    def hash(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._requests(), self._fs.open(self._key(name), "rb", cache_type="none") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def local_copy(self, name: str) -> Path:
        if name not in self._copies:
            path = self._local_folder() / secrets.token_hex(8)
            with self._requests():
                self._fs.get_file(self._key(name), str(path))
            self._copies[name] = path
        return self._copies[name]

    def draft(self, folder: str) -> Draft:
        return Draft(self._local_folder(), self._upload)

    def create(self, name: str, data: bytes) -> bool:
        with self._requests():
            try:
                self._fs.pipe_file(self._key(name), data, mode="create")
            except FileExistsError:  # perhaps by this put, retried after its response was lost
                return bool(self._fs.cat_file(self._key(name)) == data)
        return True

    def remove(self, name: str) -> None:
        with self._requests(), suppress(FileNotFoundError):
            self._fs.rm_file(self._key(name))

    def set_aside(self, name: str) -> str:
        new = _aside(name)
        with self._requests(), suppress(FileNotFoundError):
            self._fs.cp_file(self._key(name), self._key(new))
            self._fs.rm_file(self._key(name))
        return new

    def check_create(self) -> None:
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            if self.create(name, b"1") and not self.create(name, b"2"):
                return
        finally:
            self.remove(name)
        raise StoreError(
            f"{self.root}: this storage overwrites an object when asked to create a new one, so two"
            " writers could lose rows; use a storage with conditional puts (S3, GCS, Azure), or a local"
            " directory."
        )

    def _key(self, name: str) -> str:
        self._check(name)
        return "/".join(filter(None, [self._prefix, name]))  # the root of an archive is ""

    def _local_folder(self) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="dualkl-cache-")
        return Path(self._folder.name)

    def _upload(self, path: Path, name: str) -> None:
        with self._requests():
            self._fs.put_file(str(path), self._key(name))
        path.unlink()

    @contextmanager
    def _requests(self) -> Iterator[None]:
        """Turn all client errors but missing or existing files into StoreError; their types vary."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, CacheError):
            raise
        except Exception as error:
            raise StoreError(
                f"{self.root} cannot be read or written now ({type(error).__name__}: {error}); nothing was"
                " lost. Check its address and your credentials, and rerun."
            ) from error
