"""Text of models, data sets and other people's caches, made safe to print: it cannot steer a terminal."""

from __future__ import annotations

import unicodedata

_STEERING = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # controls (C0, DEL, C1), bidi and other formats, surrogates, line ends
_JOINERS = "\u200c\u200d"  # formats that Persian, Hindi and emoji are written with, and that only join


def plain(text: str, kept: str = "") -> str:
    """`text` with every character that a terminal would obey as its escape (ESC becomes `\\x1b`), but for those in `kept`.

    What is left prints as it is, in any language.
    """
    if text.isprintable():
        return text
    return "".join(c if c in kept or not _steers(c) else c.encode("unicode_escape").decode() for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _STEERING and character not in _JOINERS
