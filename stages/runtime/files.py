"""A run's own files: whole or not there at all, durable, and never reached through a link that lies in the run's folder."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

from stages.runtime.errors import UserError

_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO}  # a link, a folder, a pipe without a reader or a socket


def open_regular(path: Path, flags: int) -> int:
    """A descriptor of the regular file `path`; UserError if that is a link, a folder, a pipe or a device. It never waits."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
    raise UserError(
        f"{path} is a link, a folder, a pipe or a device; a run keeps a regular file there. Remove it, then run the same"
        " command again."
    )


def read(path: Path) -> bytes | None:
    """What the regular file `path` holds; None if it is not there."""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def append(path: Path, text: str) -> None:
    """Adds `text` to the regular file `path`, which is made if its folder is there."""
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(_encoded(text))


def replace_text(path: Path, text: str) -> None:
    """Writes `path` as a whole or not at all, durably. Its folder must be there: that of a run that was moved is not made anew."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # what a crash left, or a link
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
    return text.encode("utf-8", "backslashreplace")  # paths may hold bytes that are no text


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def new_folder(path: Path) -> None:
    """An empty folder in the place of whatever was there; the one above must be there or can be made, but none above that."""
    path.parent.mkdir(exist_ok=True)
    remove(path)
    path.mkdir()


def publish_folder(partial: Path, final: Path) -> None:
    """Gives a folder that is complete its final name, durably, and removes what had that name: a crash leaves it complete or gone."""
    for path in partial.rglob("*"):
        if path.is_file():
            _sync(path)
    aside = final.with_name(f".old-{final.name}")
    remove(aside)
    if final.exists() or final.is_symlink():
        final.rename(aside)
    partial.rename(final)
    _sync(final.parent)
    remove(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
