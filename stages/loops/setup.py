"""Setup shared by all stages: tokenizers, vocabulary cut, fingerprints, the current student."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import cache
from stages.data.prompts import template_fingerprint, vocabulary_fingerprint
from stages.data.signals import KINDS
from stages.engine.opening import open_engine
from stages.engine.protocol import Engine, Sampling
from stages.models import ends, pretrained
from stages.models.policy import Policy
from stages.models.student import Student, load_student, policy_hash
from stages.models.teacher import check_writer, load_plain_model
from stages.runtime import checkpoint, history, metrics
from stages.runtime.config import Config, SignalSection, require
from stages.runtime.errors import UserError
from stages.runtime.run import Run


@dataclass(frozen=True)
class Vocabulary:
    """The student's tokenizer and the number of ids that student and teacher share."""

    tokenizer: PreTrainedTokenizerBase
    size: int

    @cached_property
    def digest(self) -> str:
        """`vocabulary_fingerprint`, which takes a second for 250,000 tokens."""
        return vocabulary_fingerprint(self.tokenizer, self.size)

    @cached_property
    def tokenizer_json(self) -> str:
        """The text of tokenizer.json."""
        return str(self.tokenizer.backend_tokenizer.to_str())


def shared_vocabulary(config: Config) -> Vocabulary:
    """Compare the two tokenizers and return what they share. Reads configurations and tokenizers only."""
    models = config.models
    require(config, "teacher_model")
    student = pretrained.load_tokenizer(models.student_model)
    teacher = pretrained.load_tokenizer(models.teacher_model)
    rows = [
        pretrained.load_config(name).get_text_config().vocab_size
        for name in (models.student_model, models.teacher_model)
    ]
    return Vocabulary(student, pretrained.vocabulary_cut(student, teacher, *rows))


def cached_vocabulary(config: Config) -> Vocabulary:
    """The shared vocabulary size chosen in stage one, from the cache: stage two needs no teacher files."""
    return vocabulary_of(config, config.cache_root)


def vocabulary_of(config: Config, cache_root: str) -> Vocabulary:
    """The student's tokenizer and the cut of the cache at `cache_root`.

    Raises UserError if the cache was written with another tokenizer.
    """
    tokenizer = pretrained.load_tokenizer(config.models.student_model)
    must_match = cache.open(cache_root).fingerprint.must_match
    own = vocabulary_fingerprint(tokenizer, must_match["vocab_size"])
    if own != must_match["tokenizer"]:
        raise UserError(
            f"{cache_root} was written with another tokenizer (its map of the first"
            f" {must_match['vocab_size']} ids hashes to {must_match['tokenizer']}, that of"
            f" {config.models.student_model} to {own}); train a student that has that tokenizer, or"
            " write another cache."
        )
    return Vocabulary(tokenizer, must_match["vocab_size"])


def fingerprint(config: Config, vocabulary: Vocabulary, signal: SignalSection) -> cache.Fingerprint:
    """Settings that define the meaning of a row (`must_match`), and settings that are only recorded."""
    models = config.models
    limits = KINDS[signal.signal].limits(signal, vocabulary.size)
    must_match = {
        "teacher": pretrained.identity(models.teacher_model),
        "teacher_dtype": models.teacher_dtype,
        **_quantization(config),
        **_prompting(config, vocabulary),
        "signal": {"kind": signal.signal, "temperature": 1.0} | limits,
    }
    return cache.Fingerprint(must_match, {"teacher_model": models.teacher_model, **_sampling(config)})


def unscored_fingerprint(config: Config, vocabulary: Vocabulary) -> cache.Fingerprint:
    """Fingerprint of rows not yet scored by a teacher."""
    return cache.Fingerprint(
        {**_prompting(config, vocabulary), "signal": {"kind": "none"}}, _sampling(config)
    )


def _quantization(config: Config) -> dict[str, str]:
    """The quantization entry of the fingerprint; absent for unquantized teachers."""
    kind = config.models.teacher_quantization
    return {} if kind == "none" else {"teacher_quantization": kind}


def _prompting(config: Config, vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "tokenizer": vocabulary.digest,
        "chat_template": template_fingerprint(vocabulary.tokenizer),
        "chat_template_kwargs": config.data.chat_template_kwargs,
        "vocab_size": vocabulary.size,
    }


def _sampling(config: Config) -> dict[str, Any]:
    rollout = config.rollout
    return {
        "student_model": config.models.student_model,
        "dataset": config.data.dataset,
        "sample_temperature": rollout.sample_temperature,
        "sample_top_p": rollout.sample_top_p,
        "sample_top_k": rollout.sample_top_k,
        "max_new_tokens": rollout.max_new_tokens,
    } | ({"eos_token": rollout.eos_token} if rollout.eos_token else {})


def check_history(run: Run) -> None:
    """Refuse a run that cannot go on as this command asks; report the changed keys of an unfinished one."""
    records = metrics.read(run.metrics.path)
    trained, position = history.last_config(records), newest_position(run)
    history.refuse_other_keys(run.folder, run.config, trained, position.step)
    check_weights_kept(run)
    if trained is not None and checkpoint_to_go_on_from(run) is None:
        _without_checkpoint(run, records)
    changed = history.describe_changes(trained, run.config)
    if changed and position.step < run.config.train.max_steps:
        run.metrics.say(f"resuming with changed keys: {changed}")


def check_weights_kept(run: Run) -> None:
    """UserError if the checkpoint that the run continues from does not fit the student of this command."""
    start = checkpoint_to_go_on_from(run)
    if start is not None:
        trained = history.last_config(metrics.read(run.metrics.path))
        step = checkpoint.read_position(start).step
        history.refuse_other_weights(run.folder, run.config, trained, step)


def _without_checkpoint(run: Run, records: list[history.Record]) -> None:
    """Refuse a run whose student was exported and would be trained anew; say that another one begins again."""
    steps = max((record["step"] for record in records if record["kind"] == "step"), default=0)
    place = run.folder / "checkpoints"
    if any(record["kind"] == "export" for record in records):
        raise UserError(
            f"the run in {run.folder} was trained for {steps} steps and exported, and {place} has no complete"
            " checkpoint to go on from. Nothing was changed. Put the checkpoint back, or give another --run_name"
            " to train anew."
        )
    run.metrics.say(f"no complete checkpoint in {place}: the {steps} steps trained before are trained again")


def newest_position(run: Run) -> checkpoint.Position:
    """Position of the checkpoint that the run continues from; the beginning if there is none."""
    start = checkpoint_to_go_on_from(run)
    return checkpoint.Position(0, 0) if start is None else checkpoint.read_position(start)


def checkpoint_to_go_on_from(run: Run) -> Path | None:
    """The newest checkpoint, or the one of `resume_from` until the run has taken a step after it.

    Repeating the same command then continues from the newest.
    """
    folder, step = run.folder / "checkpoints", run.config.train.resume_from
    last = history.last_config(metrics.read(run.metrics.path)) if step else None
    if not step or (last is not None and history.goes_on(last, run.config)):
        return checkpoint.latest(folder)
    return checkpoint.of_step(folder, step)


def current_student(run: Run, vocabulary: Vocabulary) -> tuple[Student, checkpoint.Position]:
    """The student with the weights of the checkpoint that the run continues from, and its position."""
    student = initial_student(run, vocabulary)
    return student, take_up_weights(run, student)


def initial_student(run: Run, vocabulary: Vocabulary) -> Student:
    """The student as it is before training."""
    run.metrics.say("loading the student and checking how it computes")
    with run.clock.phase("load"):
        return load_student(run.config, run.world.device, vocabulary.size, vocabulary.tokenizer)


def take_up_weights(run: Run, student: Student) -> checkpoint.Position:
    """Load the weights of the checkpoint that the run continues from; return its position."""
    with run.clock.phase("load"):
        start = checkpoint_to_go_on_from(run)
        if start is not None:
            checkpoint.load_weights(start, student.trainable)
        return newest_position(run)


def student_policy(run: Run, student: Student, engine: Engine, step: int, hashed: str = "") -> Policy:
    """The student after `step` optimizer steps, sampling as configured. `hashed`: its `policy_hash`."""
    rollout = run.config.rollout
    return Policy(
        student.model,
        engine,
        student.tokenizer,
        run.run_id,
        hashed or policy_hash(student),
        step,
        Sampling(
            student.vocab_size,
            student.eos_ids,
            rollout.sample_temperature,
            rollout.sample_top_p,
            rollout.sample_top_k,
        ),
        rollout.max_new_tokens,
        student.autocast,
    )


def load_teacher_policy(run: Run, vocabulary: Vocabulary) -> Policy:
    """The plain teacher, whole on this device, sampling from its full distribution."""
    models, device = run.config.models, run.world.device
    model = load_plain_model(run.config, run.world)
    check_writer(model)
    return Policy(
        model,
        open_engine(model),
        vocabulary.tokenizer,
        "teacher",
        short_hash(pretrained.identity(models.teacher_model)),
        0,
        Sampling(vocabulary.size, ends.teacher_ends(run.config, vocabulary.tokenizer, vocabulary.size)),
        run.config.rollout.max_new_tokens,
        lambda: torch.autocast(device.type, enabled=False),
        is_teacher=True,
    )


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
