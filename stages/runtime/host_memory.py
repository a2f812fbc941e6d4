"""Memory of this machine, or of its container: what can still be allocated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class _Names(NamedTuple):
    """Files of a control group, by the version of its hierarchy."""

    limits: tuple[str, ...]
    used: str
    files: tuple[str, str]
    """Lines of memory.stat: pages of files, which the kernel can drop."""


_V1 = _Names(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_V2 = _Names(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def free_bytes() -> int:
    """Bytes that can be allocated without swapping and within every limit on this process's control groups."""
    left = [limit.bytes - limit.held for limit in _limits()]
    return max(0, min(int(psutil.virtual_memory().available), *left))


def total_bytes() -> int:
    """Bytes that this process may have in all: those of the machine, or the lowest of those limits."""
    return min(int(psutil.virtual_memory().total), *(limit.bytes for limit in _limits()))


class _Limit(NamedTuple):
    """`held`: bytes of the group's processes, without file pages that the kernel can drop."""

    bytes: int
    held: int


def _limits() -> Iterator[_Limit]:
    """Limits of this process's control groups and of the groups around them, which hold for it too."""
    yield _Limit(2**63, 0)
    for line in (_text(OWN_GROUPS) or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names, root = (_V1, GROUPS / "memory") if controllers else (_V2, GROUPS)
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            yield from _limits_of(folder, names)
            if folder == root:
                break


def _limits_of(folder: Path, names: _Names) -> Iterator[_Limit]:
    limits = [_text(folder / name) for name in names.limits]
    if numbers := [int(limit) for limit in limits if limit.isdecimal()]:
        stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
        files = sum(int(stat.get(name, 0)) for name in names.files)
        yield _Limit(min(numbers), int(_text(folder / names.used) or 0) - files)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
