"""Plan a run: memory of each phase and whether it fits, expected speed, and cache size.

Pure arithmetic over two model configurations; nothing is loaded. Memory means
`torch.cuda.max_memory_allocated` of the fullest GPU. RESERVE is kept free on top of it for the CUDA
context, NCCL and allocator fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stages.data.signals import KINDS
from stages.loops import budgets
from stages.loops.budgets import Parts, total
from stages.models import memory, pretrained, speed
from stages.models.memory import GIB, Shape
from stages.models.offload import must_offload
from stages.models.speed import Gpu
from stages.models.teacher import zero3_settings
from stages.runtime.config import Config
from stages.runtime.errors import UserError
from stages.runtime.split import rollouts_of, rows_per_micro_step

RESERVE_GIB, RESERVE_SHARE = 1.5, 0.03
PLAIN_COLUMN_BYTES = 33  # docs/results.md: 447 - 414 bytes a token; the demo's are 26


@dataclass(frozen=True)
class Machine:
    """`num_gpus` equal GPUs of `gib` GiB, one process each.

    `zero2`: the student's optimizer is sharded by DeepSpeed ZeRO-2.
    """

    gpu: Gpu
    num_gpus: int
    gib: float
    zero2: bool = False

    @property
    def usable(self) -> float:
        """Bytes of one GPU available to tensors."""
        return max(0.0, self.gib * (1 - RESERVE_SHARE) - RESERVE_GIB) * GIB


@dataclass(frozen=True)
class Phase:
    """Peak memory of one GPU in a phase, in bytes by part."""

    name: str
    parts: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Memory by phase, rates of all GPUs together (tokens/s), hours and cache size of the whole run.

    `hours` and `cache_bytes` assume completions of `mean_completion` and prompts of `mean_prompt` tokens.
    `launch_bound`: seconds that kernel launches alone take per decode step, if they limit the rate of
    `generate`; that rate is then an upper bound, not an estimate.
    """

    machine: Machine
    student: Shape
    teacher: Shape
    trained: int
    phases: list[Phase]
    rates: dict[str, float]
    hours: dict[str, float]
    launch_bound: float | None
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
        """Bytes left on a GPU in the worst phase; negative if memory is short."""
        return self.machine.usable - self.worst.peak

    @property
    def fits(self) -> bool:
        return self.spare >= 0


@dataclass(frozen=True)
class _Sizes:
    """Inputs shared by all phases."""

    config: Config
    machine: Machine
    student: Shape
    teacher: Shape
    trained: int

    @property
    def student_b(self) -> int:
        return pretrained.DTYPES[self.config.run.dtype].itemsize

    @property
    def teacher_b(self) -> int:
        return pretrained.DTYPES[self.config.models.teacher_dtype].itemsize

    @property
    def card(self) -> float:
        """Total bytes of one GPU."""
        return self.machine.gib * GIB

    @property
    def longest(self) -> int:
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens


def make_plan(
    config: Config, machine: Machine, mean_completion: float = 0.0, mean_prompt: float = 0.0
) -> Plan:
    """Plan `config` on `machine`. A mean of 0 stands for its bound: max_new_tokens or max_prompt_tokens.

    With role generate or score, `machine` describes the GPUs of those processes, which do nothing else.

    Raises UserError if a model cannot be read or planned, the teacher is missing, the batch is impossible,
    or a mean exceeds its upper bound.
    """
    models = config.models
    if not models.teacher_model:
        raise UserError("teacher_model is empty: a plan needs the models of both stages.")
    if config.rollout.role == "both":
        rows_per_micro_step(config, machine.num_gpus)
    _check_mean("max_new_tokens", config.rollout.max_new_tokens, mean_completion)
    _check_mean("max_prompt_tokens", config.data.max_prompt_tokens, mean_prompt)
    student = memory.shape_of(pretrained.load_config(models.student_model))
    teacher = memory.shape_of(pretrained.load_config(models.teacher_model))
    sizes = _Sizes(config, machine, student, teacher, budgets.trained_parameters(config, student))
    completion = mean_completion or float(config.rollout.max_new_tokens)
    prompt = mean_prompt or float(config.data.max_prompt_tokens)
    phases = plan_phases(sizes)
    rates, hours, launch_bound, rollouts = _speeds(sizes, completion, prompt)
    each = bytes_per_token(config, teacher)
    kept_head = memory.head_bytes(teacher, sizes.teacher_b) if config.teacher_signal.signal == "hidden" else 0
    plan = Plan(
        machine,
        student,
        teacher,
        sizes.trained,
        phases,
        rates,
        hours,
        launch_bound,
        rollouts,
        completion,
        prompt,
        rollouts * completion * each + kept_head,
        each,
        0.0 if config.rollout.role == "generate" else float(teacher.parameters * sizes.teacher_b),
    )
    plan.advice.extend([] if plan.fits else _advice(sizes, plan.worst))
    return plan


def _check_mean(key: str, most: int, mean: float) -> None:
    if mean > most:
        raise UserError(
            f"a mean of {mean:,.0f} tokens is more than {key} {most} lets there be; lower it, or raise {key}."
        )


@dataclass(frozen=True)
class _Writing:
    """Memory of stage one: slots, tokens of a scoring forward, and the peak of generating and of scoring.

    The engine keeps its weights and slots while the teacher scores, unless the models take turns on the GPU
    or generating and scoring run on separate GPUs.
    """

    slots: int
    score_tokens: int
    generate: Parts
    score: Parts


def plan_phases(sizes: _Sizes) -> list[Phase]:
    """evaluate, generate, score, train, refresh, in pipeline order; role generate or score: only that one."""
    student, state = _student_parts(sizes), _state_parts(sizes)
    first, later = _writing(sizes, {}), _writing(sizes, state)
    alone = {"generate": first.generate, "score": first.score}
    if (role := sizes.config.rollout.role) in alone:
        return [Phase(role, alone[role])]
    return [
        Phase("evaluate", _evaluation_parts(sizes, student)),
        Phase("generate", first.generate),
        Phase("score", first.score),
        Phase("train", student | state | _step_parts(sizes)),
        Phase("refresh", max(later.generate, later.score, key=total)),
    ]


def _student_parts(sizes: _Sizes) -> Parts:
    if not sizes.config.lora.use_lora:
        return {"student": 4.0 * sizes.student.parameters}
    return {"student": float(sizes.student.parameters * sizes.student_b), "adapters": 4.0 * sizes.trained}


def _teacher_parts(sizes: _Sizes) -> Parts:
    """ZeRO-3: shard and whole head, or only the head if the shard is offloaded. Otherwise: all weights."""
    if not sizes.config.models.teacher_ds_zero3:
        return {"teacher": float(sizes.teacher.parameters * sizes.teacher_b)}
    shard = memory.zero3_shard_bytes(sizes.teacher, sizes.teacher_b, sizes.machine.num_gpus)
    zero = zero3_settings(sizes.config)["zero_optimization"]
    offload = zero.get("offload_param", {}).get("device", "none") != "none"
    head = float(memory.head_bytes(sizes.teacher, sizes.teacher_b))
    return {"teacher shard": 0.0 if offload else float(shard), "teacher head": head}


def _state_parts(sizes: _Sizes) -> Parts:
    return budgets.state_parts(sizes.config, sizes.student, sizes.machine.num_gpus, sizes.machine.zero2)


def _writing(sizes: _Sizes, state: Parts) -> _Writing:
    """Memory of stage one, or of a refresh if training's `state` is on the GPU too."""
    config, shape, apart = sizes.config, sizes.student, sizes.config.rollout.role != "both"
    own, teacher, gathered = _student_parts(sizes), _teacher_parts(sizes), _gathered(sizes)
    student = state | own
    crowded = must_offload(total(own), sizes.trained, total(teacher), sizes.card)
    takes_turns = crowded and not apart and not sizes.machine.zero2
    moves = takes_turns and not config.models.teacher_ds_zero3
    copied = {
        "merged LoRA copy" if config.lora.use_lora else "weights in dtype": budgets.copied_bytes(
            config, shape
        )
    }
    writing = student | copied | ({} if moves or apart else teacher)
    beside = 0.0 if apart else budgets.beside_slots(config, sizes.teacher, gathered, sizes.card)
    slots = _slots(sizes, shape, sizes.student_b, writing, beside)
    kept = budgets.slot_parts(config, shape, sizes.student_b, slots)
    prefill = budgets.prefill_bytes(config, shape, sizes.student_b, slots)
    scoring = state | teacher if takes_turns or apart else writing | kept
    tokens = _scoring_tokens(sizes, gathered, scoring)
    forward = budgets.scoring_parts(config, sizes.teacher, gathered, tokens, sizes.card)
    return _Writing(slots, tokens, writing | kept | {"activations": prefill}, scoring | forward)


def _gathered(sizes: _Sizes) -> float:
    if not sizes.config.models.teacher_ds_zero3:
        return 0.0
    return budgets.gathered_bytes(sizes.config, sizes.teacher, sizes.machine.num_gpus)


def _slots(sizes: _Sizes, shape: Shape, itemsize: int, resident: Parts, beside: float) -> int:
    """gen_micro_batch, with `auto` resolved for this machine; at most the rollouts of a unit."""
    given = sizes.config.rollout.gen_micro_batch
    if given != "auto":
        return min(given, sizes.config.rollout.rollouts_per_unit)
    return budgets.gen_rows(sizes.config, shape, itemsize, sizes.machine.usable - total(resident), beside)


def _scoring_tokens(sizes: _Sizes, gathered: float, resident: Parts) -> int:
    """Padded tokens of a full scoring forward."""
    config, cap = sizes.config, sizes.config.train.micro_batch_tokens
    if cap == "auto":
        free = sizes.machine.usable - total(resident)
        cap = budgets.score_tokens(config, sizes.teacher, gathered, free, sizes.card)
    unit, rows = config.rollout.rollouts_per_unit, config.rollout.lp_micro_batch
    return min(max(cap, sizes.longest), (unit if rows == "auto" else min(rows, unit)) * sizes.longest)


def _step_tokens(sizes: _Sizes) -> int:
    """Padded tokens of the largest training forward."""
    config, longest = sizes.config, sizes.longest
    free = (
        sizes.machine.usable - total(_student_parts(sizes)) - total(_state_parts(sizes)) - _kept_head(sizes)
    )
    fitting = budgets.train_tokens(config, sizes.student, free, sizes.card)
    caps = budgets.train_caps(config, fitting)
    rows = rows_per_micro_step(config, sizes.machine.num_gpus)
    tokens = min(rows, caps.rows or rows) * longest
    return min(tokens, max(caps.tokens or tokens, longest))


def _kept_head(sizes: _Sizes) -> int:
    """Bytes of the teacher's head, which training on a `hidden` cache keeps in memory."""
    is_hidden = sizes.config.teacher_signal.signal == "hidden"
    return memory.head_bytes(sizes.teacher, sizes.teacher_b) if is_hidden else 0


def _step_parts(sizes: _Sizes) -> Parts:
    """Forward and backward of the largest micro-batch, all sequences at full length."""
    tokens = _step_tokens(sizes)
    scored = -(-tokens * sizes.config.rollout.max_new_tokens // sizes.longest)
    parts = budgets.step_parts(sizes.config, sizes.student, tokens, scored, sizes.card)
    update = float(memory.update_bytes(sizes.trained, sizes.machine.num_gpus, sizes.machine.zero2))
    parts["loss"] += _kept_head(sizes)
    # Activations are freed before the optimizer steps.
    return parts | {"activations": max(parts["activations"], update)}


def _evaluation_parts(sizes: _Sizes, student: Parts) -> Parts:
    """The plain teacher writes and scores held-out text beside the student, if 1.1 times its weights fit.

    Otherwise that is skipped, and only the student writes.
    """
    config, weights = sizes.config, float(sizes.teacher.parameters * sizes.teacher_b)
    if weights * 1.1 > sizes.machine.usable - total(student):
        resident = student | {"merged copy": budgets.copied_bytes(config, sizes.student)}
        return resident | _writer_parts(sizes, sizes.student, sizes.student_b, resident, 0.0)
    resident = student | {"plain teacher": weights}
    beside = budgets.beside_slots(config, sizes.teacher, 0.0, sizes.card)
    writing = resident | _writer_parts(sizes, sizes.teacher, sizes.teacher_b, resident, beside)
    scoring = {name: size for name, size in writing.items() if name != "activations"}
    tokens = _scoring_tokens(sizes, 0.0, scoring)
    scoring |= budgets.scoring_parts(config, sizes.teacher, 0.0, tokens, sizes.card)
    return max(writing, scoring, key=total)


def _writer_parts(sizes: _Sizes, shape: Shape, itemsize: int, resident: Parts, beside: float) -> Parts:
    slots = _slots(sizes, shape, itemsize, resident, beside)
    prefill = budgets.prefill_bytes(sizes.config, shape, itemsize, slots)
    return budgets.slot_parts(sizes.config, shape, itemsize, slots) | {"activations": prefill}


def _advice(sizes: _Sizes, phase: Phase) -> list[str]:
    """Keys to lower, largest adjustable part first."""
    whole = {
        "keys and values": "gen_micro_batch (fewer slots), max_new_tokens or max_prompt_tokens",
        "logits": "gen_micro_batch",
        "selection": "micro_batch_tokens",
        "activations": {"train": "micro_batch_tokens or lp_micro_batch, or set gradient_checkpointing"}.get(
            phase.name,
            "micro_batch_tokens or lp_micro_batch" if "selection" in phase.parts else "max_prompt_tokens",
        ),
        "loss": "signal hidden or full to topk",
        "optimizer": "trained parameters: use_lora or lora_r, or shard them with ZeRO-2"
        " (recipes/accelerate_zero2.yaml)",
        "gradients": "trained parameters: use_lora or lora_r, or shard them with ZeRO-2"
        " (recipes/accelerate_zero2.yaml)",
        "teacher shard": "the teacher's share: more cards, or offload in a teacher_ds_config",
        "teacher": "the teacher's share: teacher_ds_zero3 over more cards",
        "plain teacher": "gen_micro_batch, or evaluate on a kept eval_teacher_text",
    }
    ordered = sorted(phase.parts, key=lambda part: -phase.parts[part])
    return list(dict.fromkeys(whole[part] for part in ordered if part in whole))[:3]


def num_refreshes(config: Config) -> int:
    """How often rollouts are written: in stage one, and in each refresh up to the last step."""
    every = config.refresh.refresh_every if config.refresh.refresh_mode != "off" else 0
    return 1 + ((config.train.max_steps - 1) // every if every else 0)


def _speeds(
    sizes: _Sizes, completion: float, prompt: float
) -> tuple[dict[str, float], dict[str, float], float | None, int]:
    """Rates of all GPUs (completion tokens/s), hours by phase, launch bound and total number of rollouts.

    With role generate or score, only that phase is included.
    """
    config, machine, role = sizes.config, sizes.machine, sizes.config.rollout.role
    gpu, num_gpus = machine.gpu, machine.num_gpus
    # As in refreshes, which take up most of a run.
    writing = _writing(sizes, _state_parts(sizes) if role == "both" else {})
    per_forward = writing.score_tokens
    scored = per_forward * completion / (completion + prompt)
    zero3 = config.models.teacher_ds_zero3
    step = speed.train_seconds(
        sizes.student,
        gpu,
        completion + prompt,
        completion,
        frozen=config.lora.use_lora,
        checkpointing=config.train.gradient_checkpointing,
        compiled=config.train.compile is not False,
    )
    score = speed.forward_seconds(sizes.teacher, sizes.teacher_b, gpu, per_forward, scored, zero3, num_gpus)
    decode = speed.decode_seconds(sizes.student, sizes.student_b, gpu, writing.slots, prompt + completion / 2)
    launches = speed.launch_seconds(sizes.student)
    rates = {
        "generate": num_gpus * writing.slots / decode,
        "score": num_gpus * scored / score,
        "train": num_gpus * completion / step,
    }
    rollouts = sum(len(rollouts_of(config, index)) for index in range(num_refreshes(config)))
    tokens = {
        "generate": rollouts * completion,
        "score": rollouts * completion,
        "train": config.train.max_steps * config.train.batch_size * completion,
    }
    rates = {name: rate for name, rate in rates.items() if role in (name, "both")}
    launch_bound = launches if "generate" in rates and decode == launches else None
    return rates, {name: tokens[name] / rate / 3600 for name, rate in rates.items()}, launch_bound, rollouts


def bytes_per_token(config: Config, teacher: Shape) -> float:
    """Bytes on disk per scored token: signal and plain columns. Nucleus: its maximum number of ids."""
    signal, itemsize = config.teacher_signal, pretrained.DTYPES[config.models.teacher_dtype].itemsize
    kind = KINDS[signal.signal]
    return kind.bytes_per_token(signal, teacher.hidden, teacher.vocab_size, itemsize) + PLAIN_COLUMN_BYTES
