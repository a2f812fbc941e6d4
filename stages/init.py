"""Look at your own models and data, and write a configuration for them.

    dualkl init --student MODEL --teacher MODEL --data DATA

MODEL is a folder or a hub name, DATA a file, a folder or a hub data set (docs/data.md). Reads no weights.
Prints what it found and the plan, and writes a short file for `dualkl run` to --out FILE. --gpus N and
--gpu_memory GB (of one GPU) plan for another machine. Keys that are given are kept. Held-out prompts are
split off the data unless eval_dataset names others; --eval_prompts 0 turns evaluation off.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__)

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from cache.plain import plain
from stages import plan as planner
from stages.loops import cpu_plan, sizing
from stages.loops.sizing import Choice, Choices, Machine
from stages.loops.survey import Survey, findings
from stages.runtime import config as configuration
from stages.runtime import flags, yaml_text
from stages.runtime.config import SECTION_OF, SECTIONS, Config
from stages.runtime.errors import UserError, command
from stages.runtime.files import replace_text

EXAMPLE = "dualkl init --student MODEL --teacher MODEL --data FILE.jsonl"
LINES = (
    "run_name",
    "student_model",
    "teacher_model",
    "dataset",
    "num_prompts",
    "eval_prompts",
    "answer_checker",
    "max_prompt_tokens",
    "max_new_tokens",
    "batch_size",
    "max_steps",
    "lr",
)
"""Keys with a line and a comment of their own; the other keys of a section share a line."""
COMMENT_COLUMN = 42
SECTION_NOTES = {
    "rollout": "what a crash can cost: rollouts_per_unit",
    "refresh": "the current student writes new rollouts",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `dualkl init --help` lists what it takes.")


def main() -> None:
    own, rest = _own_arguments(sys.argv[1:])
    named = {"student_model": own.student, "teacher_model": own.teacher, "dataset": own.data}
    asked = configuration.parse_arguments([*_flags(named), *rest], __doc__ or "")
    files, texts = flags.split(rest, SECTION_OF, configuration.SWITCHES)
    if files:
        raise UserError(f"init writes a configuration and reads none, got {files[0]}; give single keys.")
    given = {leaf: sizing.value_of(asked, leaf) for leaf in named | texts}
    given.setdefault("run_name", _run_name(asked))
    path, machine = _free_path(own.out, given["run_name"]), _machine(own, asked.run.device)
    found, chosen = sizing.configure(asked, machine, given)
    _say(*findings(asked, found), f"machine   {machine}", "")
    chosen, lines = _planned(chosen, found, machine)
    _say(*lines, "")
    replace_text(path, file_text(chosen, path, machine))
    _say(f"wrote     {path}: change what you like", f"check     dualkl doctor {path}")
    _say(f"next      {_run(path, machine)}")


def _run(path: Path, machine: Machine) -> str:
    processes = machine.processes
    return (
        f"torchrun --nproc_per_node {processes} -m stages.pipeline {path}"
        if processes > 1
        else f"dualkl run {path}"
    )


def _say(*lines: str) -> None:
    for line in lines:
        print(plain(line, kept="\n"), flush=True)


def _own_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("student", "teacher", "data", "out"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--gpu_memory", type=float, default=0.0)
    own, rest = parser.parse_known_args(arguments)
    is_help = {"-h", "--help"} & {*rest}
    if missing := [name for name in ("student", "teacher", "data") if not getattr(own, name) and not is_help]:
        raise UserError(f"init needs --{' and --'.join(missing)}: {EXAMPLE}")
    for name in ("gpus", "gpu_memory"):
        if not 0 <= getattr(own, name) < float("inf"):
            raise UserError(f"{name} must be above 0, got {getattr(own, name)}.")
    return own, rest


def _flags(values: dict[str, str]) -> list[str]:
    return [f"--{leaf}={value}" for leaf, value in values.items() if value]


def _machine(own: argparse.Namespace, device: str) -> Machine:
    """This machine, or the one that --gpus and --gpu_memory describe."""
    here = sizing.this_machine(max(1, own.gpus), device)
    if not here.gib and own.gpus and not own.gpu_memory:
        raise UserError("no GPU here to plan for: give --gpu_memory, the GB of one GPU, with --gpus.")
    return Machine(here.processes, own.gpu_memory or here.gib, here.host)


def _run_name(asked: Config) -> str:
    """The student's name, with a number if a run has it."""
    base, runs = sizing.run_name(asked.models.student_model), Path(asked.run.runs_dir)
    names = (base, *(f"{base}-{i}" for i in range(2, 1000)))
    return next((name for name in names if not (runs / name).exists()), base)


def _planned(chosen: Choices, found: Survey, machine: Machine) -> tuple[Choices, list[str]]:
    """Lines of the plan, and the choices; activations are kept, not recomputed, if they fit."""
    config = sizing.config_of(chosen)
    data = found.data
    completion = (
        float(np.minimum(data.answers, config.rollout.max_new_tokens).mean()) if len(data.answers) else 0.0
    )
    prompt = float(np.minimum(data.lengths, config.data.max_prompt_tokens).mean())
    if machine.is_cpu:
        return chosen, cpu_plan.cpu_table(cpu_plan.make_cpu_plan(config, completion, prompt)).split("\n")
    cards = planner.machine_of(
        argparse.Namespace(gpus=machine.processes, gpu="", gpu_memory=machine.gib, zero2=False)
    )
    keeping = chosen | {"gradient_checkpointing": Choice(False)}
    for tried in [keeping] * ("gradient_checkpointing" not in chosen) + [chosen]:
        found_plan = planner.make_plan(sizing.config_of(tried), cards, completion, prompt)
        if found_plan.fits:
            break
    return tried, planner.table(found_plan).split("\n")


def _free_path(asked: str, name: str) -> Path:
    path = Path(asked or f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists and is not overwritten; remove it, or name another file with --out.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: the folder {path.parent} does not exist; make it first.")
    return path


def file_text(chosen: Choices, path: Path, machine: Machine) -> str:
    """The configuration as commented YAML: main keys on lines of their own, the others by section."""
    lines = [f"# Written by dualkl init. Run it: {_run(path, machine)}"]
    for leaf in (leaf for leaf in LINES if leaf in chosen):
        line, why = yaml_text.write_line({leaf: chosen[leaf].value})[1:-1], chosen[leaf].why
        lines.append(f"{line:<{COMMENT_COLUMN}}  # {why}" if why else line)
    return "\n".join([*lines, *_section_lines(chosen)]) + "\n"


def _section_lines(chosen: Choices) -> Iterator[str]:
    for name, section in SECTIONS.items():
        values = {leaf: chosen[leaf].value for leaf in section.model_fields if leaf in chosen}
        if own := {leaf: value for leaf, value in values.items() if leaf not in LINES}:
            about = f"  # {SECTION_NOTES[name]}" if name in SECTION_NOTES else ""
            yield f"{name}: {yaml_text.write_line(own)}{about}"


if __name__ == "__main__":
    command(main)
