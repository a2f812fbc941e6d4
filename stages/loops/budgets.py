"""The sizes that `auto` stands for: the largest that fit, found by running the real work at a few sizes.

On a CPU the sizes are fixed: rows and losses are then the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import cache
from dualkl import Head, HiddenTeacher, LogitsTeacher, Sampled, TopKTeacher
from stages.data.alignment import Aligned, align
from stages.data.batches import MicroBatch
from stages.data.signals import AnyTeacher, cached_head
from stages.models.memory import GIB, state_bytes
from stages.models.policy import Policy
from stages.models.positions import positions_of
from stages.models.student import Student
from stages.models.teacher import Teacher
from stages.runtime import gpu_memory
from stages.runtime.config import Config
from stages.runtime.distributed import World
from stages.runtime.run import Run

MARGIN = 0.8  # share of free memory that `auto` uses
SCORING_BYTES = (
    3 * GIB
)  # left free for scoring in the same process, besides what prefills freed; at most half
CPU_GEN_ROWS, MOST_GEN_ROWS, FIRST_GEN_ROWS = 128, 512, 8
CPU_SCORE_TOKENS, CPU_TRAIN_ROWS = 16_384, 64
# Per forward: fewer tokens leave the GPU idle, more gain nothing.
LEAST_TOKENS, MOST_TOKENS, STEP_TOKENS = 2_048, 65_536, 1_024
PROMPT_TOKENS = 32_768  # of different prompts in a trial of the engine, which prefills fewer at once
WORTHWHILE = 1.1  # a further trial must promise to raise the size by more than this factor

_peaks: dict[tuple[object, ...], dict[int, float]] = {}  # of generation and scoring, by kind and model


class Group(NamedTuple):
    """Rows that share a prompt in one forward, and the tokens of the longest prompt."""

    size: int
    prompt_tokens: int


ALONE = Group(1, 0)


class Caps(NamedTuple):
    """Size limits of a training forward; None: no limit."""

    rows: int | None
    tokens: int | None


def largest(
    peaks: dict[int, float], peak_of: Callable[[int], float], room: float, sizes: range, first: int
) -> int:
    """The largest of `sizes` whose peak memory fits in `room` bytes; the smallest if none fits.

    `peaks`: bytes by size, as measured; it starts with the peak at the smallest size or at 0, and trials
    are added. Memory beyond that start grows at most linearly. Extrapolate linearly from the largest size
    that fits to pick the next trial, beginning with `first`.
    """
    base = min(peaks)
    while True:
        fits = max((size for size, peak in peaks.items() if peak <= room), default=base)
        fails = min([size for size, peak in peaks.items() if peak > room] + [sizes.stop])
        wanted = float(first)
        if fits > base:
            growth = max(peaks[fits] - peaks[base], 1.0) / (fits - base)
            wanted = base + (room - peaks[base]) / growth
        if wanted >= fails:
            wanted = sizes[-1] if fails == sizes.stop else (fits + fails) / 2
        size = int(wanted) // sizes.step * sizes.step
        if size < sizes.start or size <= WORTHWHILE * fits:
            return min(max(size, fits, sizes.start), sizes[-1])
        peaks[size] = peak_of(size)


def free_bytes(world: World) -> int | None:
    """Free memory of the fullest rank's GPU; None on a CPU (collective)."""
    own = gpu_memory.free_bytes(world.device)
    return None if own is None else min(world.gather(own))


def slots_of_run(run: Run, policy: Policy, *, scores_too: bool) -> int:
    """gen_micro_batch as configured, or what fits beside the models loaded now (collective).

    `scores_too`: the same process scores between the engine's calls.
    """
    config, given = run.config, run.config.rollout.gen_micro_batch
    if given != "auto":
        return given
    free = free_bytes(run.world)
    if free is None:
        return CPU_GEN_ROWS
    room = free * MARGIN
    room -= min(SCORING_BYTES, room / 2) if scores_too else 0
    longest = _longest(config, policy.model.config)

    def peak_of(num_slots: int) -> float:
        peak = _peak(run.world, lambda: _generate(policy, longest, num_slots))
        policy.engine.close()
        return peak

    key = "slots", policy.model.config.to_json_string(), policy.is_teacher, longest
    if key not in _peaks:
        _peaks[key] = {1: peak_of(1)}
    most = min(MOST_GEN_ROWS, config.rollout.rollouts_per_unit)
    rows = largest(_peaks[key], peak_of, room, range(1, most + 1), FIRST_GEN_ROWS)
    return rows // 8 * 8 if rows >= 8 else rows


def _generate(policy: Policy, longest: int, num_slots: int) -> None:
    """Fill slots of `longest` tokens with prompts, and sample two tokens in each."""
    policy = replace(policy, max_new_tokens=2, sampling=replace(policy.sampling, eos_ids=()))
    length = max(1, longest - 2)
    count = min(num_slots, max(1, PROMPT_TOKENS // length))
    different = np.random.default_rng(0).integers(1, policy.sampling.vocab_size, (count, length))
    prompts = [different[slot * count // num_slots].astype(np.int32) for slot in range(num_slots)]
    policy.generate(prompts, [0] * num_slots, num_slots)


def score_tokens_of_run(
    run: Run, teacher: Teacher, vocab_size: int, score: Callable[[Aligned], object]
) -> int:
    """micro_batch_tokens as configured, or what fits beside the models loaded now (collective).

    The same on all ranks. `score`: scores a batch of ids below `vocab_size` as the run does.
    """
    config, given = run.config, run.config.train.micro_batch_tokens
    if given != "auto":
        return given
    free = free_bytes(run.world)
    if free is None:
        return CPU_SCORE_TOKENS
    longest = _longest(config, teacher.config)
    group = Group(config.rollout.group_size, config.data.max_prompt_tokens) if teacher.shares else ALONE

    def peak_of(tokens: int) -> float:
        batch = partial(
            _dummy_batch, tokens, longest, vocab_size, run.world.device, packed=teacher.packs, group=group
        )
        return _peak(run.world, lambda: score(batch()), collective=teacher.is_collective)

    signal = config.teacher_signal
    key = "score", teacher.config.to_json_string(), teacher.is_collective, signal.signal, signal.signal_k
    return _most_tokens(_peaks.setdefault((*key, longest, group), {0: 0.0}), peak_of, free * MARGIN)


def train_caps_of_run(run: Run, student: Student, module: nn.Module) -> Caps:
    """Limits of a training forward, before the optimizer has any state; same on all ranks (collective).

    `module`: maps a MicroBatch to the loss and its statistics.
    """
    rows, tokens = run.config.rollout.lp_micro_batch, run.config.train.micro_batch_tokens
    if free_bytes(run.world) is None:
        return Caps(CPU_TRAIN_ROWS if rows == "auto" else rows, None if tokens == "auto" else tokens)
    if tokens == "auto":
        tokens = _train_tokens(run, student, module)
    return Caps(None if rows == "auto" else rows, tokens)


def _train_tokens(run: Run, student: Student, module: nn.Module) -> int:
    config, world = run.config, run.world
    longest, head = _longest(config, student.base.config), None
    if config.teacher_signal.signal == "hidden":
        head = cached_head(cache.open(config.cache_root), world.device)
    trained = sum(p.numel() for p in student.trainable.values())
    state = sum(state_bytes(trained, world.size, world.student_is_deepspeed))
    size = student.vocab_size
    group = Group(config.rollout.group_size, config.data.max_prompt_tokens) if student.shares else ALONE

    def peak_of(tokens: int) -> float:
        batch = partial(_dummy_batch, tokens, longest, size, world.device, packed=student.packs, group=group)
        return _peak(world, lambda: _train(config, student, module, batch(), head))

    free = free_bytes(world)
    assert free is not None
    return _most_tokens({0: 0.0}, peak_of, (free - state) * MARGIN)


def _train(config: Config, student: Student, module: nn.Module, batch: Aligned, head: Head | None) -> None:
    """Forward and backward as in a step; leaves no gradients, and random numbers and buffers as they were."""
    was_training, buffers = student.model.training, [(b, b.clone()) for b in student.model.buffers()]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in student.trainable.values()]
    try:
        with torch.random.fork_rng([batch.targets.device] if batch.targets.is_cuda else []):
            module.train()
            loss, _ = module(_with_teacher(config, batch, student.vocab_size, head))
            loss.backward()
    finally:
        student.model.train(was_training)
        for hook, parameter in zip(hooks, student.trainable.values(), strict=True):
            hook.remove()
            parameter.grad = None
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _drop_gradient(parameter: Tensor) -> None:
    """Gradients are counted in `state_bytes`."""
    parameter.grad = None


def _with_teacher(config: Config, batch: Aligned, vocab_size: int, head: Head | None) -> MicroBatch:
    """`batch` with a dummy teacher with the signal's shapes."""
    targets_N, kept = batch.targets, min(config.teacher_signal.signal_k, vocab_size)
    zeros_N = torch.zeros(targets_N.shape, device=targets_N.device)
    teacher: AnyTeacher
    if head is not None:
        teacher = HiddenTeacher(head.weight.new_zeros((len(targets_N), head.weight.shape[1])), head)
    elif config.teacher_signal.signal == "full":
        teacher = LogitsTeacher(zeros_N.new_zeros((len(targets_N), vocab_size)))
    else:
        ids_NK = torch.arange(kept, device=targets_N.device).repeat(len(targets_N), 1)
        half_N = zeros_N + math.log(0.5)  # the other half is spread over the kept ids
        logprobs_NK = (half_N - math.log(kept))[:, None].expand(ids_NK.shape).contiguous()
        teacher = TopKTeacher(ids_NK, logprobs_NK, half_N, temperature=config.loss.temperature)
    sampled = Sampled(targets_N, zeros_N - 1, zeros_N - 1)
    return MicroBatch(batch, teacher, sampled, zeros_N + 1 / len(zeros_N), teacher_entropy=zeros_N + 1)


def _dummy_batch(
    tokens: int, longest: int, vocab_size: int, device: torch.device, *, packed: bool, group: Group = ALONE
) -> Aligned:
    """`tokens` random tokens in rows of equal length, at most `longest`; all but their first are scored.

    With a `group`, rows share prompts, and all tokens are scored.
    """
    dice = np.random.default_rng(0)
    if group.size == 1:
        count = -(-tokens // longest)
        rows = dice.integers(1, vocab_size, (count, max(2, tokens // count)))
        return align(list(rows[:, :1]), list(rows[:, 1:]), 0, device, packed=packed)
    prompt = min(group.prompt_tokens, longest - 1)
    whole = prompt + group.size * (longest - prompt)  # tokens of the largest group
    count = -(-tokens // whole)
    prompt = max(1, prompt * tokens // (count * whole))
    completion = max(1, (tokens // count - prompt) // group.size)
    prompts = dice.integers(1, vocab_size, (count, prompt)).repeat(group.size, axis=0)
    completions = dice.integers(1, vocab_size, (count * group.size, completion))
    batch = align(list(prompts), list(completions), 0, device, packed=packed, shared=True)
    targets = batch.input_ids.flatten()
    return replace(batch, scored=torch.arange(len(targets), device=device), targets=targets)


def _longest(config: Config, model_config: Any) -> int:
    """Tokens of the longest sequence that the configuration and the model allow."""
    asked = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return min(asked, positions_of(model_config) or asked)


def _most_tokens(peaks: dict[int, float], peak_of: Callable[[int], float], room: float) -> int:
    sizes = range(LEAST_TOKENS, MOST_TOKENS + 1, STEP_TOKENS)
    return largest(peaks, peak_of, room, sizes, LEAST_TOKENS)


def _peak(world: World, work: Callable[[], object], *, collective: bool = False) -> float:
    """Peak bytes of `work`, the maximum over ranks (collective)."""
    return world.max([gpu_memory.peak_bytes(world.device, work, collective=collective)])[0]
