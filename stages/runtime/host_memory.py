"""Memory of this machine, or of its container: what can still be allocated."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Bytes that can be allocated without swapping and within the container's limit, if it has one."""
    free = int(psutil.virtual_memory().available)
    limit = _text("memory.max")
    if limit.isdecimal():
        stat = dict(line.split() for line in _text("memory.stat").splitlines())
        files = int(stat.get("inactive_file", 0)) + int(
            stat.get("active_file", 0)
        )  # the kernel can drop them
        free = min(free, int(limit) - int(_text("memory.current") or 0) + files)
    return free


def _text(name: str) -> str:
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""
