"""Look at your models and data, and write a configuration for them.

    dualkl init --student MODEL --teacher MODEL --data DATA

MODEL is a folder or a hub name, DATA a file, folder or hub data set. Reads no
weights. Prints what it found and the plan; keys that are given are kept.
Held-out prompts are split off the data unless eval_dataset names others.

    --out FILE           the file to write (default: the student's name.yaml)
    --gpus N             GPUs to plan for (default: those here)
    --gpu_memory GB      memory of each of them
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "init")

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.plain import plain
from stages import plan as planner
from stages.data.checkers import open_checker
from stages.loops import cpu_plan, sizing
from stages.loops.sizing import Choice, Choices, Machine
from stages.loops.survey import Survey, findings
from stages.runtime import options, yaml_text
from stages.runtime.config import OF_GATE, SECTIONS, Config
from stages.runtime.errors import UserError, command
from stages.runtime.files import replace_text
from stages.runtime.terminal import take_style

SHOWN = (
    "run_name",
    "use_lora",
    "lora_r",
    "tau",
    "alpha",
    "gating",
    "eval_prompts",
    "answer_checker",
    "num_prompts",
    "max_prompt_tokens",
    "max_new_tokens",
    "batch_size",
    "max_steps",
    "lr",
    "refresh_every",
    "rollouts_per_refresh",
)
"""Keys that the file holds whatever their value; others only if they are given or not the default."""
MANY_LONGER = 0.1
"""Share of the data's answers above max_new_tokens that is remarked on."""
NOTES = {
    "lora": "use_lora: false trains all weights, which needs a tenth of this lr; lora_r: rank",
    "loss": "gating: weight of the reverse KL, the forward KL has the rest; soft: a gate by tau and alpha",
    "gate": "the reverse KL (nats) trains tokens where it is below tau, the forward KL those above; alpha:"
    " sharpness",
    "refresh": "steps between refreshes, and the rollouts that the current student writes at each",
}


@dataclass(frozen=True)
class Place:
    """Where the file goes and what the run is called. `remark`: why another name was taken, or ""."""

    path: Path
    run_name: str
    remark: str


def main() -> None:
    style, arguments = take_style(sys.argv[1:])
    own, texts, asked = options.of_init(arguments)
    given = {leaf: sizing.value_of(asked, leaf) for leaf in texts}
    open_checker(asked.eval.answer_checker)
    place, machine = _place(own.out, asked, given.get("run_name")), _machine(own, asked.run.device)
    found, chosen = sizing.configure(asked, machine, given | {"run_name": place.run_name})
    seen = [*findings(asked, found), *_about_evaluation(chosen), *_about_lengths(chosen, found)]
    seen.append(f"machine   {machine}")
    style.say("\n".join([*seen, ""]))
    chosen, plan = _planned(chosen, found, machine)
    style.say("\n".join([*plan, ""]))
    replace_text(place.path, file_text(chosen, place.path, machine, set(given)))
    run = _run(place.path, machine)
    written = f"wrote     {place.path}: change what you like{place.remark}"
    facts: dict[str, Any] = {
        "file": str(place.path),
        "run_name": place.run_name,
        "run": run,
        "found": seen,
        "plan": plan,
    }
    facts["configuration"] = {leaf: choice.value for leaf, choice in chosen.items()}
    style.conclude(f"{written}\ncheck     dualkl doctor {place.path}\nnext      {run}", facts)


def _about_evaluation(chosen: Choices) -> Iterator[str]:
    number, other = chosen["eval_prompts"].value, chosen.get("eval_dataset", Choice("")).value
    if not number:
        yield "held out  none: evaluation is off"
    elif other:
        yield f"held out  {number:,} prompts of {other}; --eval_prompts 0 turns evaluation off"
    else:
        yield (
            f"held out  {number:,} prompts, split off the data (others: --eval_dataset; none: --eval_prompts 0)"
        )
    if number:
        checker = chosen.get("answer_checker", Choice("")).value
        yield f"answers   checked by {checker}" if checker else "answers   not checked (--answer_checker)"


def _about_lengths(chosen: Choices, found: Survey) -> Iterator[str]:
    most = chosen["max_new_tokens"].value
    longer = found.data.answers_longer_than(most)
    if longer > MANY_LONGER:
        yield (
            f"note      {longer:.0%} of the data's answers are longer than max_new_tokens {most}; completions"
            " that are cut lack their end, so raise it unless this is a trial"
        )


def _run(path: Path, machine: Machine) -> str:
    processes = machine.processes
    return (
        f"torchrun --nproc_per_node {processes} -m stages.pipeline {path}"
        if processes > 1
        else f"dualkl run {path}"
    )


def _machine(own: argparse.Namespace, device: str) -> Machine:
    """This machine, or the one that --gpus and --gpu_memory describe."""
    here = sizing.this_machine(max(1, own.gpus), device)
    if not here.gib and own.gpus and not own.gpu_memory:
        raise UserError("no GPU here to plan for: give --gpu_memory, the GB of one GPU, with --gpus.")
    return Machine(here.processes, own.gpu_memory or here.gib, here.host)


def _place(out: str, asked: Config, name: str | None) -> Place:
    """The file, and the run's name: `name`, or the student's with a number if a run or file has it."""
    runs, base = Path(asked.run.runs_dir), sizing.run_name(asked.models.student_model)
    remark = ""
    if name is None:
        names = (base, *(f"{base}-{i}" for i in range(2, 1000)))
        name = next((n for n in names if not (_taken(n, runs, out))), base)
        if name != base:
            remark = (
                f"\nnote      {_taken(base, runs, out)} exists, so this run is called {name}; --run_name NAME"
                " gives it another name"
            )
    return Place(_free_path(out, name), name, remark)


def _taken(name: str, runs: Path, out: str) -> str:
    """The run or file that has the name; "" if it is free. `out`: the file, if the user named it."""
    paths = [runs / name, *([] if out else [Path(f"{name}.yaml")])]
    return next((str(path) for path in paths if path.exists()), "")


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


def file_text(chosen: Choices, path: Path, machine: Machine, given: set[str]) -> str:
    """The configuration as YAML: a line for each section, below a comment, at most 20 lines."""
    config = sizing.config_of(chosen)
    why = {leaf: choice.why for leaf, choice in chosen.items() if choice.why}
    lines = [f"# Written by dualkl init; change what you like, then: {_run(path, machine)}"]
    for name, section in SECTIONS.items():
        values = {leaf: sizing.value_of(config, leaf) for leaf in section.model_fields}
        kept = {
            leaf: value
            for leaf, value in values.items()
            if (leaf in SHOWN and (config.loss.has_threshold or leaf not in OF_GATE))
            or leaf in given
            or value != section.model_fields[leaf].default
        }
        if kept:
            lines += [f"# {plain(note)}"] if (note := _note(name, kept, why)) else []
            lines.append(f"{name}: {yaml_text.write_line(kept)}")
    return "\n".join(lines) + "\n"


def _note(section: str, kept: dict[str, Any], why: dict[str, str]) -> str:
    """The comment on a section; "" for none."""
    if section == "loss" and "tau" in kept:
        return NOTES["gate"]
    if section == "eval":
        off = "0: no evaluation" if kept["eval_prompts"] else "so there is no evaluation"
        return f"held-out prompts, {off}; answer_checker: gsm8k, or FILE.py:FUNCTION(row, completion) -> bool"
    about = [f"{leaf}: {why[leaf]}" for leaf in kept if leaf in why]
    return NOTES.get(section) or "; ".join(about)


if __name__ == "__main__":
    command(main)
