"""Help on the configuration: one screen of the most used keys, all keys, and docs/configuration.md.

python -m stages.runtime.config > docs/configuration.md
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Sections = Mapping[str, type[BaseModel]]
HEIGHT, WIDTH = 40, 110
COMMON = {
    "run": ("run_name", "cache_dir", "device", "dtype"),
    "models": ("student_model", "teacher_model"),
    "lora": ("use_lora", "lora_r"),
    "data": ("dataset", "num_prompts", "max_prompt_tokens"),
    "rollout": ("group_size", "max_new_tokens", "gen_micro_batch"),
    "teacher_signal": ("signal",),
    "loss": ("tau", "alpha", "gating"),
    "train": ("batch_size", "grad_accum", "max_steps", "lr"),
    "refresh": ("refresh_every", "rollouts_per_refresh"),
    "eval": ("eval_dataset", "eval_prompts", "answer_checker"),
}
"""The keys that the short help shows."""
TYPES = {bool: "true|false", int: "N", float: "X", str: "TEXT", dict: "MAP"}
INTRODUCTION = """# Configuration

Made from `stages/runtime/config.py` by `python -m stages.runtime.config > docs/configuration.md`.

Every command takes configuration files, of which later ones win, and any key as a flag, which wins over
files: `dualkl run mine.yaml --tau 0.5`. Sections group keys for the reader; a file may leave them out. Names
are unique. A value is plain YAML: `--dataset '{a.jsonl: 3, b.jsonl: 1}'`. The defaults are for an 8B student
or smaller on 80 GB GPUs; `student_model`, `teacher_model` and `dataset` have none. `dualkl init` writes a
file for your models and data.
"""


def help_asked(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def help_text(description: str, sections: Sections, every_key: bool) -> str:
    """Help of a command that takes the configuration: at most HEIGHT lines, or `every_key` in full."""
    footer = ["", "--help all shows every key; docs/configuration.md explains them."]
    keys = [*_every_key(sections)] if every_key else [*_common_keys(sections), *footer]
    keys = ["", "keys, as --KEY VALUE, and configuration files, as FILE or --config FILE:", *keys]
    head = list[str]()
    for paragraph in description.strip().split("\n\n"):
        lines = [*head, ""] * bool(head) + paragraph.splitlines()
        if head and not every_key and len(lines) + len(keys) > HEIGHT:
            break
        head = lines
    return "\n".join([*head, *keys])


def _common_keys(sections: Sections) -> Iterator[str]:
    for name, leaves in COMMON.items():
        for i, leaf in enumerate(leaves):
            field = sections[name].model_fields[leaf]
            label = name.removeprefix("teacher_") if i == 0 else ""
            start = f"{label:<9}{_flag(leaf, field):<41} "
            yield start + _brief(str(field.description), WIDTH - len(start))


def _brief(text: str, room: int) -> str:
    """`text`, cut to `room` characters where a part of it ends."""
    if len(text) <= room:
        return text
    end = max(text.rfind(mark, 0, room) for mark in ("; ", ", ", " ("))
    if text.count("(", 0, end) > text.count(")", 0, end):
        end = text.rfind(" (", 0, end)
    return text[:end] if end > 0 else text[: room - 1] + "…"


def _every_key(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        yield f"\n{name}"
        for leaf, field in section.model_fields.items():
            yield f"  {_flag(leaf, field)}"
            yield from wrap(str(field.description), WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _flag(leaf: str, field: FieldInfo) -> str:
    """`--lr X (0.0001)`: the flag, what it takes and its default."""
    default = "" if field.default == "" else f" ({_plain(field.default)})"
    return f"--{leaf} {values_of(field.annotation)}{default}"


def values_of(annotation: Any) -> str:
    """What a key takes: `a|b` for choices, else a word for the type."""
    origin = get_origin(annotation)
    if origin is Literal:
        return "|".join(map(str, get_args(annotation)))
    if origin is Annotated:
        return values_of(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys(values_of(each) for each in get_args(annotation)))
    return TYPES[origin or annotation]


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def reference(sections: Sections) -> str:
    """The text of docs/configuration.md."""
    lines = [INTRODUCTION]
    for name, section in sections.items():
        lines += [f"## {name}", "", "| key | values | default | |", "|---|---|---|---|"]
        for leaf, field in section.model_fields.items():
            default = "" if field.default == "" else f"`{_plain(field.default)}`"
            values = values_of(field.annotation).replace("|", " \\| ")
            meaning = str(field.description).replace("|", "\\|").replace("<", "\\<")
            lines.append(f"| `{leaf}` | {values} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)
