"""GPU memory of each phase of a run, and the sizes that `auto` chooses from it.

The run measures free memory and the plan computes it; both then use the functions below.
On a CPU `auto` means fixed numbers: a run is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from stages.engine.decoder import PREFILL_TOKENS
from stages.models import memory, pretrained
from stages.models.memory import Shape
from stages.models.teacher import Teacher, zero3_settings
from stages.runtime.config import Config
from stages.runtime.distributed import World
from stages.runtime.errors import UserError

MARGIN = 0.8  # share of free memory that `auto` uses
CPU_GEN_ROWS, MOST_GEN_ROWS = 128, 512
CPU_SCORE_TOKENS, CPU_TRAIN_ROWS = 16_384, 64
# Per forward: fewer tokens leave the GPU idle, more gain nothing.
LEAST_TOKENS, MOST_TOKENS = 2_048, 32_768
TOKENS_BESIDE_SLOTS = 16_384  # size of the scoring forward that must fit beside the slots
STEP_TOKENS = 1_024

Parts = dict[str, float]


def total(parts: Parts) -> float:
    return sum(parts.values())


# --- memory of each phase, in bytes by part


def slot_parts(config: Config, shape: Shape, itemsize: int, slots: int) -> Parts:
    """Memory of an open rollout engine: slots as long as the longest sequence, and logits to sample from."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return {
        "keys and values": float(slots * longest * memory.kv_bytes_per_token(shape, itemsize)),
        "logits": float(slots * memory.LOGIT_BYTES * shape.vocab_size),
    }


def prefill_bytes(config: Config, shape: Shape, itemsize: int, slots: int) -> float:
    """Activations of the prompts prefilled at once, and their keys and values before these move to slots."""
    longest = config.data.max_prompt_tokens
    tokens = min(max(PREFILL_TOKENS["cuda"], longest), slots * longest)
    each = memory.forward_bytes_per_token(shape, itemsize) + memory.kv_bytes_per_token(shape, itemsize)
    return float(tokens * each)


def copied_bytes(config: Config, student: Shape) -> float:
    """The engine's own weights: layers merged with LoRA; in full fine-tuning all fp32 weights in dtype."""
    itemsize = pretrained.DTYPES[config.run.dtype].itemsize
    if not config.lora.use_lora:
        return float(student.parameters * itemsize) if itemsize < 4 else 0.0
    layers = memory.adapted(student, config.lora.lora_targets)
    return float(sum(inputs * outputs for _, inputs, outputs in layers) * itemsize)


def gathered_bytes(config: Config, teacher: Shape, num_gpus: int) -> float:
    """Teacher weights that ZeRO-3 gathers during a forward."""
    zero = zero3_settings(config)["zero_optimization"]
    prefetch = int(zero.get("stage3_prefetch_bucket_size", memory.PREFETCH_ELEMENTS))
    return float(memory.gather_bytes(teacher, _teacher_itemsize(config), num_gpus, prefetch))


def scoring_parts(config: Config, teacher: Shape, gathered: float, tokens: int, device_bytes: float) -> Parts:
    """A scoring forward of `tokens` tokens, all scored, without the teacher's weights."""
    return {
        "gathered weights": gathered,
        "activations": float(tokens * memory.forward_bytes_per_token(teacher, _teacher_itemsize(config))),
        "selection": memory.compress_bytes(tokens, teacher, device_bytes),
    }


def _teacher_itemsize(config: Config) -> int:
    return pretrained.DTYPES[config.models.teacher_dtype].itemsize


def state_parts(config: Config, student: Shape, num_gpus: int, zero2: bool) -> Parts:
    """Optimizer state and gradients."""
    trained = trained_parameters(config, student)
    return {
        "optimizer": float(memory.optimizer_bytes(trained, num_gpus, zero2)),
        "gradients": float(memory.gradient_bytes(trained, num_gpus, zero2)),
    }


def step_parts(config: Config, student: Shape, tokens: int, scored: int, device_bytes: float) -> Parts:
    """Peak of a training step of `tokens` tokens, reached in the forward, the loss or the backward.

    The loss's chunks are freed before the backward. Autocast's copies of trained weights last for the
    forward, and as long as autograd keeps them: with checkpointing, for the recomputation of one layer.
    """
    lora, checkpointing = config.lora, config.train.gradient_checkpointing
    itemsize = pretrained.DTYPES[config.run.dtype].itemsize
    kept, moment = memory.activation_bytes_per_token(
        student, itemsize, checkpointing=checkpointing, lora_rank=lora.lora_r if lora.use_lora else 0
    )
    signal = config.teacher_signal.signal
    loss = config.loss
    lasting, chunks = memory.loss_bytes(
        scored,
        student,
        signal,
        device_bytes,
        trains_head=not lora.use_lora,
        in_kernels=loss.objective == "gated" and loss.gate_on == "rkl" and not loss.teacher_smoothing,
    )
    copies = float(trained_parameters(config, student) * itemsize) if itemsize < 4 else 0.0
    lasting_copies = copies / student.layers if checkpointing else copies
    return {
        "activations": tokens * (kept + moment),
        "loss": lasting + max(0.0, chunks - tokens * moment),
        "autocast copies": max(lasting_copies, copies - tokens * moment),
    }


def trained_parameters(config: Config, student: Shape) -> int:
    lora = config.lora
    return (
        memory.lora_parameters(student, lora.lora_r, lora.lora_targets)
        if lora.use_lora
        else student.parameters
    )


# --- values of `auto`, given the free bytes of a GPU


def gen_rows(config: Config, shape: Shape, itemsize: int, free: float, beside: float = 0.0) -> int:
    """Slots that fit beside the larger of prompt prefill and `beside` (scoring, at most half the room).

    A multiple of 8 from 8 on, at most 512 and the rollouts of a unit, at least 1.
    """
    most, room = min(MOST_GEN_ROWS, config.rollout.rollouts_per_unit), free * MARGIN
    room -= max(min(beside, room / 2), prefill_bytes(config, shape, itemsize, most))
    rows = int(room // total(slot_parts(config, shape, itemsize, 1)))
    return max(1, min(most, rows // 8 * 8 if rows >= 8 else rows))


def score_tokens(config: Config, teacher: Shape, gathered: float, free: float, device_bytes: float) -> int:
    """Tokens of a scoring forward that fit: a multiple of 1,024 from 2,048 to 32,768."""
    return _most_tokens(
        lambda tokens: total(scoring_parts(config, teacher, gathered, tokens, device_bytes)), free * MARGIN
    )


def train_tokens(config: Config, student: Shape, free: float, device_bytes: float) -> int:
    """The same for a training forward and backward beside the optimizer state, with every token scored."""
    return _most_tokens(
        lambda tokens: total(step_parts(config, student, tokens, tokens, device_bytes)), free * MARGIN
    )


def _most_tokens(bytes_of: Callable[[int], float], room: float) -> int:
    fitting = (t for t in range(MOST_TOKENS, LEAST_TOKENS, -STEP_TOKENS) if bytes_of(t) <= room)
    return next(fitting, LEAST_TOKENS)


class Caps(NamedTuple):
    """Size limits of a training forward; None: no limit."""

    rows: int | None
    tokens: int | None


def train_caps(config: Config, fitting: int | None) -> Caps:
    """lp_micro_batch and micro_batch_tokens, with `auto` tokens replaced by `fitting`.

    If that is None (on a CPU), `auto` rows are 64, of any length.
    """
    rows, tokens = config.rollout.lp_micro_batch, config.train.micro_batch_tokens
    automatic_rows = CPU_TRAIN_ROWS if fitting is None else None
    return Caps(automatic_rows if rows == "auto" else rows, fitting if tokens == "auto" else tokens)


# --- the same for a run, which measures its free memory


def free_bytes(world: World) -> int | None:
    """Free memory of the fullest rank's GPU, including torch's reserve; None on a CPU (collective)."""
    own = _own_free_bytes(world.device)
    return None if own is None else min(world.gather(own))


def _own_free_bytes(device: torch.device) -> int | None:
    """Free memory of this process. Excludes private pools of captured steps: nothing else can use them."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return free + sum(
        segment["total_size"] - segment["active_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == index and tuple(segment["segment_pool_id"]) == (0, 0)
    )


def card_bytes(world: World) -> int:
    return torch.cuda.get_device_properties(world.device).total_memory


def slots_of_run(
    config: Config, world: World, model_config: Any, *, is_teacher: bool, scores_too: bool
) -> int:
    """gen_micro_batch as configured, or what fits beside the models loaded now (collective).

    `is_teacher`: the teacher generates, with its own weights and no copy. `scores_too`: the same process
    scores between the engine's calls.
    """
    given = config.rollout.gen_micro_batch
    if given != "auto":
        return given
    free = free_bytes(world)
    if free is None:
        return CPU_GEN_ROWS
    models = config.models
    shape = _shape(model_config, "gen_micro_batch")
    itemsize = _teacher_itemsize(config) if is_teacher else pretrained.DTYPES[config.run.dtype].itemsize
    beside = 0.0
    if scores_too and models.teacher_model:
        teacher = _shape(pretrained.load_config(models.teacher_model), "gen_micro_batch")
        gathered = (
            gathered_bytes(config, teacher, world.size) if models.teacher_ds_zero3 and not is_teacher else 0.0
        )
        beside = beside_slots(config, teacher, gathered, card_bytes(world))
    return gen_rows(
        config, shape, itemsize, free - (0 if is_teacher else copied_bytes(config, shape)), beside
    )


def beside_slots(config: Config, teacher: Shape, gathered: float, device_bytes: float) -> float:
    """Bytes that slots leave free for a scoring forward in the same process."""
    given = config.train.micro_batch_tokens
    tokens = TOKENS_BESIDE_SLOTS if given == "auto" else given
    return total(scoring_parts(config, teacher, gathered, tokens, device_bytes))


def score_tokens_of_run(config: Config, world: World, teacher: Teacher) -> int:
    """micro_batch_tokens as configured, or what fits beside what is loaded now; same on all ranks (collective)."""
    given = config.train.micro_batch_tokens
    if given != "auto":
        return given
    free = free_bytes(world)
    if free is None:
        return CPU_SCORE_TOKENS
    shape = _shape(teacher.config, "micro_batch_tokens")
    gathered = gathered_bytes(config, shape, world.size) if teacher.is_collective else 0.0
    return score_tokens(config, shape, gathered, free, card_bytes(world))


def train_caps_of_run(config: Config, world: World, student_config: Any) -> Caps:
    """Limits of a training forward, with only the student loaded so far; same on all ranks (collective)."""
    free = free_bytes(world)
    if free is None or config.train.micro_batch_tokens != "auto":
        return train_caps(config, None if free is None else MOST_TOKENS)
    shape, models = _shape(student_config, "micro_batch_tokens"), config.models
    added = total(state_parts(config, shape, world.size, world.student_is_deepspeed))
    if config.teacher_signal.signal == "hidden" and models.teacher_model:
        teacher = _shape(pretrained.load_config(models.teacher_model), "micro_batch_tokens")
        added += memory.head_bytes(teacher, _teacher_itemsize(config))
    return train_caps(config, train_tokens(config, shape, free - added, card_bytes(world)))


_shapes: dict[str, Shape] = {}


def _shape(model_config: Any, key: str) -> Shape:
    """The model's sizes, cached. `key` is the setting to name in the error if it cannot be planned."""
    name = model_config.to_json_string()
    if name not in _shapes:
        try:
            _shapes[name] = memory.shape_of(model_config)
        except UserError as error:
            raise UserError(
                f"{key}: auto cannot be worked out: {str(error).rstrip('.')}; give {key} a number."
            ) from error
    return _shapes[name]
