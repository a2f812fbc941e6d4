"""Single-writer lock files that record the host, process and start time of their holder.

If the file system supports fcntl locks, they are authoritative. The kernel releases them when their process
ends, and on NFS 4 they span hosts. Otherwise, and for a file left by a process on another machine, the holder
recorded in the file is.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from stages.runtime import ending, files
from stages.runtime.errors import UserError

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: dict[Path, int] = {}


def take(path: Path, what: str) -> None:
    """Lock `path` for the one writer of `what` until this process ends; UserError that names the holder.

    Creates the folder if needed, and removes it at the end if nothing else was added.
    """
    path = path.absolute()
    if path in _held:
        return
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = files.open_regular(path, os.O_RDWR | os.O_CREAT)
        try:
            _claim(descriptor, path, what)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_there(descriptor, path):
            break
        os.close(descriptor)  # its last holder has just removed it
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_identity()).encode(), 0)
    _held[path] = descriptor
    ending.at_end(lambda: _release(path, made), quick=True)


def _claim(descriptor: int, path: Path, what: str) -> None:
    has_locks = True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(_in_use(_read(descriptor, patience=1.0), what)) from None
        if error.errno not in NO_LOCKS:
            raise
        has_locks = False
    holder = _read(descriptor)
    if not holder:
        return
    own = _identity()
    if holder.get("host") != own["host"] and not (own["boot"] and holder.get("boot") == own["boot"]):
        raise UserError(
            f"{_in_use(holder, what)} This machine cannot see whether that process still runs: if it does"
            f" not, delete {path} and run this command again."
        )
    if not has_locks and _is_alive(holder):
        raise UserError(_in_use(holder, what))


def _in_use(holder: dict[str, Any], what: str) -> str:
    if not holder:
        return f"{what} is in use by another process. Wait for it or stop it, or use another --run_name."
    return (
        f"{what} is in use by process {holder.get('pid')} on {holder.get('host')}, since"
        f" {holder.get('since')}. Wait for it or stop it, or use another --run_name."
    )


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "process_start": _process_start(os.getpid()),
        "boot": _read_text("/proc/sys/kernel/random/boot_id").strip(),
    }


def _process_start(pid: int) -> str:
    """Start of a process in ticks since boot, which identifies it if its pid is reused; "" if unknown."""
    return (_read_text(f"/proc/{pid}/stat").rpartition(")")[2].split() + [""] * 20)[19]


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder is a running process of this machine; always false after a reboot."""
    own, pid = _identity(), holder.get("pid")
    if holder.get("boot") != own["boot"] or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return holder.get("process_start") == _process_start(pid)


def _read(descriptor: int, patience: float = 0.0) -> dict[str, Any]:
    """Content of the file, {} if empty. `patience`: seconds to wait for a holder to write its entry."""
    end = time.monotonic() + patience
    while True:
        try:
            found = json.loads(os.pread(descriptor, 4096, 0))
        except ValueError:
            found = {}
        if found or time.monotonic() >= end:
            return found if isinstance(found, dict) else {}
        time.sleep(0.02)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _is_there(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _release(path: Path, made: list[Path]) -> None:
    descriptor = _held.pop(path, None)
    if descriptor is None:
        return
    if _is_there(descriptor, path):
        path.unlink(missing_ok=True)
    os.close(descriptor)
    for folder in made:
        try:
            folder.rmdir()
        except OSError:
            return
