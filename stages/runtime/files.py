"""Small files that a crash must not cut in half."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes `path` as a whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def publish_folder(partial: Path, final: Path) -> None:
    """Gives a folder that is complete its final name, durably: every file is on the disk before it."""
    for path in partial.rglob("*"):
        if path.is_file():
            _sync(path)
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
