"""The plan of a run: which parts are in memory in each phase, whether that fits, how fast it should go, how large the cache gets.

Pure arithmetic over two model configurations; nothing is loaded. Memory is what `torch.cuda.max_memory_allocated` would say,
of the fullest card; beside it a card needs RESERVE for the CUDA context, NCCL and fragments of the allocator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from stages.loops.feed import AUTO_TRAIN_ROWS
from stages.loops.scoring import AUTO_SCORE_TOKENS
from stages.models import checkpoints, memory, speed
from stages.models.memory import GIB, Shape
from stages.models.speed import Gpu
from stages.models.teacher import zero3_settings
from stages.runtime.config import Config, rollouts_of, rows_per_micro_step
from stages.runtime.distributed import World
from stages.runtime.errors import UserError

RESERVE_GIB, RESERVE_SHARE = 1.5, 0.03
PREFILL_TOKENS = 16_384  # prompts are read in parts of about so many tokens
AUTO_MARGIN = 0.8  # of the free memory that `auto` hands out
CPU_GEN_ROWS = 128  # fixed, so that a run on a CPU is the same on every machine
MOST_GEN_ROWS = 512
PACKED_ID_BYTES, PACKED_TOKEN_BYTES = 2.3, 5  # docs/cache.md: packed top-64, 152.4 bytes a token at V = 151,646
HIDDEN_SHARE, FULL_SHARE = 0.663, 0.49  # docs/cache.md: of the raw states and of the raw logits
PLAIN_COLUMN_BYTES = 33  # docs/results.md: 447 - 414 bytes a token; the demo's are 26


@dataclass(frozen=True)
class Machine:
    """`num_gpus` equal cards of `gib` GiB, one process each; `zero2`: the student's optimizer under DeepSpeed ZeRO-2."""

    gpu: Gpu
    num_gpus: int
    gib: float
    zero2: bool = False

    @property
    def usable(self) -> float:
        """Bytes of one card that tensors may take."""
        return (self.gib * (1 - RESERVE_SHARE) - RESERVE_GIB) * GIB


@dataclass(frozen=True)
class Phase:
    """What is on a card at the fullest moment of a phase: bytes by part."""

    name: str
    parts: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Memory by phase, rates of all cards together (tokens/s), hours and cache over the whole run.

    `hours` and `cache_bytes` are for completions of `mean_completion` tokens and prompts of `mean_prompt`.
    """

    machine: Machine
    student: Shape
    teacher: Shape
    trained: int
    phases: list[Phase]
    rates: dict[str, float]
    hours: dict[str, float]
    rollouts: int
    mean_completion: float
    mean_prompt: float
    cache_bytes: float
    bytes_per_token: float
    host_bytes: float
    advice: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def spare(self) -> float:
        """Bytes left on a card in the worst phase; negative: so much is missing."""
        return self.machine.usable - self.worst.peak

    @property
    def fits(self) -> bool:
        return self.spare >= 0


@dataclass(frozen=True)
class _Sizes:
    """What the phases share."""

    config: Config
    machine: Machine
    student: Shape
    teacher: Shape
    trained: int

    @property
    def student_b(self) -> int:
        return checkpoints.DTYPES[self.config.run.dtype].itemsize

    @property
    def teacher_b(self) -> int:
        return checkpoints.DTYPES[self.config.models.teacher_dtype].itemsize

    @property
    def longest(self) -> int:
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens


def make_plan(config: Config, machine: Machine, mean_completion: float = 0.0, mean_prompt: float = 0.0) -> Plan:
    """The plan of `config` on `machine`; means of 0 stand for their upper bounds, max_new_tokens and max_prompt_tokens.

    Errors: `UserError` for a model that cannot be read or planned, no teacher, or an impossible batch.
    """
    models = config.models
    if not models.teacher_model:
        raise UserError("teacher_model is empty: a plan needs the models of both stages.")
    rows_per_micro_step(config, machine.num_gpus)
    student = memory.shape_of(checkpoints.load_config(models.student_model, models.student_revision))
    teacher = memory.shape_of(checkpoints.load_config(models.teacher_model, models.teacher_revision))
    sizes = _Sizes(config, machine, student, teacher, trained_parameters(config, student))
    completion = mean_completion or float(config.rollout.max_new_tokens)
    prompt = mean_prompt or float(config.data.max_prompt_tokens)
    phases = plan_phases(sizes)
    rates, hours, rollouts = _speeds(sizes, completion, prompt)
    each = bytes_per_token(config, teacher)
    kept_head = memory.head_bytes(teacher, sizes.teacher_b) if config.teacher_signal.signal == "hidden" else 0
    plan = Plan(
        machine, student, teacher, sizes.trained, phases, rates, hours, rollouts, completion, prompt,
        rollouts * completion * each + kept_head, each, float(teacher.parameters * sizes.teacher_b),
    )  # fmt: skip
    plan.advice.extend([] if plan.fits else _advice(sizes, plan.worst))
    return plan


def trained_parameters(config: Config, student: Shape) -> int:
    lora = config.lora
    return memory.lora_parameters(student, lora.lora_r, lora.lora_targets) if lora.use_lora else student.parameters


def plan_phases(sizes: _Sizes) -> list[Phase]:
    """evaluate, generate, score, train, refresh, in the order of a pipeline."""
    student, teacher = _student_parts(sizes), _teacher_parts(sizes)
    training = _training_state(sizes)
    generate = _generation_parts(sizes, sizes.student, sizes.student_b)
    generate["merged LoRA copy" if sizes.config.lora.use_lora else "weights in dtype"] = _merged(sizes)
    score = _scoring_parts(sizes)
    refresh = generate if sum(generate.values()) > sum(score.values()) else score
    return [
        Phase("evaluate", _evaluation_parts(sizes, student)),
        Phase("generate", student | teacher | generate),
        Phase("score", student | teacher | score),
        Phase("train", student | training | _step_parts(sizes)),
        Phase("refresh", student | training | teacher | refresh),
    ]


def _student_parts(sizes: _Sizes) -> dict[str, float]:
    if not sizes.config.lora.use_lora:
        return {"student": 4.0 * sizes.student.parameters}
    return {"student": float(sizes.student.parameters * sizes.student_b), "adapters": 4.0 * sizes.trained}


def _teacher_parts(sizes: _Sizes) -> dict[str, float]:
    """Shard and whole head under ZeRO-3; all weights where plain; the head alone where the shard is offloaded."""
    if not sizes.config.models.teacher_ds_zero3:
        return {"teacher": float(sizes.teacher.parameters * sizes.teacher_b)}
    shard = memory.zero3_shard_bytes(sizes.teacher, sizes.teacher_b, sizes.machine.num_gpus)
    offload = _zero(sizes.config).get("offload_param", {}).get("device", "none") != "none"
    head = float(memory.head_bytes(sizes.teacher, sizes.teacher_b))
    return {"teacher shard": 0.0 if offload else float(shard), "teacher head": head}


def _zero(config: Config) -> dict[str, Any]:
    return zero3_settings(config)["zero_optimization"]


def _merged(sizes: _Sizes) -> float:
    """The adapted layers once more with LoRA added; in full fine-tuning all fp32 weights once more in dtype."""
    if not sizes.config.lora.use_lora:
        return float(sizes.student.parameters * sizes.student_b) if sizes.student_b < 4 else 0.0
    layers = memory.adapted(sizes.student, sizes.config.lora.lora_targets)
    return float(sum(inputs * outputs for _, inputs, outputs in layers) * sizes.student_b)


def _training_state(sizes: _Sizes) -> dict[str, float]:
    num_gpus, zero2 = sizes.machine.num_gpus, sizes.machine.zero2
    return {
        "optimizer": float(memory.optimizer_bytes(sizes.trained, num_gpus, zero2)),
        "gradients": float(memory.gradient_bytes(sizes.trained, num_gpus, zero2)),
    }


def _generation_parts(sizes: _Sizes, shape: Shape, itemsize: int) -> dict[str, float]:
    """Slots whose keys and values reach to the longest sequence, their logits, and a part of the prompts being read."""
    slots = _slots(sizes, shape, itemsize)
    prefill = min(PREFILL_TOKENS, slots * sizes.config.data.max_prompt_tokens)
    return {
        "keys and values": float(slots * sizes.longest * memory.kv_bytes_per_token(shape, itemsize)),
        "logits": float(slots * memory.LOGIT_BYTES * shape.vocab_size),
        "activations": float(prefill * memory.forward_bytes_per_token(shape, itemsize)),
    }


def _slots(sizes: _Sizes, shape: Shape, itemsize: int) -> int:
    """gen_micro_batch as given; `auto` as it would be chosen on this machine, at most a unit's rollouts."""
    given = sizes.config.rollout.gen_micro_batch
    if given != "auto":
        return min(given, sizes.config.rollout.rollouts_per_unit)
    weights = sum(_student_parts(sizes).values()) + sum(_teacher_parts(sizes).values()) + _merged(sizes)
    free = sizes.machine.usable - weights - sum(_training_state(sizes).values())
    return gen_rows(sizes.config, shape, itemsize, free)


def _scoring_parts(sizes: _Sizes) -> dict[str, float]:
    tokens = _scoring_tokens(sizes)
    scored = min(tokens, tokens * sizes.config.rollout.max_new_tokens // sizes.longest + 1)
    models, num_gpus = sizes.config.models, sizes.machine.num_gpus
    prefetch = _zero(sizes.config).get("stage3_prefetch_bucket_size", memory.PREFETCH_ELEMENTS)
    gather = memory.gather_bytes(sizes.teacher, sizes.teacher_b, num_gpus, int(prefetch))
    return {
        "gathered weights": float(gather) if models.teacher_ds_zero3 else 0.0,
        "activations": float(tokens * memory.forward_bytes_per_token(sizes.teacher, sizes.teacher_b)),
        "logits": memory.compress_bytes(scored, sizes.teacher, sizes.machine.gib * GIB),
    }


def _scoring_tokens(sizes: _Sizes) -> int:
    """The padded tokens of a full scoring forward."""
    rollout = sizes.config.rollout
    cap = AUTO_SCORE_TOKENS if rollout.score_tokens == "auto" else rollout.score_tokens
    most = max(cap, sizes.longest)
    return most if rollout.lp_micro_batch == "auto" else min(most, rollout.lp_micro_batch * sizes.longest)


def _step_tokens(sizes: _Sizes) -> int:
    """The padded tokens of the largest training forward."""
    config, longest = sizes.config, sizes.longest
    rows = AUTO_TRAIN_ROWS if config.rollout.lp_micro_batch == "auto" else config.rollout.lp_micro_batch
    rows = min(rows, rows_per_micro_step(config, sizes.machine.num_gpus))
    cap = config.train.micro_batch_tokens
    return rows * longest if cap == "auto" else min(max(cap, longest), rows * longest)


def _step_parts(sizes: _Sizes) -> dict[str, float]:
    """Forward and backward of the largest micro-batch; the loss's chunks live before the backward's own moment."""
    config, student, tokens = sizes.config, sizes.student, _step_tokens(sizes)
    lora = config.lora.use_lora
    each = memory.activation_bytes_per_token(
        student, sizes.student_b, checkpointing=config.train.gradient_checkpointing, lora_rank=config.lora.lora_r if lora else 0
    )  # fmt: skip
    signal = config.teacher_signal.signal
    scored = -(-tokens * config.rollout.max_new_tokens // sizes.longest)
    loss = memory.loss_bytes(scored, student, signal, sizes.machine.gib * GIB, trains_head=not lora)
    copies = float(sizes.trained * sizes.student_b) if sizes.student_b < 4 else 0.0
    return {
        "activations": tokens * each,
        "loss": loss + (memory.head_bytes(sizes.teacher, sizes.teacher_b) if signal == "hidden" else 0),
        "autocast copies": copies,
    }


def _evaluation_parts(sizes: _Sizes, student: dict[str, float]) -> dict[str, float]:
    """The plain teacher writing held-out text beside the student, where its weights and a tenth fit; else it is skipped."""
    weights = float(sizes.teacher.parameters * sizes.teacher_b)
    if weights * 1.1 > sizes.machine.usable - sum(student.values()):
        own = _generation_parts(sizes, sizes.student, sizes.student_b)
        return student | own | {"merged copy": _merged(sizes)}
    return student | {"plain teacher": weights} | _generation_parts(sizes, sizes.teacher, sizes.teacher_b)


def _advice(sizes: _Sizes, phase: Phase) -> list[str]:
    """What to lower, the largest part that a key moves first."""
    whole = {
        "keys and values": "gen_micro_batch (fewer slots), max_new_tokens or max_prompt_tokens",
        "logits": "gen_micro_batch" if phase.name in ("evaluate", "generate") else "score_tokens",
        "activations": {"train": "micro_batch_tokens or lp_micro_batch, or set gradient_checkpointing"}.get(
            phase.name, "score_tokens or lp_micro_batch" if phase.name in ("score", "refresh") else "max_prompt_tokens"
        ),
        "loss": "signal hidden or full to topk",
        "optimizer": "trained parameters: use_lora or lora_r, or shard them with ZeRO-2 (recipes/accelerate_zero2.yaml)",
        "gradients": "trained parameters: use_lora or lora_r, or shard them with ZeRO-2 (recipes/accelerate_zero2.yaml)",
        "teacher shard": "the teacher's share: more cards, or offload in a teacher_ds_config",
        "teacher": "the teacher's share: teacher_ds_zero3 over more cards",
        "plain teacher": "gen_micro_batch, or evaluate on a kept eval_teacher_text",
    }
    ordered = sorted(phase.parts, key=lambda part: -phase.parts[part])
    return list(dict.fromkeys(whole[part] for part in ordered if part in whole))[:3]


def num_refreshes(config: Config) -> int:
    """Times that rollouts are written: stage one, and each refresh up to the last step."""
    every = config.refresh.refresh_every if config.refresh.refresh_mode != "off" else 0
    return 1 + ((config.train.max_steps - 1) // every if every else 0)


def _speeds(sizes: _Sizes, completion: float, prompt: float) -> tuple[dict[str, float], dict[str, float], int]:
    """Rates in completion tokens/s of all cards, hours by phase, rollouts written in all."""
    config, machine = sizes.config, sizes.machine
    gpu, num_gpus = machine.gpu, machine.num_gpus
    per_forward = _scoring_tokens(sizes)
    scored = per_forward * completion / (completion + prompt)
    zero3 = config.models.teacher_ds_zero3
    slots = _slots(sizes, sizes.student, sizes.student_b)
    step = speed.train_seconds(sizes.student, gpu, completion + prompt, completion,
                               frozen=config.lora.use_lora, checkpointing=config.train.gradient_checkpointing)  # fmt: skip
    score = speed.forward_seconds(sizes.teacher, sizes.teacher_b, gpu, per_forward, scored, zero3, num_gpus)
    decode = speed.decode_rate(sizes.student, sizes.student_b, gpu, slots, prompt + completion / 2)
    rates = {
        "generate": num_gpus * decode,
        "score": num_gpus * scored / score,
        "train": num_gpus * completion / step,
    }
    rollouts = sum(len(rollouts_of(config, index)) for index in range(num_refreshes(config)))
    tokens = {
        "generate": rollouts * completion,
        "score": rollouts * completion,
        "train": config.train.max_steps * config.train.batch_size * completion,
    }
    return rates, {name: tokens[name] / rate / 3600 for name, rate in rates.items()}, rollouts


def bytes_per_token(config: Config, teacher: Shape) -> float:
    """Bytes on disk of one scored token: the signal and the plain columns. A nucleus is planned at its most ids."""
    signal = config.teacher_signal
    itemsize = checkpoints.DTYPES[config.models.teacher_dtype].itemsize
    kept = min(signal.signal_k, teacher.vocab_size)
    by_kind = {
        "topk": PACKED_ID_BYTES * kept + PACKED_TOKEN_BYTES,
        "nucleus": PACKED_ID_BYTES * kept + PACKED_TOKEN_BYTES,
        "hidden": HIDDEN_SHARE * itemsize * teacher.hidden,
        "full": FULL_SHARE * itemsize * teacher.vocab_size,
    }
    return by_kind[signal.signal] + PLAIN_COLUMN_BYTES


def free_bytes(world: World) -> int | None:
    """Free memory of the fullest rank's GPU, what torch holds in reserve included; None on a CPU (collective)."""
    if world.device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(world.device)
    idle = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
    return min(world.gather(free + idle))


def gen_rows(config: Config, shape: Shape, itemsize: int, free: float) -> int:
    """Slots that fit into `free` bytes beside the prompts being read: a multiple of 8, at most a unit's rollouts and 512."""
    most = min(MOST_GEN_ROWS, config.rollout.rollouts_per_unit)
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    prefill = PREFILL_TOKENS * memory.forward_bytes_per_token(shape, itemsize)
    rows = int((free * AUTO_MARGIN - prefill) // memory.slot_bytes(shape, itemsize, tokens))
    return max(1, min(most, rows // 8 * 8 if rows >= 8 else rows))


def auto_gen_micro_batch(config: Config, student_config: Any, device_free_bytes: float | None) -> int:
    """gen_micro_batch: auto. Rows of one generation call with the models loaded; 128 on a CPU (None)."""
    if device_free_bytes is None:
        return CPU_GEN_ROWS
    shape, itemsize = memory.shape_of(student_config), checkpoints.DTYPES[config.run.dtype].itemsize
    sizes = _Sizes(config, _anywhere(device_free_bytes), shape, shape, 0)
    return gen_rows(config, shape, itemsize, device_free_bytes - _merged(sizes))


def _anywhere(free: float) -> Machine:
    return Machine(speed.GPUS["h100"], 1, free / GIB)
