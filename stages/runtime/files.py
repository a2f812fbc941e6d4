"""A run's own files: written atomically and durably, and never through links in the run's folder."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from stages.runtime import ending
from stages.runtime.errors import UserError

_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}  # a link, a folder, a pipe without a reader or a socket


def open_regular(path: Path, flags: int) -> int:
    """Open the regular file `path` without blocking; UserError for a link, folder, pipe or device."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
    raise UserError(
        f"{path} is a link, a folder, a pipe or a device; a run keeps a regular file there. Remove it, then"
        " run the same command again."
    )


def read(path: Path) -> bytes | None:
    """Content of the regular file `path`; None if it does not exist."""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def append(path: Path, text: str) -> None:
    """Append `text` to the regular file `path`, creating it if its folder exists."""
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(_encoded(text))


def replace_text(path: Path, text: str) -> None:
    """Write `path` atomically and durably.

    The folder must exist, so that a run whose folder was moved does not recreate it.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # left by a crash, or a link
    try:
        with os.fdopen(open_regular(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(_encoded(text))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # paths may hold bytes that are not valid text


def remove(path: Path) -> None:
    """Remove a file, or a folder and its contents; for a link, only the link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a folder so that, if this is interrupted, what is left is hidden and does not pass for it."""
    aside = path if path.name.startswith(".") else path.with_name(f".old-{path.name}")
    if aside != path:
        remove(aside)
        path.rename(aside)
    remove(aside)


def discard_unneeded(paths: Iterable[Path]) -> None:
    """Discard what takes space but is used by nothing; a warning for each that cannot be removed."""
    for path in paths:
        try:
            discard(path)
        except OSError as error:
            ending.tell(f"warning: {path} could not be removed ({error.strerror or error}); it is not needed")


def new_folder(path: Path) -> None:
    """Replace whatever is at `path` by an empty folder; creates the parent, but not further ancestors."""
    path.parent.mkdir(exist_ok=True)
    remove(path)
    path.mkdir()


def publish_folder(partial: Path, final: Path) -> None:
    """Durably rename a complete folder, replacing any at `final`; after a crash it is complete or absent."""
    for path in (*partial.rglob("*"), partial):
        if path.is_file() or path.is_dir():
            _sync(path)
    aside = final.with_name(f".old-{final.name}")
    remove(aside)
    if final.exists() or final.is_symlink():
        final.rename(aside)
    partial.rename(final)
    _sync(final.parent)
    discard_unneeded([aside])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
