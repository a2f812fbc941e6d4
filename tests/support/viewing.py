"""Reads the viewer's data back, as the page does."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np

from stages.viewer.columns import SAFE

DATA = re.compile(r'<script id="dualkl-data" type="application/json">(.*?)</script>', re.DOTALL)


def data_of(page: str) -> dict[str, Any]:
    """The data block of a page."""
    (text,) = DATA.findall(page)
    found: dict[str, Any] = json.loads(text)
    return found


def inflated(data: str) -> bytes:
    back = {place: digit for digit, place in SAFE.items()}
    return zlib.decompress(base64.b85decode(data.translate(back)), wbits=-15)


def unpacked(rollouts: dict[str, Any]) -> dict[str, Any]:
    """The same with `rows`, `prompts` and `vocabulary`."""
    return rollouts | json.loads(inflated(rollouts["packed"]))


def codes_of(rollouts: dict[str, Any], name: str) -> np.ndarray:
    """[T] or [T, width] codes of a column of numbers; NaN where missing."""
    column = rollouts["columns"][name]
    bits, width = column["bits"], column["width"]
    low, missing = max(0, bits - 8), 2**bits - 1
    parts = np.frombuffer(inflated(column["data"]), np.uint8).astype(int)
    parts = parts.reshape(2 if low else 1, width, -1)
    stored = (parts[0] << low) + parts[1] if low else parts[0]
    base = np.nan_to_num(codes_of(rollouts, column["after"])) if "after" in column else 0
    found = []
    for slot in stored:
        found.append(np.where(slot == missing, np.nan, (slot + base) % missing))
        base = np.nan_to_num(found[-1])
    return found[0] if width == 1 else np.stack(found, 1)


def values_of(rollouts: dict[str, Any], name: str) -> np.ndarray:
    """[T] or [T, width] shown values; NaN where missing."""
    exact, scale = codes_of(rollouts, name), rollouts["columns"][name]["scale"]
    shown = {"linear": exact * scale, "square": exact * exact * scale, "log": np.exp(exact * scale)}
    return shown[rollouts["columns"][name]["law"]]


def ids_of(rollouts: dict[str, Any], name: str) -> np.ndarray:
    """[T] or [T, width] places in the vocabulary; -1 where missing."""
    column = rollouts["columns"][name]
    data, tokens, width, tail = inflated(column["data"]), rollouts["tokens"], column["width"], column["tail"]
    slots = [s for other in column.get("refers", ()) for s in np.atleast_2d(ids_of(rollouts, other).T)]
    rest = np.frombuffer(data[tokens * width :], np.uint8).reshape(tail, -1).T
    lower = iter(rest.tolist())
    found = []
    for number, code in enumerate(data[: tokens * width]):
        if code >= column["escape"]:
            high = bytes([code - column["escape"], *next(lower)])
            code = column["escape"] + int.from_bytes(high, "big")
        here = number % tokens
        found.append(
            -1 if not code else slots[code - 1][here] if code <= len(slots) else code - 1 - len(slots)
        )
    ids = np.array(found, int).reshape(width, -1)
    return ids[0] if width == 1 else ids.T


def text_of(entry: dict[str, Any]) -> str:
    """How a token is spelled: its text, a special token's name, or bytes in hex."""
    return str(entry.get("t", entry.get("s", entry.get("b"))))


def tokens_of(rollouts: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The texts of a row's tokens."""
    own = slice(row["offset"], row["offset"] + row["tokens"])
    return [text_of(rollouts["vocabulary"][place]) for place in ids_of(rollouts, "token")[own]]
