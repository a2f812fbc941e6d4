"""Texts of token ids: as text, as a special token, or as bytes that are no text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Entry = dict[str, Any]
Int = npt.NDArray[np.int64]


def _byte_of_character() -> dict[str, int]:
    """The byte of each character of byte-level BPE, as in GPT-2's `bytes_to_unicode`."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_of_character()


class Speller:
    """Spells token ids with a tokenizer.json; ids alone without one."""

    def __init__(self, path: Path | None) -> None:
        self._tokenizer: Any = None
        self._special: dict[int, str] = {}
        self._added: dict[int, str] = {}  # not special, and written as they are
        self._is_byte_level = False
        if path is not None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_buffer(path.read_bytes())  # its path may be no text
            added = self._tokenizer.get_added_tokens_decoder()
            self._special = {number: token.content for number, token in added.items() if token.special}
            self._added = {n: token.content for n, token in added.items() if not token.special}
            self._is_byte_level = "ByteLevel" in repr(self._tokenizer.decoder)

    @property
    def knows_texts(self) -> bool:
        return self._tokenizer is not None

    @property
    def special_texts(self) -> set[str]:
        return set(self._special.values())

    def entry(self, token: int) -> Entry:
        """`id`, and `t` its text, `s` the name of a special token, or `b` bytes that are no text, in hex."""
        if self._tokenizer is None:
            return {"id": token, "t": f"{token} "}
        if token in self._special:
            return {"id": token, "s": self._special[token]}
        if token in self._added:
            return {"id": token, "t": self._added[token]}
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return {"id": token, "s": f"id {token}"}
        data = _raw_bytes(piece, self._is_byte_level)
        if data is not None:
            try:
                return {"id": token, "t": data.decode()}
            except UnicodeDecodeError:
                return {"id": token, "b": data.hex(" ")}
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return {"id": token, "t": text} if text and "\ufffd" not in text else {"id": token, "t": piece}

    def text(self, ids: Iterable[int]) -> str | None:
        """The text of several ids, with special tokens; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        spelled: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return spelled


def _raw_bytes(piece: str, is_byte_level: bool) -> bytes | None:
    """The bytes of a vocabulary entry of a byte-level or SentencePiece tokenizer; None if it is neither."""
    if is_byte_level:
        known = all(character in _BYTES for character in piece)
        return bytes(_BYTES[character] for character in piece) if known else piece.encode()
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    if "▁" in piece:
        return piece.replace("▁", " ").encode()
    return None


class Vocabulary:
    """The tokens that a page shows, numbered in the order of `entries`, most frequent first."""

    def __init__(self, columns: Iterable[Int]) -> None:
        counts: dict[int, int] = {}
        for column in columns:
            ids, times = np.unique(column[column >= 0], return_counts=True)
            for token, count in zip(ids.tolist(), times.tolist(), strict=True):
                counts[token] = counts.get(token, 0) + count
        self._tokens = sorted(counts, key=lambda token: (-counts[token], token))
        self._place = np.full(max(counts, default=-1) + 2, -1, np.int64)
        self._place[self._tokens] = np.arange(len(self._tokens))

    def places(self, ids: Int) -> Int:
        """Places in `entries`; -1 for -1."""
        return self._place[ids]  # -1 is the last entry, -1

    def entries(self, spell: Callable[[int], Entry]) -> list[Entry]:
        return [spell(token) for token in self._tokens]
