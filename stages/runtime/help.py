"""Help on the configuration: one screen of the most used keys, all keys, and docs/configuration.md.

python -m stages.runtime.config > docs/configuration.md
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping
from textwrap import wrap
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Sections = Mapping[str, type[BaseModel]]
HEIGHT, WIDTH = 40, 80
COMMON = {
    "run": {
        "run_name": "the run's folder below runs_dir",
        "device": "where it computes",
        "dtype": "compute and frozen weights",
    },
    "models": {
        "student_model": "folder, or NAME or NAME@REVISION on the hub",
        "teacher_model": "the same",
    },
    "lora": {"use_lora": "false: train all weights", "lora_r": "rank"},
    "data": {
        "dataset": "prompts: file, folder or hub name",
        "num_prompts": "prompts that are used; 0: all",
        "max_prompt_tokens": "longer prompts are skipped",
    },
    "rollout": {
        "group_size": "completions for each prompt",
        "max_new_tokens": "longest completion",
        "gen_micro_batch": "rollouts decoded together",
    },
    "teacher_signal": {"signal": "kept of the teacher"},
    "loss": {
        "tau": "gate threshold on the reverse KL, nats",
        "alpha": "gate sharpness, 1/nats",
        "gating": "gate, or weight of the reverse KL",
    },
    "train": {
        "batch_size": "rollouts in an optimizer step",
        "micro_batch_tokens": "most tokens of a forward",
        "max_steps": "optimizer steps",
        "lr": "peak learning rate",
    },
    "refresh": {
        "refresh_every": "steps between refreshes; 0: none",
        "rollouts_per_refresh": "rollouts of each refresh",
    },
    "eval": {
        "eval_prompts": "held-out prompts; 0: no evaluation",
        "eval_dataset": "empty: split off dataset",
        "answer_checker": "gsm8k, or FILE.py:FUNCTION; empty: none",
    },
}
"""The keys that the short help shows, with what they mean in a few words."""
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


def help_text(
    description: str,
    sections: Sections,
    every_key: bool,
    groups: Collection[str] = tuple(COMMON),
    are_chosen: bool = False,
) -> str:
    """Help of a command that takes the configuration: the most used keys of `groups`, or every key.

    `are_chosen`: the command chooses values for keys that are not given.
    """
    keys = [*_every_key(sections)] if every_key else [*_common_keys(sections, groups, are_chosen)]
    about = "keys (default), as --KEY VALUE or in configuration files:"
    if are_chosen:
        about = "keys, as --KEY VALUE; what is not given is chosen for your models and data:"
    lines = [description.strip(), "", about, *keys, ""]
    lines += ["--quiet: only results and warnings. --json: the result as JSON on stdout."]
    lines += [] if every_key else ["--help all: every key, as in docs/configuration.md."]
    return "\n".join(lines)


def _common_keys(sections: Sections, groups: Collection[str], are_chosen: bool) -> Iterator[str]:
    for name in groups:
        for i, (leaf, meaning) in enumerate(COMMON[name].items()):
            field = sections[name].model_fields[leaf]
            label = name.removeprefix("teacher_") if i == 0 else ""
            flag = f"--{leaf} {values_of(field.annotation)}"
            yield f"{label:<8}{flag:<27} {meaning}{'' if are_chosen else _default(field)}"


def _every_key(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        yield f"\n{name}"
        for leaf, field in section.model_fields.items():
            yield f"  {_flag(leaf, field)}"
            yield from wrap(str(field.description), WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _flag(leaf: str, field: FieldInfo) -> str:
    """`--lr X (0.0001)`: the flag, what it takes and its default."""
    return f"--{leaf} {values_of(field.annotation)}{_default(field)}"


def _default(field: FieldInfo) -> str:
    return "" if field.default == "" else f" ({_plain(field.default)})"


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
