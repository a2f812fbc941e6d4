"""Plan a run: memory of each phase and whether it fits, expected speed, and cache size.

Arithmetic over two model configurations: no model is loaded, so nothing can be measured. Memory means
`torch.cuda.max_memory_allocated` of the fullest GPU. RESERVE is kept free on top of it for the CUDA context,
NCCL and allocator fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from stages.data.batches import MOST_KEYS
from stages.data.signals import KINDS
from stages.engine.decoder import PREFILL_TOKENS
from stages.loops import budgets
from stages.models import memory, pretrained, speed
from stages.models.memory import GIB, Shape
from stages.models.offload import must_offload
from stages.models.speed import Gpu
from stages.models.teacher import is_sharded, resident_bytes
from stages.runtime.config import Config
from stages.runtime.errors import UserError
from stages.runtime.split import rollouts_of, rows_per_micro_step

RESERVE_GIB, RESERVE_SHARE = 1.5, 0.03
SAMPLING_BYTES = 32  # per slot and id: fp32 logits and logprobs, fp64 probabilities and their sums
SELECTION_GIB = 4 / 3  # one fp32 array of `dualkl.compress`, at most
LOSS_GIB = {True: 1.0, False: 4.0}  # chunks of `dual_kl`, at most: in kernels, in plain PyTorch
PLAIN_COLUMN_BYTES = 33  # docs/results.md: 447 - 414 bytes a token; the demo's are 26
ADVICE = {
    "keys and values": "gen_micro_batch (fewer slots), max_new_tokens or max_prompt_tokens",
    "logits": "gen_micro_batch",
    "prefill": "max_prompt_tokens",
    "scoring": "micro_batch_tokens or lp_micro_batch",
    "activations": "micro_batch_tokens or lp_micro_batch, or set gradient_checkpointing",
    "loss": "signal hidden or full to topk",
    "optimizer": "trained parameters: use_lora or lora_r, or shard them with ZeRO-2"
    " (recipes/accelerate_zero2.yaml)",
    "teacher shard": "the teacher's share: more cards, or offload in a teacher_ds_config",
    "teacher": "the teacher's share: teacher_ds_zero3 over more cards",
    "plain teacher": "gen_micro_batch, or evaluate on a kept eval_teacher_text",
}

Parts = dict[str, float]


def total(parts: Parts) -> float:
    return sum(parts.values())


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
    """Peak memory of one GPU in a phase, in bytes by part; `size`: slots, or tokens of a forward."""

    name: str
    parts: Parts
    size: int

    @property
    def peak(self) -> float:
        return total(self.parts)


def make_plan(
    config: Config, machine: Machine, mean_completion: float = 0.0, mean_prompt: float = 0.0
) -> Plan:
    """Plan `config` on `machine`. A mean of 0 stands for its bound: max_new_tokens or max_prompt_tokens.

    Raises UserError if a model cannot be read or planned, the teacher is missing, the batch is impossible,
    or a mean exceeds its upper bound.
    """
    models = config.models
    if not models.teacher_model:
        raise UserError("teacher_model is empty: a plan needs the models of both stages.")
    if config.rollout.role == "both":
        rows_per_micro_step(config, machine.num_gpus)
    return Plan(
        config,
        machine,
        memory.shape_of(pretrained.load_config(models.student_model)),
        memory.shape_of(pretrained.load_config(models.teacher_model)),
        _mean("max_new_tokens", config.rollout.max_new_tokens, mean_completion),
        _mean("max_prompt_tokens", config.data.max_prompt_tokens, mean_prompt),
    )


def _mean(key: str, most: int, mean: float) -> float:
    if mean > most:
        raise UserError(
            f"a mean of {mean:,.0f} tokens is more than {key} {most} lets there be; lower it, or raise {key}."
        )
    return mean or float(most)


@dataclass(frozen=True)
class Plan:
    """A run on a machine: memory of one GPU by phase, speed of all GPUs, duration and cache size.

    With role generate or score, the machine is that of those processes, which do nothing else.
    """

    config: Config
    machine: Machine
    student: Shape
    teacher: Shape
    mean_completion: float
    mean_prompt: float

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def spare(self) -> float:
        """Bytes left on a GPU in the worst phase; negative if memory is short."""
        return self.machine.usable - self.worst.peak

    @property
    def worst(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def advice(self) -> list[str]:
        """What to lower if the plan does not fit, largest part of the worst phase first."""
        parts = sorted(self.worst.parts, key=lambda part: -self.worst.parts[part])
        return [] if self.fits else list(dict.fromkeys(ADVICE[part] for part in parts if part in ADVICE))[:3]

    @cached_property
    def phases(self) -> list[Phase]:
        """evaluate, generate, score, train, refresh, in pipeline order; role generate or score: only that."""
        generate, score = self._writing({})
        if self.config.rollout.role != "both":
            return [generate if self.config.rollout.role == "generate" else score]
        optimizer, gradients = memory.state_bytes(self.trained, self.machine.num_gpus, self.machine.zero2)
        state = {"optimizer": float(optimizer), "gradients": float(gradients)}
        refresh = max(self._writing(state), key=lambda phase: phase.peak)
        train = self._training(self._student() | state)
        return [self._evaluation(), generate, score, train, Phase("refresh", refresh.parts, refresh.size)]

    @property
    def rates(self) -> dict[str, float]:
        """Completion tokens/s of all GPUs, by phase."""
        config, gpu, found = self.config, self.machine.gpu, {}
        size = {phase.name: phase.size for phase in self.phases}
        if slots := size.get("generate"):
            mean = self.mean_prompt + self.mean_completion / 2
            found["generate"] = slots / speed.decode_seconds(self.student, self.student_b, gpu, slots, mean)
        if "score" in size:
            found["score"] = self._scored_share(self.group) / speed.forward_seconds(self.teacher, gpu)
        if "train" in size:
            train, is_lora = config.train, config.lora.use_lora
            found["train"] = self._scored_share(self.trained_group) / speed.train_seconds(
                self.student, gpu, is_lora, train.gradient_checkpointing, train.compile is not False
            )
        return {name: rate * self.machine.num_gpus for name, rate in found.items()}

    def _scored_share(self, group: int) -> float:
        """Completion tokens among those of forwards in which `group` rows share a prompt."""
        return self.mean_completion / (self.mean_completion + self.mean_prompt / group)

    @property
    def hours(self) -> dict[str, float]:
        """By phase, of the whole run, without loading and evaluation."""
        trained_rows = self.config.train.max_steps * self.config.train.batch_size
        rows = {"generate": self.rollouts, "score": self.rollouts, "train": trained_rows}
        return {name: rows[name] * self.mean_completion / rate / 3600 for name, rate in self.rates.items()}

    @property
    def rollouts(self) -> int:
        """Of stage one, and of each refresh up to the last step."""
        refresh, last = self.config.refresh, self.config.train.max_steps - 1
        every = refresh.refresh_every if refresh.refresh_mode != "off" else 0
        num_refreshes = 1 + (last // every if every else 0)
        return sum(len(rollouts_of(self.config, index)) for index in range(num_refreshes))

    @property
    def cache_bytes(self) -> float:
        head = self.teacher_head if self.config.teacher_signal.signal == "hidden" else 0
        return self.rollouts * self.mean_completion * self.bytes_per_token + head

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per scored token: signal and plain columns. Nucleus: its maximum number of ids."""
        signal, shape = self.config.teacher_signal, self.teacher
        kept = KINDS[signal.signal].bytes_per_token(signal, shape.hidden, shape.vocab_size, self.teacher_b)
        return kept + PLAIN_COLUMN_BYTES

    @property
    def host_bytes(self) -> float:
        """Host memory in which a process reads the teacher."""
        return 0 if self.config.rollout.role == "generate" else self.teacher.parameters * self.teacher_b

    @cached_property
    def trained(self) -> int:
        return memory.trained_parameters(self.student, self.config.lora)

    @property
    def student_b(self) -> int:
        """Bytes of a number in dtype."""
        return pretrained.DTYPES[self.config.run.dtype].itemsize

    @property
    def teacher_b(self) -> int:
        return pretrained.DTYPES[self.config.models.teacher_dtype].itemsize

    @property
    def teacher_head(self) -> int:
        return self.teacher.head * self.teacher_b

    @property
    def longest(self) -> int:
        return self.config.data.max_prompt_tokens + self.config.rollout.max_new_tokens

    @property
    def group(self) -> int:
        """Rows that share a prompt in a forward, if both models' attention allows packed rows."""
        config = self.config
        shares = config.train.packing is not False and config.models.attn_implementation == "sdpa"
        return config.rollout.group_size if shares else 1

    @property
    def trained_group(self) -> int:
        return min(self.group, rows_per_micro_step(self.config, self.machine.num_gpus))

    def _keys(self, group: int) -> float:
        """Keys per token of a forward of full-length rows: more than 1 where rows share prompts."""
        prompt, new = self.config.data.max_prompt_tokens, self.config.rollout.max_new_tokens
        return min(MOST_KEYS, group * (prompt + new) / (prompt + group * new))

    def _student(self) -> Parts:
        if not self.config.lora.use_lora:
            return {"student": 4.0 * self.student.parameters}
        return {"student": float(self.student.parameters * self.student_b), "adapters": 4.0 * self.trained}

    def _copy(self) -> Parts:
        """The engine's own weights: layers merged with LoRA; in full fine-tuning all weights in dtype."""
        if self.config.lora.use_lora:
            layers = memory.adapted(self.student, self.config.lora.lora_targets)
            return {"merged LoRA copy": float(self.student_b * sum(n * m for _, n, m in layers))}
        return {"weights in dtype": float(self.student.parameters * self.student_b * (self.student_b < 4))}

    def _scorer(self) -> Parts:
        resident = resident_bytes(self.config, self.machine.num_gpus)
        if not is_sharded(self.config, self.machine.num_gpus):
            return {"teacher": resident}
        return {"teacher shard": resident - self.teacher_head, "teacher head": float(self.teacher_head)}

    def _writing(self, state: Parts) -> tuple[Phase, Phase]:
        """generate and score of stage one, or of a refresh if training's `state` is on the GPU too.

        The engine keeps its weights and slots while the teacher scores, unless the models take turns on the
        GPU or generating and scoring run on separate GPUs.
        """
        config, own, teacher = self.config, self._student(), self._scorer()
        apart, resident = config.rollout.role != "both", resident_bytes(config, self.machine.num_gpus)
        crowded = must_offload(total(own), self.trained, resident, self.machine.gib * GIB)
        takes_turns = apart or (crowded and not self.machine.zero2)
        is_away = takes_turns and (apart or not is_sharded(config, self.machine.num_gpus))
        beside = state | own | self._copy() | ({} if is_away else teacher)
        generate = self._generating("generate", self.student, self.student_b, beside, scores_too=not apart)
        kept = {name: size for name, size in generate.parts.items() if name != "prefill"}
        return generate, self._scoring(state | teacher if takes_turns else kept)

    def _generating(self, name: str, shape: Shape, itemsize: int, resident: Parts, scores_too: bool) -> Phase:
        """Slots as long as the longest sequence, and the prompts that are prefilled at once."""
        kv = memory.kv_bytes(shape, itemsize)
        prompt = self.config.data.max_prompt_tokens * (memory.forward_bytes(shape, itemsize) + kv)
        kept = float(self.longest * kv)
        slot: Parts = {"keys and values": kept, "logits": float(SAMPLING_BYTES * shape.vocab_size)}
        at_once = max(PREFILL_TOKENS["cuda"] / self.config.data.max_prompt_tokens, 1)  # prompts
        given, most = self.config.rollout.gen_micro_batch, self.config.rollout.rollouts_per_unit
        if given == "auto":
            room = self._room(resident)
            room -= min(budgets.SCORING_BYTES, room / 2) if scores_too else 0
            fitting = int(max((room - at_once * prompt) / total(slot), room / (total(slot) + prompt)))
            given = fitting
            most = min(most, budgets.MOST_GEN_ROWS)
        slots = max(1, min(most, given))
        parts = {part: slots * size for part, size in slot.items()}
        return Phase(name, resident | parts | {"prefill": min(slots, at_once) * prompt}, slots)

    def _scoring(self, resident: Parts) -> Phase:
        """A full scoring forward, padding included, or the selection from its last states if larger."""
        rollout, each = self.config.rollout, memory.forward_bytes(self.teacher, self.teacher_b)
        if self.group > 1:
            each += round(self._keys(self.group) * memory.layer_kv_bytes(self.teacher, self.teacher_b))
        if is_sharded(self.config, self.machine.num_gpus):
            gathered = memory.gathered_bytes(self.teacher, self.teacher_b)
            resident = resident | {"gathered weights": float(gathered)}
        tokens = self.config.train.micro_batch_tokens
        if tokens == "auto":
            tokens = _whole_tokens(self._room(resident) / each)
        tokens = self._cut(tokens, rollout.rollouts_per_unit, self.group)
        selection = min(SELECTION_GIB, self.machine.gib / 48) * GIB
        selection = min(selection, 4.0 * tokens * self.teacher.vocab_size)
        selection += tokens * self.teacher.hidden * self.teacher_b
        return Phase("score", resident | {"scoring": max(float(tokens * each), selection)}, tokens)

    def _training(self, resident: Parts) -> Phase:
        """Forward and backward of the largest micro-batch, all sequences at full length.

        Chunks of the loss and weights cast by autocast are freed before the backward's activations.
        """
        config, shape, is_lora = self.config, self.student, self.config.lora.use_lora
        loss, signal = config.loss, config.teacher_signal.signal
        is_fused = loss.objective == "gated" and loss.gate_on == "rkl" and not loss.teacher_smoothing
        chunks = min(LOSS_GIB[is_fused], self.machine.gib / 16) * GIB
        heads = (self.teacher_head if signal == "hidden" else 0) + (0 if is_lora else 4 * shape.head)
        casts = self.trained * self.student_b if self.student_b < 4 else 0
        kept, passing = memory.training_bytes(
            shape, self.student_b, config.train.gradient_checkpointing, is_lora
        )
        if self.trained_group > 1:
            copies = round(self._keys(self.trained_group) * memory.layer_kv_bytes(shape, self.student_b))
            passing += 2 * copies  # and their gradients
            kept += 0 if config.train.gradient_checkpointing else shape.layers * copies
        kept += 6 * shape.vocab_size if signal == "full" else 0
        tokens = config.train.micro_batch_tokens
        if tokens == "auto":
            room = self._room(resident | {"heads": heads, "chunks": chunks, "casts": casts})
            tokens = _whole_tokens(room / (kept + passing))
        rows = rows_per_micro_step(config, self.machine.num_gpus)
        tokens = self._cut(tokens, rows, self.trained_group)
        activations = {"activations": float(tokens * (kept + passing))}
        loss_bytes = {"loss": heads + max(0.0, max(chunks, casts) - tokens * passing)}
        return Phase("train", resident | activations | loss_bytes, tokens)

    def _evaluation(self) -> Phase:
        """The plain teacher writes beside the student if 1.1 times its weights fit; else the student does."""
        own, weights = self._student(), float(self.teacher.parameters * self.teacher_b)
        if weights * 1.1 > self.machine.usable - total(own):
            resident = own | self._copy()
            return self._generating("evaluate", self.student, self.student_b, resident, scores_too=False)
        resident = own | {"plain teacher": weights}
        return self._generating("evaluate", self.teacher, self.teacher_b, resident, scores_too=True)

    def _room(self, resident: Parts) -> float:
        """Bytes that `auto` fills."""
        return budgets.MARGIN * (self.machine.usable - total(resident))

    def _cut(self, tokens: int, rows: int, group: int) -> int:
        """Tokens of the largest forward: at most `tokens`, lp_micro_batch and `rows`, at least one row."""
        most = self.config.rollout.lp_micro_batch
        rows = rows if most == "auto" else min(most, rows)
        prompts = -(-rows // group)
        whole = prompts * self.config.data.max_prompt_tokens + rows * self.config.rollout.max_new_tokens
        return min(max(tokens, self.longest), whole)


def _whole_tokens(fitting: float) -> int:
    step = budgets.STEP_TOKENS
    return max(budgets.LEAST_TOKENS, min(budgets.MOST_TOKENS, int(fitting) // step * step))
