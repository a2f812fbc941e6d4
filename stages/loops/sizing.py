"""Chooses the sizes of a run from its models, data and machine. Keys that the user gave are kept.

Keys that decide what is trained follow from models and data alone, so a run resumes with the same settings on
another machine. A CPU is the exception: its runs are smaller and in fp32.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.data.prompts import heldout_prompts
from stages.loops.survey import NO_LIMIT, Data, Survey, survey
from stages.runtime.config import OF_GATE, SECTION_OF, Config, as_run_name, build
from stages.runtime.errors import UserError

BATCHES = ((256, 16), (2048, 32), (8192, 64))
"""Optimizer batch for fewer than so many prompts."""
LEAST_HELDOUT, ROLLOUTS_EACH = 8, 8
"""A held-out prompt takes about as long as 2.5 rollouts (six completions, seven forwards): one for each 8
rollouts keeps evaluation below a quarter of the run.
"""
LARGEST_BATCH, LEAST_STEPS, MOST_STEPS, MOST_HELDOUT, MOST_NEW_TOKENS = 256, 60, 400, 256, 1024
CPU_BATCH, CPU_STEPS, CPU_HELDOUT, CPU_NEW_TOKENS = 16, 40, 64, 256
PASSES = 2  # over the prompts, within those steps
NUM_REFRESHES, LEAST_INTERVAL, MOST_INTERVAL = 8, 4, 32
LR, LR_WIDTH, LR_POWER, LR_STEPS = 1e-4, 2560, 0.78, 256
"""LoRA on a width of 2560 over 256 steps. The power is Thinking Machines' fit for Llama ("LoRA without
Regret", 2025); shorter runs take larger steps.
"""
FULL_LR_SHARE = 0.1  # of LoRA's
MIX = 0.5
"""Constant weight of the reverse KL: the best or equal to it on every task of docs/results.md."""
GIB = 2**30
CPU_SHARE = 0.25  # of host memory, for the activations of a training forward
LAYER_NUMBERS = 50  # activations kept for the backward per token, layer and unit of width


@dataclass(frozen=True)
class Machine:
    """Processes, each with a GPU of `gib` GiB; `gib` 0: without GPUs, on `host` bytes of memory."""

    processes: int
    gib: float
    host: float

    @property
    def is_cpu(self) -> bool:
        return not self.gib

    def __str__(self) -> str:
        if self.is_cpu:
            return f"no GPU: a small run on the CPU, {self.host / GIB:.0f} GiB of memory"
        return f"{self.processes} GPU{'s' * (self.processes > 1)} of {self.gib:.0f} GiB"


@dataclass(frozen=True)
class Choice:
    value: Any
    why: str = ""


Choices = dict[str, Choice]


def this_machine(processes: int, device: str = "auto") -> Machine:
    """The machine this runs on. `device`: the key."""
    has_gpu = torch.cuda.is_available() and device != "cpu"
    gib = torch.cuda.get_device_properties(0).total_memory / GIB if has_gpu else 0.0
    return Machine(processes, gib, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def configure(asked: Config, machine: Machine, given: dict[str, Any]) -> tuple[Survey, Choices]:
    """Look at the models and data of `asked`; what was found, and all keys: those given, and the sizes.

    Errors: `UserError` for models and data that cannot work.
    """
    found = survey(asked)
    _check_given(found, given)
    if given.get("eval_dataset") and given.get("eval_prompts", 1):
        few = asked.eval.model_copy(update={"eval_prompts": 1})
        heldout_prompts(asked.model_copy(update={"eval": few}), found.vocabulary.tokenizer)
    about = {"student_model": found.student.about, "teacher_model": found.teacher.about}
    about |= {"dataset": f"{found.data.read.num_there:,} records"}
    chosen = {leaf: Choice(value, about.get(leaf, "")) for leaf, value in given.items()}
    return found, chosen | choose(found, machine, given)


def _check_given(found: Survey, given: dict[str, Any]) -> None:
    """UserError for sizes that leave no room for prompts: within the models' positions, or to train on."""
    new, heldout, usable = given.get("max_new_tokens", 0), given.get("eval_prompts", 0), found.data.num_usable
    if new >= found.positions:
        raise UserError(
            f"max_new_tokens {new:,} leaves no room for a prompt: the models take {found.positions:,} tokens"
            " together; lower it."
        )
    if heldout >= usable and not given.get("eval_dataset"):
        raise UserError(
            f"eval_prompts {heldout:,} leaves no prompt to train on: the data has {usable:,} that can be used;"
            " lower it, or name an eval_dataset."
        )


def value_of(config: Config, leaf: str) -> Any:
    return getattr(getattr(config, SECTION_OF[leaf]), leaf)


def config_of(chosen: Choices) -> Config:
    """UserError if the values are incompatible."""
    sections: dict[str, dict[str, Any]] = {}
    for leaf, choice in chosen.items():
        sections.setdefault(SECTION_OF[leaf], {})[leaf] = choice.value
    return build(sections)


def run_name(model: str) -> str:
    """A name for a run of this student: its last part, in lower case."""
    return as_run_name(model.split("@")[0].rstrip("/").split("/")[-1].lower())


def choose(found: Survey, machine: Machine, given: dict[str, Any]) -> Choices:
    """A value for each key that depends on models, data or machine; a key in `given` has that value."""
    chosen = Choices()

    def pick(key: str, value: Any, why: str = "") -> Any:
        chosen[key] = Choice(given[key], why) if key in given else Choice(value, why)
        return chosen[key].value

    prompt_tokens, new_tokens = _lengths(found, machine, given)
    pick("max_prompt_tokens", prompt_tokens, _about_prompts(found.data, prompt_tokens))
    pick("max_new_tokens", new_tokens, _about_answers(found.data, new_tokens))
    usable, is_given = found.data.num_usable, bool(given.get("eval_dataset"))
    most = CPU_HELDOUT if machine.is_cpu else MOST_HELDOUT
    heldout = given.get("eval_prompts", min(most, max(usable // 10, min(1, usable - 1))))
    rest = max(1, usable - (0 if is_given else heldout))
    batch = pick("batch_size", _batch(rest, machine), "rollouts of an optimizer step")
    steps = given.get("max_steps", _steps(rest, batch, machine))
    about = f"trained on, of {usable:,} that can be used"
    group = pick("group_size", 1)
    prompts = pick("num_prompts", min(rest, -(-steps * batch // group)), about) or rest
    pick("max_steps", steps, f"each prompt is used {steps * batch / prompts:.1f} times")
    if "eval_prompts" not in given:
        left = heldout if is_given else max(heldout, usable - prompts)
        heldout = min(left, most, max(LEAST_HELDOUT, steps * batch // ROLLOUTS_EACH))
    about = "held out" + ("" if is_given else ": they are not trained on")
    pick("eval_prompts", heldout, about if heldout else "no evaluation")
    if found.data.checker:
        pick("answer_checker", found.data.checker, "the answers have its form")
    if not given.keys() & OF_GATE:
        pick("gating", MIX)
    pick("lr", _learning_rate(found.student.width, steps, given), "by the student's width and the steps")
    pick("warmup_steps", min(20, max(1, steps // 20)))
    interval = max(LEAST_INTERVAL, min(MOST_INTERVAL, steps // NUM_REFRESHES))
    every = pick("refresh_every", min(steps, interval))
    rollouts = pick("rollouts_per_refresh", -(-every * batch // group) * group)
    pick("max_age", 0)
    pick("rollouts_per_unit", _unit(rollouts, group, machine))
    _for_machine(pick, found, machine, prompt_tokens + new_tokens)
    return chosen


def _lengths(found: Survey, machine: Machine, given: dict[str, Any]) -> tuple[int, int]:
    """Limits that cover nearly all prompts and twice the 95th-percentile answer length."""
    data, positions = found.data, found.positions
    new = _rounded(2 * np.percentile(data.answers, 95)) if len(data.answers) else 512
    new = min(max(new, 128), CPU_NEW_TOKENS if machine.is_cpu else MOST_NEW_TOKENS)
    prompt = _rounded(min(data.lengths.max(), 2 * np.percentile(data.lengths, 99)))
    if positions < NO_LIMIT:
        new = min(new, positions // 2)
        prompt = min(prompt, positions - given.get("max_new_tokens", new))
    return given.get("max_prompt_tokens", prompt), given.get("max_new_tokens", new)


def _rounded(tokens: float) -> int:
    return -(-int(np.ceil(tokens)) // 32) * 32


def _about_prompts(data: Data, most: int) -> str:
    p50, p95 = np.percentile(data.lengths, [50, 95])
    share = data.longer_than(most)
    rest = f"{share:.1%} are longer and skipped" if share else "none is longer"
    return f"p50 {p50:.0f}, p95 {p95:.0f}, {rest}"


def _about_answers(data: Data, most: int) -> str:
    if not len(data.answers):
        return "a guess: the data holds no answers"
    longer = data.answers_longer_than(most)
    return f"p95 of the data's answers {np.percentile(data.answers, 95):.0f}, {longer:.1%} are longer"


def _batch(prompts: int, machine: Machine) -> int:
    size = next((batch for bound, batch in BATCHES if prompts < bound), LARGEST_BATCH)
    size = min(size, CPU_BATCH) if machine.is_cpu else size
    return -(-size // machine.processes) * machine.processes


def _steps(prompts: int, batch: int, machine: Machine) -> int:
    most = CPU_STEPS if machine.is_cpu else MOST_STEPS
    return min(most, max(LEAST_STEPS, PASSES * prompts // batch))


def _learning_rate(width: int, steps: int, given: dict[str, Any]) -> float:
    share = 1.0 if given.get("use_lora", True) else FULL_LR_SHARE
    scale = min(3.0, max(1.0, (LR_STEPS / steps) ** 0.5))
    return float(f"{LR * share * scale * (LR_WIDTH / width) ** LR_POWER:.1e}")


def _unit(rollouts: int, group: int, machine: Machine) -> int:
    """Rollouts of a unit: two units for each process and refresh, of at most 1024 rollouts."""
    each = -(-rollouts // (2 * machine.processes))
    return max(1, min(1024, -(-each // group) * group))


def _for_machine(pick: Any, found: Survey, machine: Machine, longest: int) -> None:
    """Precision, sharding and sizes that the machine decides."""
    pick("grad_accum", 1)
    weights = 2 * found.teacher.parameters / GIB  # bf16
    if not machine.is_cpu:
        fits = machine.processes == 1 or weights + 2 * found.student.parameters / GIB < 0.4 * machine.gib
        pick("teacher_ds_zero3", not fits)
        return
    both = 4 * (found.teacher.parameters + found.student.parameters)
    dtype = "fp32" if 2 * both < machine.host else "bf16"
    for key in ("dtype", "teacher_dtype"):
        pick(key, dtype)
    pick("teacher_ds_zero3", False)
    each = found.student.layers * found.student.width * LAYER_NUMBERS * 4
    tokens = int(CPU_SHARE * machine.host / machine.processes / each)
    pick("gradient_checkpointing", tokens < 2 * longest)
    pick("micro_batch_tokens", max(longest, min(8192, tokens)))
    pick("gen_micro_batch", 32)
