"""YAML for configurations: plain values only, with the same rules for bare words in reading and writing.

The rules are PyYAML's, except that `1e-4` is a number and a date is text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_VALUES, MOST_DEEP, MOST_SHOWN = 10_000, 20, 200
BARE_WORDS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"(?i:true|false|yes|no|on|off)",
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)",
    "float": r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
"""Patterns that give a bare word a type other than text; the first match wins."""


class RepeatedKeyError(ValueError):
    """A map has a duplicate key."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's own name for BARE_WORDS

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Reject duplicate keys; PyYAML silently keeps the last."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise RepeatedKeyError(
                        f"the key {shown(key.value)} is given twice (line {line}); keep one"
                    )
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quote text that `_Loader` would read as another type."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


for _tag, _pattern in BARE_WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


def read(text: str) -> Any:
    """Parse plain values (text, numbers, lists, maps with plain keys); otherwise a short ValueError."""
    try:
        return _plain(yaml.load(text, _Loader), [MOST_VALUES], 0)
    except RepeatedKeyError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # constructors raise arbitrary Python errors
        raise ValueError(short(" ".join(str(error).split()) or type(error).__name__)) from None


def write(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def write_line(values: dict[str, Any]) -> str:
    """The map on one line: `{a: 1, b: [x, y]}`."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=float("inf"))
    return text.rstrip("\n")


def _plain(value: Any, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > MOST_DEEP:
        raise ValueError(f"it holds more than {MOST_VALUES} values, or more than {MOST_DEEP} levels of them")
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str | int | float)]:
            raise ValueError(f"a key is {shown(wrong[0])}; use text")
        return {key: _plain(item, left, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, left, depth + 1) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("an integer has more than 64 bits")
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError(
            f"a value is of type {type(value).__name__}; use text, numbers, lists and dictionaries"
        )
    return value


def short(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def shown(value: Any) -> str:
    """A value for a message, cut to MOST_SHOWN characters."""
    try:
        return short(repr(value))
    except ValueError:  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"
