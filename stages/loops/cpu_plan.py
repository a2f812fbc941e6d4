"""Plan a run on this machine's CPU: its duration, from the measured rate of a matrix product, and its memory.

Rough: a factor of two either way is to be expected.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from stages.loops import probe
from stages.loops.budgets import CPU_GEN_ROWS, CPU_SCORE_TOKENS, CPU_TRAIN_ROWS
from stages.loops.planning import LOSS_GIB, Machine, Parts, Plan, make_plan, total
from stages.models import memory
from stages.models.memory import GIB
from stages.models.speed import GPUS
from stages.runtime import host_memory
from stages.runtime.config import Config

# Shares of a matrix product's rate, measured on 2 cores with SmolLM2-135M as the teacher.
DECODE_SHARE, FORWARD_SHARE, PROBE_SHARE = 0.45, 0.8, 0.5
PROBE_FORWARDS = 3  # of the student, of its completions' first tokens
LAYER_SECONDS = 2e-4  # at least, of one layer in a decode step: a dozen small operations
LIKELY_SHARE = 0.75  # of max_new_tokens, for completions of unknown length
LIBRARIES = 1.0 * GIB  # Python with PyTorch and transformers
MEASURED_SECONDS = 0.5
START_SECONDS = 8.0  # of imports and checks
READ_BYTES = 2e8  # a second, of weights that are read, converted and checked
SHORT_MINUTES = 10.0  # plans of less show tenths


@dataclass(frozen=True)
class CpuPlan:
    """A run on one machine without GPUs. `rate`: FLOP/s of a float32 matrix product.

    `plan`: the same run on a GPU, for the sizes that no machine changes.
    """

    plan: Plan
    rate: float
    host_bytes: float

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def fits(self) -> bool:
        return self.peak <= self.host_bytes

    @property
    def peak(self) -> float:
        return total(self.parts)

    @cached_property
    def parts(self) -> Parts:
        """Bytes of one process at its fullest, with both models in memory."""
        plan, config = self.plan, self.config
        optimizer, gradients = memory.state_bytes(plan.trained, 1, zero2=False)
        is_lora = config.lora.use_lora
        kept, passing = memory.training_bytes(
            plan.student, plan.student_b, config.train.gradient_checkpointing, is_lora
        )
        tokens = config.train.micro_batch_tokens
        rows = config.rollout.lp_micro_batch
        most = plan.longest * min(
            CPU_TRAIN_ROWS if rows == "auto" else rows, config.train.batch_size // config.train.grad_accum
        )
        slots = config.rollout.gen_micro_batch
        slots = min(CPU_GEN_ROWS if slots == "auto" else slots, config.rollout.rollouts_per_unit)
        scored = CPU_SCORE_TOKENS if tokens == "auto" else tokens
        return {
            "student": float(plan.student.parameters * (plan.student_b if is_lora else 4)),
            "teacher": float(plan.teacher.parameters * plan.teacher_b),
            "optimizer and gradients": float(optimizer + gradients),
            "activations": float((most if tokens == "auto" else min(most, tokens)) * (kept + passing)),
            "keys and values": float(slots * plan.longest * memory.kv_bytes(plan.student, plan.student_b)),
            "scoring": float(scored * memory.forward_bytes(plan.teacher, plan.teacher_b)),
            "loss": LOSS_GIB[False] * GIB / 4,
            "libraries": LIBRARIES,
        }

    @cached_property
    def hours(self) -> dict[str, float]:
        """By phase; `check` compares the engine with training, `load` includes the start of the command."""
        plan, config = self.plan, self.config
        tokens = plan.mean_prompt + plan.mean_completion
        student, teacher = (2.0 * shape.parameters for shape in (plan.student, plan.teacher))
        heldout, rows = config.eval.eval_prompts, config.train.max_steps * config.train.batch_size
        flops = (4 if config.lora.use_lora else 6) + (2 if config.train.gradient_checkpointing else 0)
        forward = FORWARD_SHARE * self.rate
        # the student's greedy answers and its text before and after, and the teacher's once; KLs on both texts
        measured = self._decoding(4 * heldout) + self._decoding(2 * heldout) * teacher / student
        measured += heldout * tokens * (3 * teacher + 4 * student) / forward
        probed = probe.num_rows(config)
        length = plan.mean_prompt + min(plan.mean_completion, probe.TOKENS)
        checks = self._num_refreshes * probed * length * PROBE_FORWARDS * student
        seconds = {
            "evaluate": measured,
            "generate": self._decoding(plan.rollouts),
            "score": plan.rollouts * tokens * teacher / forward,
            "check": checks / PROBE_SHARE / self.rate,
            "train": rows * tokens * flops * student / 2 / forward,
            "load": START_SECONDS + 4 * (plan.student.parameters + plan.teacher.parameters) / READ_BYTES,
        }
        return {name: value / 3600 for name, value in seconds.items()}

    @property
    def _num_refreshes(self) -> int:
        """Stage one counts as one."""
        refresh, last = self.config.refresh, self.config.train.max_steps - 1
        every = refresh.refresh_every if refresh.refresh_mode != "off" else 0
        return 1 + (last // every if every else 0)

    def _decoding(self, rows: int) -> float:
        """Seconds in which the student writes so many completions."""
        plan, given = self.plan, self.config.rollout.gen_micro_batch
        slots = max(1, min(rows, CPU_GEN_ROWS if given == "auto" else given))
        work = rows * (plan.mean_prompt + plan.mean_completion) * 2 * plan.student.parameters
        steps = rows * plan.mean_completion / slots
        return max(work / DECODE_SHARE / self.rate, steps * plan.student.layers * LAYER_SECONDS)


def make_cpu_plan(config: Config, mean_completion: float = 0.0, mean_prompt: float = 0.0) -> CpuPlan:
    """Plan `config` on this machine, whose speed is measured for half a second.

    A mean of 0: `LIKELY_SHARE` of max_new_tokens, or half of max_prompt_tokens. Errors: as `make_plan`.
    """
    likely = mean_completion or LIKELY_SHARE * config.rollout.max_new_tokens
    prompt = mean_prompt or config.data.max_prompt_tokens / 2
    plan = make_plan(config, Machine(GPUS["h100"], 1, GPUS["h100"].gib), likely, prompt)
    return CpuPlan(plan, matmul_rate(), float(host_memory.total_bytes()))


def matmul_rate() -> float:
    """FLOP/s of a float32 matrix product on this CPU: the best of those within half a second."""
    left, right, product = torch.rand(2048, 1024), torch.rand(1024, 1024), torch.empty(2048, 1024)
    best, end = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while (started := time.perf_counter()) < end:
        torch.mm(left, right, out=product)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 1024**2 / best


def cpu_json(planned: CpuPlan) -> dict[str, Any]:
    """All figures, in bytes, FLOP/s and hours; names as in the plan of a GPU."""
    plan = planned.plan
    return {
        "fits": planned.fits,
        "spare_bytes": round(planned.host_bytes - planned.peak),
        "usable_bytes": round(planned.host_bytes),
        "gpus": 0,
        "flops": planned.rate,
        "student_parameters": plan.student.parameters,
        "teacher_parameters": plan.teacher.parameters,
        "trained_parameters": plan.trained,
        "parts": {name: round(size) for name, size in planned.parts.items()},
        "hours": planned.hours,
        "rollouts": plan.rollouts,
        "mean_completion_tokens": plan.mean_completion,
        "mean_prompt_tokens": plan.mean_prompt,
        "cache_bytes": round(plan.cache_bytes),
        "cache_bytes_per_token": plan.bytes_per_token,
    }


def cpu_table(planned: CpuPlan) -> str:
    """The verdict, hours by phase, the largest parts of the memory, and what was assumed."""
    plan = planned.plan
    verdict = "It fits" if planned.fits else "It does NOT fit"
    parts = sorted(((size, name) for name, size in planned.parts.items()), reverse=True)[:5]
    remedy = "" if planned.fits else " Lower micro_batch_tokens or gen_micro_batch, or set dtype bf16."
    return "\n".join(
        [
            f"{verdict}: this machine's CPU, about {planned.peak / GIB:.1f} of {planned.host_bytes / GIB:.1f}"
            f" GiB of memory.{remedy} A plan, not a measurement.",
            f"student {plan.student.parameters / 1e9:.2f}B ({plan.trained / 1e9:.3f}B trained), teacher"
            f" {plan.teacher.parameters / 1e9:.2f}B",
            f"memory    {', '.join(f'{name} {size / GIB:.1f}' for size, name in parts)} GiB",
            f"time      {_durations(planned.hours)}",
            f"rollouts  {plan.rollouts:,} with refreshes",
            f"cache     {plan.cache_bytes / 1e6:,.1f} MB, {plan.bytes_per_token:.0f} bytes a token, beside a copy of the"
            " tokenizer",
            f"assumed   no GPU (--gpu names one); {planned.rate / 1e9:.0f} GFLOP/s, as just measured; completions of"
            f" {plan.mean_completion:,.0f} and prompts of {plan.mean_prompt:,.0f} tokens on average"
            " (--mean_completion_tokens, --mean_prompt_tokens)",
        ]
    )


def _durations(hours: dict[str, float]) -> str:
    """The total and its parts, which add up to it as they are printed; parts that round to 0 are left out."""
    minutes = 60 * sum(hours.values())
    unit, scale, digits = ("min", 60, int(minutes < SHORT_MINUTES)) if minutes < 120 else ("h", 1, 1)
    parts = {name: round(scale * value, digits) for name, value in hours.items()}
    listed = ", ".join(f"{name} {value:.{digits}f}" for name, value in parts.items() if value)
    return f"about {sum(parts.values()):.{digits}f} {unit}, within a factor of two: {listed}"
