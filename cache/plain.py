"""Makes text from untrusted sources (models, data sets, other caches) safe to print on a terminal."""

from __future__ import annotations

import unicodedata

_STEERING = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # controls (C0, DEL, C1), bidi and other formats, surrogates, line ends
_JOINERS = "\u200c\u200d"  # format characters used by Persian, Hindi and emoji, which only join


def plain(text: str, kept: str = "") -> str:
    """Escape every control and format character in `text` (ESC becomes `\x1b`), except those in `kept`.

    Printable text in any language is unchanged.
    """
    if text.isprintable():
        return text
    return "".join(c if c in kept or not _steers(c) else c.encode("unicode_escape").decode() for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _STEERING and character not in _JOINERS
