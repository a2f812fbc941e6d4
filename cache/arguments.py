"""Command lines read by argparse, with mistakes as one sentence that names the nearest option."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from cache.schema import CacheError


def nearest(word: str, known: Iterable[str]) -> str:
    """The name that `word` resembles most; "" if there is none."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, 0.5)), "")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations. A mistake raises `mistake` with one sentence.

    Subcommands set the default `parser` to their own parser, so that an unknown option is looked up there.
    """

    mistake: type[Exception] = CacheError

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ").replace("expected one argument", "needs a value")
        missing = text.removeprefix("the following arguments are required: ")
        text = text if missing == text else f"{missing} is missing"
        raise self.mistake(f"{text}; `{self.prog} --help` lists what it takes.")

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """Parse all of `arguments` (None: the command line)."""
        found, rest = self.parse_known_args(arguments)
        if rest:
            raise self.mistake(self.unknown(rest[0], getattr(found, "parser", self)))
        return found

    @staticmethod
    def unknown(word: str, parser: argparse.ArgumentParser) -> str:
        """A sentence about an argument that `parser` does not take."""
        if not word.startswith("-"):
            return f"unexpected argument {word}; `{parser.prog} --help` lists what it takes."
        options = [name for action in parser._actions for name in action.option_strings]
        near = nearest(word.partition("=")[0], options)
        hint = f"did you mean {near}?" if near else f"`{parser.prog} --help` lists what it takes."
        return f"unknown option {word.partition('=')[0]} of {parser.prog}; {hint}"


def choice(*names: str) -> Callable[[str], str]:
    """A type for `add_argument`: one of `names`."""

    def checked(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(names)}, got {text}")
        return text

    return checked


def whole(text: str) -> int:
    """A type for `add_argument`: a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text}") from None


def positive(text: str) -> int:
    """A type for `add_argument`: a whole number above 0."""
    if (number := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return number


def positive_number(text: str) -> float:
    """A type for `add_argument`: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number
