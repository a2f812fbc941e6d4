"""Estimate whether a run fits, its duration and its cache's size.

    dualkl plan FILE --gpus 2 --gpu_memory 80

Loads no weights: of each model, config.json or its hub name is enough. Exit
code 0 if the run fits, 1 if not. Without a GPU here, and with --device cpu, it
plans this machine's CPU unless a GPU is named. With --role generate or score,
plans the GPUs of those processes alone.

    --gpus N                       GPUs of the machine (default: those here)
    --gpu h100|h200|a100|a100-40|a800
    --gpu_memory GB                memory of each GPU
    --mean_completion_tokens X     default: max_new_tokens
    --mean_prompt_tokens X         default: max_prompt_tokens
    --zero2                        recipes/accelerate_zero2.yaml is used
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "plan")

import argparse
import logging
import sys
from typing import Any

import torch

from stages.loops.cpu_plan import cpu_json, cpu_table, make_cpu_plan
from stages.loops.planning import Machine, Phase, Plan, make_plan
from stages.models.memory import GIB
from stages.models.speed import GPUS, gpu_for
from stages.runtime import options
from stages.runtime.config import Config
from stages.runtime.errors import UserError, command
from stages.runtime.terminal import take_style


def main() -> None:
    # report an unreachable hub once, not once per retry
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    style, arguments = take_style(sys.argv[1:])
    own, config = options.of_plan(arguments)
    means = own.mean_completion_tokens or 0.0, own.mean_prompt_tokens or 0.0
    if _is_cpu(own, config):
        cpu_plan = make_cpu_plan(config, *means)
        style.conclude(cpu_table(cpu_plan), cpu_json(cpu_plan))
        fits = cpu_plan.fits
    else:
        plan = make_plan(config, machine_of(own), *means)
        style.conclude(table(plan), as_json(plan))
        fits = plan.fits
    if not fits:
        raise SystemExit(1)


def _is_cpu(own: argparse.Namespace, config: Config) -> bool:
    """Whether no GPU is described, and the run would find none or is told to use none."""
    is_described = own.gpu or own.gpu_memory or own.gpus or own.zero2
    return not is_described and (config.run.device == "cpu" or not torch.cuda.is_available())


def machine_of(own: argparse.Namespace) -> Machine:
    """The machine given by the options, completed from the local GPUs; UserError if that is not enough."""
    here = torch.cuda.device_count()
    gib = own.gpu_memory
    if gib is None and not own.gpu:
        if not here:
            raise UserError(
                f"no GPU here to plan for: give --gpu ({', '.join(GPUS)}) or --gpu_memory (GB of one card),"
                " and --gpus."
            )
        gib = torch.cuda.get_device_properties(0).total_memory / GIB
    gpu = gpu_for(own.gpu, gib)
    # a GPU sold as 80 GB reports 79.1 GiB, one sold as 141 GB reports 139.8 GiB
    reported = gpu.gib if gib is None else min(gib, gpu.gib) if gib <= 1.02 * gpu.gib else gib
    return Machine(gpu, own.gpus or max(1, here), reported, own.zero2)


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures, in bytes, tokens/s and hours."""
    return {
        "fits": plan.fits,
        "spare_bytes": round(plan.spare),
        "usable_bytes": round(plan.machine.usable),
        "gpus": plan.machine.num_gpus,
        "gpu": plan.machine.gpu.name,
        "student_parameters": plan.student.parameters,
        "teacher_parameters": plan.teacher.parameters,
        "trained_parameters": plan.trained,
        "phases": {
            p.name: {"peak": round(p.peak), **{k: round(v) for k, v in p.parts.items()}} for p in plan.phases
        },
        "tokens_per_second": plan.rates,
        "hours": plan.hours,
        "rollouts": plan.rollouts,
        "mean_completion_tokens": plan.mean_completion,
        "mean_prompt_tokens": plan.mean_prompt,
        "cache_bytes": round(plan.cache_bytes),
        "cache_bytes_per_token": plan.bytes_per_token,
        "host_bytes_while_loading": plan.host_bytes,
        "lower": plan.advice,
    }


def table(plan: Plan) -> str:
    """The verdict, a line for each phase with its largest parts, speeds and sizes."""
    reads = f"; one process reads {plan.host_bytes / GIB:.0f} GiB of teacher into host memory"
    return "\n".join(
        [
            f"{_verdict(plan)} A plan, not a measurement.",
            f"student {plan.student.parameters / 1e9:.2f}B ({plan.trained / 1e9:.3f}B trained), teacher"
            f" {plan.teacher.parameters / 1e9:.2f}B{reads if plan.host_bytes else ''}",
            "",
            f"{'phase':<10}{'GiB/card':>9}{'tokens/s':>10}{'hours':>7}  largest parts, GiB",
            *(_phase_line(plan, phase) for phase in plan.phases),
            "",
            f"hours     {sum(plan.hours.values()):.1f} without loading and evaluation, {plan.rollouts:,}"
            " rollouts with refreshes",
            f"cache     {plan.cache_bytes / 1e9:.1f} GB, {plan.bytes_per_token:.0f} bytes a token",
            f"assumed   completions of {plan.mean_completion:,.0f} and prompts of {plan.mean_prompt:,.0f}"
            " tokens on average (--mean_completion_tokens, --mean_prompt_tokens)",
        ]
    )


def _verdict(plan: Plan) -> str:
    machine, worst = plan.machine, plan.worst
    cards = f"{machine.num_gpus} × {machine.gpu.name.upper()}, {machine.usable / GIB:.1f} GiB usable each"
    if plan.fits:
        return f"It fits: {cards}; {plan.spare / GIB:.1f} GiB spare in the fullest phase ({worst.name})."
    lacks = f"{worst.name} lacks {-plan.spare / GIB:.1f} GiB"
    return f"It does NOT fit: {cards}; {lacks}. Lower: {'; then '.join(plan.advice)}."


def _phase_line(plan: Plan, phase: Phase) -> str:
    """One phase: peak, speed, hours, and its five largest parts from 0.05 GiB on."""
    parts = sorted(((v, k) for k, v in phase.parts.items() if v >= 0.05 * GIB), reverse=True)[:5]
    rate, hours = plan.rates.get(phase.name), plan.hours.get(phase.name)
    return (
        f"{phase.name:<10}{phase.peak / GIB:>9.1f} {f'{rate:,.0f}' if rate else '–':>9}"
        f"{f'{hours:.1f}' if hours else '–':>7}  {', '.join(f'{k} {v / GIB:.1f}' for v, k in parts)}"
    )


if __name__ == "__main__":
    command(main)
