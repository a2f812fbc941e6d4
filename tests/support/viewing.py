"""Reads the viewer's data back, as the page does."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np

DATA = re.compile(r'<script id="dualkl-data" type="application/json">(.*?)</script>', re.DOTALL)


def data_of(page: str) -> dict[str, Any]:
    """The data block of a page."""
    (text,) = DATA.findall(page)
    found: dict[str, Any] = json.loads(text)
    return found


def inflated(data: str) -> bytes:
    return zlib.decompress(base64.b64decode(data), wbits=-15)


def codes_of(column: dict[str, Any]) -> np.ndarray:
    """[T] or [T, width] codes."""
    size = int(column["dtype"][1:]) // 8
    planes = np.frombuffer(inflated(column["data"]), np.uint8).reshape(size, -1).astype(np.int64)
    codes = (planes << 8 * np.arange(size)[:, None]).sum(0)
    return codes if column["width"] == 1 else codes.reshape(column["width"], -1).T


def values_of(column: dict[str, Any]) -> np.ndarray:
    """[T] or [T, width] shown values; NaN where missing."""
    codes = codes_of(column)
    exact = codes.astype(float)
    shown = {
        "linear": exact * column["scale"],
        "square": exact * exact * column["scale"],
        "log": np.exp(exact * column["scale"]),
    }[column["law"]]
    return np.where(codes == column["missing"], np.nan, shown)


def ids_of(columns: dict[str, Any], name: str) -> np.ndarray:
    """[T] or [T, width] places in the vocabulary; -1 where missing."""
    column = columns[name]
    codes = codes_of(column)
    others = [np.atleast_2d(ids_of(columns, other).T) for other in column.get("refers", ())]
    slots = np.concatenate(others) if others else np.zeros((0, len(codes)), int)
    found = codes - len(slots)
    for number, slot in enumerate(slots):
        found = np.where(codes == number, slot if codes.ndim == 1 else slot[:, None], found)
    return np.where(codes == column["missing"], -1, found)


def vocabulary_of(rollouts: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(inflated(rollouts["vocabulary"]["data"]))
    return entries


def text_of(entry: dict[str, Any]) -> str:
    """How a token is spelled: its text, a special token's name, or bytes in hex."""
    return str(entry.get("t", entry.get("s", entry.get("b"))))


def tokens_of(rollouts: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The texts of a row's tokens."""
    entries = vocabulary_of(rollouts)
    own = slice(row["offset"], row["offset"] + row["tokens"])
    return [text_of(entries[place]) for place in ids_of(rollouts["columns"], "token")[own]]
