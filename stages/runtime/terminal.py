"""What a command prints: progress and results for people, or one JSON object for programs."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from cache.plain import plain

SECONDS = 10.0
"""Between two lines of progress, where they are not redrawn."""


@dataclass(frozen=True)
class Style:
    """`quiet`: only results, warnings and errors. `json`: the result as JSON, all else on stderr."""

    quiet: bool = False
    json: bool = False

    def say(self, text: str, is_result: bool = False) -> None:
        if not self.quiet or is_result or text.startswith("warning: "):
            tqdm.write(plain(text, kept="\n"), file=sys.stderr if self.json else sys.stdout)
            sys.stdout.flush()

    def conclude(self, text: str, facts: dict[str, Any]) -> None:
        """Print the result of a command, in words or as JSON."""
        if not self.json:
            self.say(text, is_result=True)
        else:
            escaped = json.dumps(facts, indent=1).replace("\x7f", "\\u007f")  # JSON leaves it as it is
            print(escaped, flush=True)


def take_style(arguments: list[str]) -> tuple[Style, list[str]]:
    """Split `--quiet` and `--json` off a command line."""
    rest = [word for word in arguments if word not in ("--quiet", "--json")]
    return Style("--quiet" in arguments, "--json" in arguments), rest


class Bar:
    """Progress on stderr: a bar on a terminal, else a line every SECONDS and at the end; a context manager.

    `at_once`: the first update is a line too.
    """

    def __init__(
        self, what: str, unit: str, total: int, done: int = 0, *, shown: bool = True, at_once: bool = False
    ) -> None:
        self._what, self._unit, self._total, self._done, self._first = what, unit, total, done, done
        self._start = time.monotonic()
        self._told = -SECONDS if at_once else self._start
        self._has_told = False
        is_terminal = sys.stderr.isatty()
        self._has_lines = shown and not is_terminal
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            desc=what,
            leave=at_once,
            disable=not shown or not is_terminal,
        )

    def update(self, count: int, figures: str) -> None:
        self._done += count
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        is_end = self._done >= self._total and self._has_told
        if self._has_lines and (is_end or now - self._told >= SECONDS):
            self._told, self._has_told = now, True
            print(plain(self._line(now, figures)), file=sys.stderr, flush=True)

    def _line(self, now: float, figures: str) -> str:
        done = self._done - self._first
        left = (self._total - self._done) * (now - self._start) / done if done else 0.0
        how_long = f", {tqdm.format_interval(left)} left" if self._done < self._total else ""
        return f"{self._what}: {self._done:,} of {self._total:,} {self._unit}s{how_long}; {figures}"

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
