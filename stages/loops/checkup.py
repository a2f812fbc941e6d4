"""Checks of models, engine and loss for `dualkl doctor`, on a few rows in a temporary run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import cache
from dualkl import Head, HiddenTeacher, dual_kl
from dualkl.divergences import compare
from stages.data.alignment import align, at_scored
from stages.data.batches import to_tensors
from stages.data.prompts import Prompt
from stages.data.signals import cached_head
from stages.engine.opening import open_engine
from stages.loops import machine, preflight, probe, refresh, setup
from stages.loops.planning import Plan
from stages.loops.setup import Vocabulary
from stages.models import ends
from stages.models.student import Student, load_student
from stages.models.teacher import TeacherLoader, load_teacher, plain_model_fits
from stages.runtime.config import SECTION_OF, Config
from stages.runtime.errors import UserError
from stages.runtime.metrics import Metrics
from stages.runtime.run import Run

ROWS, TOKENS = 8, 16
ZERO = {"fp32": 1e-4, "bf16": 0.02}
"""Nats per token that rounding may leave between a student and itself as a teacher, by dtype."""
SAME = {"fp32": 1e-4, "bf16": 1e-3}
"""Nats per token, KL between one teacher sharded and plain."""
LARGE_ERROR = 0.1
"""Nats per token, KL between a teacher and its quantisation."""
STIR = 0.02
"""Standard deviation of LoRA's B during the check of the engine: an adapter of zeros would prove nothing."""


class NotRun(Exception):
    """A check lacks what an earlier one should have provided."""


@dataclass
class Checkup:
    """What earlier checks have loaded for later ones. `run` has the user's configuration."""

    run: Run
    folder: str
    vocabulary: Vocabulary | None = None
    prompts: list[Prompt] = field(default_factory=list)
    student: Student | None = None
    rows: list[cache.Record] = field(default_factory=list)

    @property
    def config(self) -> Config:
        return self.run.config

    @cached_property
    def plan(self) -> Plan | None:
        return machine.plan_of(self.config, self.run.world)

    def read(self) -> Vocabulary:
        """The vocabulary, once the models were read."""
        if self.vocabulary is None:
            raise NotRun("the models cannot be read")
        return self.vocabulary

    def tiny(self, **values: Any) -> Run:
        """A run of a few short rows in the temporary folder, where nothing of the user's is touched."""
        small = {
            "runs_dir": self.folder,
            "run_name": "doctor",
            "cache_dir": "",
            "extra_caches": {},
            "role": "both",
            "refresh_mode": "inline",
            "group_size": 1,
            "rollouts_per_refresh": ROWS,
            "rollouts_per_unit": -(-ROWS // self.run.world.size),
            "batch_size": max(ROWS, self.config.train.batch_size),
            "max_new_tokens": min(TOKENS, self.config.rollout.max_new_tokens),
            "gen_micro_batch": ROWS,
            "compile": False,
            "wandb_project": "",
            "teacher_ds_zero3": False,
        }
        config = changed(self.config, **(small | values))
        return replace(
            self.run, config=config, metrics=Metrics(config, self.run.world, "metrics.jsonl", True)
        )


def changed(config: Config, **values: Any) -> Config:
    """The configuration with other values of some keys, unchecked."""
    sections: dict[str, dict[str, Any]] = {}
    for leaf, value in values.items():
        sections.setdefault(SECTION_OF[leaf], {})[leaf] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=new) for name, new in sections.items()}
    )


def check_models(checkup: Checkup) -> str:
    """Configurations and tokenizers of both models."""
    config = checkup.config
    read = setup.shared_vocabulary if config.models.teacher_model else setup.cached_vocabulary
    checkup.vocabulary = read(config)
    return f"student and teacher share {checkup.vocabulary.size:,} ids"


def check_ends(checkup: Checkup) -> str:
    """The tokens that end a completion, with remarks; UserError if none of them can ever be drawn."""
    config, found = checkup.config, checkup.read()
    ends.check_ends(config, found.tokenizer, found.size)
    for remark in ends.remarks(config, found.tokenizer, found.size) if config.models.teacher_model else ():
        print(remark)
    stops = ends.student_ends(config, found.tokenizer, found.size)
    names = " and ".join(str(found.tokenizer.convert_ids_to_tokens(i)) for i in stops)
    return f"completions end at {names}"


def check_files(checkup: Checkup) -> str:
    """Everything that `dualkl run` checks before it reads weights."""
    scores = bool(checkup.config.models.teacher_model)
    work = preflight.Work(generates=scores, scores=scores, trains=True, evaluates=True)
    read = setup.shared_vocabulary if scores else setup.cached_vocabulary
    checkup.read()
    ready = preflight.check_early(checkup.run, work, read)
    prompts = ready.prompts or ready.heldout
    checkup.prompts = sorted(prompts, key=lambda prompt: len(prompt.ids))[:ROWS]
    return (
        f"{len(ready.prompts):,} prompts, {len(ready.heldout):,} held out; models, templates and sizes agree"
    )


def check_disk(checkup: Checkup) -> str:
    checkup.read()
    return machine.disk(checkup.config, checkup.plan)


def check_memory(checkup: Checkup) -> str:
    checkup.read()
    return machine.memory(checkup.config, checkup.run.world, checkup.plan)


def check_student(checkup: Checkup) -> str:
    """Load the student; its forward, packing, training mode and engine are compared with the model's own."""
    found, run = checkup.read(), checkup.tiny()
    if not checkup.prompts:
        raise NotRun("there are no prompts")
    checkup.student = load_student(run.config, run.world.device, found.size, found.tokenizer)
    trained = sum(p.numel() for p in checkup.student.trainable.values())
    rows = "packed" if checkup.student.packs else f"padded ({checkup.student.padded_because})"
    return f"{trained / 1e6:.1f} M trained weights; rows are {rows}; causal, and the same in training mode"


def check_loss(checkup: Checkup) -> str:
    """Rollouts scored by the student as its own teacher, read back from a cache: the loss must be zero."""
    student, vocabulary = _ready(checkup)
    models = checkup.config.models
    run = checkup.tiny(
        teacher_model=models.student_model,
        teacher_dtype=checkup.config.run.dtype,
        teacher_quantization="none",
    )
    with adapter_set(student, 0.0):
        policy = setup.student_policy(run, student, open_engine(student.model), 0)
        with TeacherLoader(run.config, run.world) as teacher, redirect_stdout(io.StringIO()):
            refresh.write_rollouts(run, policy, vocabulary, checkup.prompts, refresh_index=0, teacher=teacher)
        snapshot = cache.open(run.config.cache_root)
        checkup.rows = list(snapshot[:])
        loss, tokens = _loss(student, run.config, snapshot, checkup.rows)
    bound = ZERO[checkup.config.run.dtype]
    if not abs(loss) < bound:
        raise UserError(
            f"a student that is its own teacher has a loss of {loss:.2g} nats a token on {tokens} tokens,"
            f" where rounding explains {bound:g}: rollouts, signal and loss do not fit together. Please"
            " report this."
        )
    return f"{loss:.1g} nats a token on {tokens} tokens (rounding explains {bound:g})"


@torch.no_grad()
def _loss(
    student: Student, config: Config, snapshot: cache.Snapshot, rows: list[cache.Record]
) -> tuple[float, int]:
    """Mean loss of stored rows, and their tokens; fkl full and no smoothing, so that it is 0 at p = q."""
    settings = replace(config.loss.settings(student.vocab_size), fkl="full", teacher_smoothing=0.0)
    head, pad_id = cached_head(snapshot, student.device), student.tokenizer.pad_token_id
    size = student.vocab_size
    batch = to_tensors(rows, 1.0, head, pad_id, student.device, size, packed=student.packs)
    hidden_Nd = at_scored(student.hidden(batch.aligned), batch.aligned)
    out = dual_kl(
        hidden_Nd,
        student.head,
        batch.teacher,
        settings,
        batch.sampled,
        batch.weights,
        teacher_entropy=batch.teacher_entropy if settings.gate_on == "teacher_entropy" else None,
    )
    return float(out.loss) / len(hidden_Nd), len(hidden_Nd)


def check_engine(checkup: Checkup) -> str:
    """The probe of a refresh, with a random adapter: the engine's logprobs against those of training."""
    student, _ = _ready(checkup)
    _need_rows(checkup)
    with adapter_set(student, STIR), closing(open_engine(student.model)) as engine:
        found = probe.check_generator(checkup.tiny(), student, engine, 0)
    return (
        f"{found['probe_gap']:.1g} nats a token apart on {found['probe_tokens']} tokens, with a random"
        f" adapter (bound {found['probe_bound']:.1g})"
    )


def check_teacher(checkup: Checkup) -> str:
    """Score the rows with the plain teacher: its forward against the model's own, finite states, KL."""
    student, _ = _ready(checkup)
    _need_rows(checkup)
    config = checkup.config
    if not config.models.teacher_model:
        return "not needed: rows that are there are trained on"
    if not plain_model_fits(config, checkup.run.world):
        return "not loaded: the plain teacher does not fit on a device; sharded it may"
    states_ND, head = _scored(checkup)
    own_Nd = _student_states(student, checkup.rows)
    found = compare(own_Nd, student.head, HiddenTeacher(states_ND, head), vocab_size=student.vocab_size)
    kl = float(found.rkl.double().mean())
    if not kl < float("inf"):
        raise UserError("the teacher gave NaN or infinite values; check its weights and teacher_dtype.")
    return f"reverse KL of the untrained student {kl:.3f} nats a token on {len(own_Nd)} tokens"


def check_quantized(checkup: Checkup) -> str:
    """Score the rows with the quantised teacher and in teacher_dtype."""
    _, vocabulary = _ready(checkup)
    models = checkup.config.models
    if not models.teacher_model or models.teacher_quantization == "none":
        return "not needed: teacher_quantization is none"
    _need_rows(checkup)
    if not plain_model_fits(changed(checkup.config, teacher_quantization="none"), checkup.run.world):
        return f"not compared: the teacher does not fit on a device in {models.teacher_dtype}"
    wanted = HiddenTeacher(*_scored(checkup, teacher_quantization="none"))
    found_ND, head = _scored(checkup)
    found = compare(found_ND, head, wanted, vocab_size=vocabulary.size)
    kl = float(found.fkl.double().mean())
    agree = float((found.student_top1 == found.teacher_top1).double().mean())
    told = (
        f"{models.teacher_quantization} against {models.teacher_dtype}: KL {kl:.2g} nats a token, same most"
        f" likely token {agree:.1%} on {len(found_ND)} tokens"
    )
    if not kl < LARGE_ERROR:
        raise UserError(f"{told}: above {LARGE_ERROR:g} it is another teacher. Choose more bits.")
    return told


def check_sharded(checkup: Checkup) -> str:
    """Score the rows with the teacher under ZeRO-3 and plain."""
    _, vocabulary = _ready(checkup)
    _need_rows(checkup)
    config, world = checkup.config, checkup.run.world
    if not config.models.teacher_model or not config.models.teacher_ds_zero3 or world.size == 1:
        return "not needed: " + ("one process" if world.size == 1 else "teacher_ds_zero3 is off")
    if not plain_model_fits(config, world):
        return "not compared: the plain teacher does not fit on a device"
    plain_ND, plain_head = _scored(checkup, teacher_ds_zero3=False)
    found_ND, head = _scored(checkup, teacher_ds_zero3=True)
    kl = _kl(found_ND, head, plain_ND, plain_head, vocabulary.size)
    bound = SAME[config.models.teacher_dtype]
    if not kl < bound:
        raise UserError(
            f"the sharded teacher is not the plain one: KL {kl:.2g} nats a token on {len(plain_ND)} tokens,"
            f" bound {bound:g}. Set teacher_ds_zero3: false if it fits, and report this with the version of"
            " DeepSpeed."
        )
    return f"KL {kl:.1g} nats a token to the plain one on {len(plain_ND)} tokens (bound {bound:g})"


@torch.no_grad()
def _scored(checkup: Checkup, **keys: Any) -> tuple[Tensor, Head]:
    """A teacher's states [N, D] at the rows' scored positions, and its head; frees it (collective)."""
    run = checkup.tiny(**keys)
    teacher = load_teacher(run.config, run.world)
    try:
        prompts, completions = _ids(checkup.rows)
        aligned = align(prompts, completions, 0, teacher.device, packed=teacher.packs)
        return at_scored(teacher.hidden(aligned), aligned), teacher.head
    finally:
        teacher.close()


@torch.no_grad()
def _student_states(student: Student, rows: list[cache.Record]) -> Tensor:
    pad_id = student.tokenizer.pad_token_id
    aligned = align(*_ids(rows), pad_id, student.device, packed=student.packs)
    return at_scored(student.hidden(aligned), aligned)


def _ids(rows: list[cache.Record]) -> tuple[list[Any], list[Any]]:
    return [row.prompt_ids for row in rows], [row.completion_ids for row in rows]


def _kl(found_ND: Tensor, head: Head, wanted_ND: Tensor, wanted_head: Head, vocab_size: int) -> float:
    """Mean KL(wanted || found), nats per token."""
    result = compare(found_ND, head, HiddenTeacher(wanted_ND, wanted_head), vocab_size=vocab_size)
    return float(result.fkl.double().mean())


def _ready(checkup: Checkup) -> tuple[Student, Vocabulary]:
    if checkup.student is None:
        raise NotRun("there is no student")
    return checkup.student, checkup.read()


def _need_rows(checkup: Checkup) -> None:
    if not checkup.rows:
        raise NotRun("no rows were written")


@contextmanager
def adapter_set(student: Student, scale: float) -> Iterator[None]:
    """Give LoRA's B random values of this standard deviation, the same on all ranks; restored at the end."""
    kept = {name: p.detach().clone() for name, p in student.trainable.items() if "lora_B" in name}
    random = torch.Generator().manual_seed(0)
    is_adapted = isinstance(student.model, PeftModel)
    with torch.no_grad():
        for name, old in kept.items() if is_adapted else ():
            student.trainable[name].copy_(torch.randn(old.shape, generator=random) * scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, old in kept.items():
                student.trainable[name].copy_(old)
