"""Where a cache lies: the few storage operations, on a local directory and on an object store through fsspec.

Nothing else in this package writes, renames or deletes a file. Files are named relative to the cache's root, with "/".
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import time
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
STALE_SECONDS = 24 * 3600
_CHUNK = 1 << 24
_READERS = 16  # requests to an object store at a time

Root: TypeAlias = "str | PathLike[str] | Store"


class StoreError(CacheError):
    """The storage did not do what was asked: unreachable, not allowed, out of order. It says nothing of the data."""


class Draft:
    """A file that nobody reads yet: `write`, then `publish` under its final name, or `discard`."""

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
        """Durably gives the file its final name, replacing a file of that name."""
        self.finish()
        self._publish(self.path, name)

    def finish(self) -> None:
        """Ends writing; what was written is on the disk."""
        os.fsync(self._fd)
        self._close()

    def discard(self) -> None:
        """Removes the file; harmless after it was published."""
        self._close()
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class Store(ABC):
    """The files of one cache. A file that is not there is a FileNotFoundError, other failures are OSErrors.

    Attributes:
        root: the directory or URL, as text.
    """

    root: str

    def path(self, name: str) -> str:
        """A file's path or URL, for messages and for other programs."""
        return f"{self.root}/{name}"

    def names(self, folder: str) -> list[str]:
        """The published files of a folder, sorted; none if there is no such folder."""
        return sorted(name for name in self.sizes(folder) if not name.startswith("."))

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file of a folder, temporary ones too, by name; empty if there is no such folder."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """When a file was last written, in seconds since the epoch."""

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def read_many(self, names: list[str]) -> list[bytes | None]:
        """Whole files; None for one that is not there (any more)."""

    def read_or_none(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError):
            return self.read(name)
        return None

    @abstractmethod
    def read_range(self, name: str, offset: int, num_bytes: int) -> pa.Buffer:
        """Bytes `offset` to `offset + num_bytes` of a file; fewer where it ends before."""

    @abstractmethod
    def hash(self, name: str) -> str:
        """sha256 of a file's bytes."""

    @abstractmethod
    def local_copy(self, name: str) -> Path:
        """A local file with the same content, to be mapped to memory; it lives as long as this store."""

    @abstractmethod
    def draft(self, folder: str) -> Draft:
        """A new file that will be published in `folder`."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Durably writes a whole file unless one of that name exists; says whether it did."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a published file, if it is there."""

    @abstractmethod
    def check_create(self) -> None:
        """Raises StoreError where `create` would not keep two writers apart."""

    def remove_stale(self, names: Iterable[str]) -> None:
        """Removes those files that nobody has written to for `STALE_SECONDS`; a commit takes a fraction of a second."""
        for name in names:
            with suppress(OSError):
                if time.time() - self.modified(name) > STALE_SECONDS:
                    self.remove(name)


def open_store(root: Root) -> Store:
    """The store at a directory, or at a URL that fsspec knows. StoreError if no installed package opens the URL."""
    if isinstance(root, Store):
        return root
    text = os.fspath(root)
    if "://" not in text:
        return LocalStore(Path(text))
    if text.startswith("file://"):
        return LocalStore(Path(text.removeprefix("file://")))
    return ObjectStore(text)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """A file that this user may not read says nothing of its content: StoreError, which is no damage."""
    try:
        yield path
    except PermissionError as error:
        raise StoreError(
            f"{path}: no permission to read it; nothing was changed: look at its owner and mode, and rerun."
        ) from error


class LocalStore(Store):
    """A directory on a file system with hard links and atomic rename."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self._folder = folder

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def sizes(self, folder: str) -> dict[str, int]:
        found = {}
        with _reading(self._folder / folder) as path, suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a temporary file that was published since
                    found[entry.name] = entry.stat().st_size
        return found

    def size(self, name: str) -> int | None:
        with _reading(self._folder / name) as path, suppress(FileNotFoundError):
            return path.stat().st_size
        return None

    def modified(self, name: str) -> float:
        return (self._folder / name).stat().st_mtime

    def read(self, name: str) -> bytes:
        with _reading(self._folder / name) as path:
            return path.read_bytes()

    def read_many(self, names: list[str]) -> list[bytes | None]:
        return [self.read_or_none(name) for name in names]

    def read_range(self, name: str, offset: int, num_bytes: int) -> pa.Buffer:
        with _reading(self._folder / name) as path, pa.memory_map(str(path)) as source:
            if offset >= source.size():
                return pa.py_buffer(b"")
            source.seek(offset)
            return source.read_buffer(num_bytes)

    def hash(self, name: str) -> str:
        with _reading(self._folder / name) as path, path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def local_copy(self, name: str) -> Path:
        return self._folder / name

    def draft(self, folder: str) -> Draft:
        path = self._folder / folder
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            sync(path.parent)
        return Draft(path, self._rename)

    def create(self, name: str, data: bytes) -> bool:
        path = self._folder / name
        draft = self.draft(str(Path(name).parent))
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
            (self._folder / name).unlink()

    def check_create(self) -> None:
        pass  # a hard link is never made over a file

    def _rename(self, path: Path, name: str) -> None:
        path.rename(self._folder / name)
        sync((self._folder / name).parent)


def sync(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class ObjectStore(Store):
    """Objects under a URL prefix. They appear whole or not at all; `create` is a put that fails if the key is taken."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.root = url.rstrip("/")
        try:
            self._fs, self._prefix = url_to_fs(self.root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{url} cannot be opened ({error}); install what its protocol needs.") from error
        self._copies: dict[str, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def sizes(self, folder: str) -> dict[str, int]:
        with self._requests():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._key(folder), detail=True)
            except FileNotFoundError:
                return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in found if entry["type"] == "file"}

    def size(self, name: str) -> int | None:
        with self._requests():
            try:
                return int(self._fs.size(self._key(name)))
            except FileNotFoundError:
                return None

    def modified(self, name: str) -> float:
        with self._requests():
            return float(self._fs.modified(self._key(name)).timestamp())

    def read(self, name: str) -> bytes:
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
            except FileExistsError:
                return self._fs.cat_file(self._key(name)) == data  # a put whose answer was lost was sent again
        return True

    def remove(self, name: str) -> None:
        with self._requests(), suppress(FileNotFoundError):
            self._fs.rm_file(self._key(name))

    def check_create(self) -> None:
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            if self.create(name, b"1") and not self.create(name, b"2"):
                return
        finally:
            self.remove(name)
        raise StoreError(
            f"{self.root}: this storage overwrites an object where it was asked to create a new one, so two writers"
            " could lose rows; use one with conditional puts (S3, GCS, Azure), or a local directory."
        )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if name else self._prefix

    def _local_folder(self) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="dualkl-cache-")
        return Path(self._folder.name)

    def _upload(self, path: Path, name: str) -> None:
        with self._requests():
            self._fs.put_file(str(path), self._key(name))
        path.unlink()

    @contextmanager
    def _requests(self) -> Iterator[None]:
        """Client libraries raise what they like: all but a missing or an existing file becomes StoreError."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, CacheError):
            raise
        except Exception as error:
            raise StoreError(
                f"{self.root} cannot be read or written now ({type(error).__name__}: {error}); nothing was lost: look at"
                " its address and your credentials, and rerun."
            ) from error
