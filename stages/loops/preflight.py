"""Checks before any weights are read: files, tokenizers, prompts, caches and sizes, within seconds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cache
from stages.data.checkers import open_checker
from stages.data.prompts import Prompt, split_of
from stages.data.remarks import about_prompts
from stages.loops import caches, refresh, setup
from stages.loops.measure import heldout_of
from stages.loops.setup import Vocabulary
from stages.models import ends, folders, pretrained, quantization
from stages.models.positions import positions_of
from stages.models.teacher import is_sharded, zero3_settings
from stages.runtime.config import OF_GATE, Config, require
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.split import rows_per_micro_step


@dataclass(frozen=True)
class Work:
    """The tasks of a command: write rollouts with the student, score with the teacher, train, evaluate."""

    generates: bool = False
    scores: bool = False
    trains: bool = False
    evaluates: bool = False


SCORING = Work(scores=True)


@dataclass(frozen=True)
class Ready:
    """The vocabulary and prompts read during the checks. Prompts are empty unless the command needs them."""

    vocabulary: Vocabulary
    prompts: list[Prompt]
    heldout: list[Prompt]


@dataclass(frozen=True)
class Side:
    """A model as described by its config.json; `key` is the setting that names it."""

    key: str
    name: str
    config: Any


def check_early(
    run: Run, work: Work, read_vocabulary: Callable[[Config], Vocabulary] = setup.shared_vocabulary
) -> Ready:
    """Raise a one-line error for anything that cannot work; report settings that will not apply as given.

    Reads no weights.
    """
    config = run.config
    _check_settings(run, work)
    sides = _open_models(config, work)
    remarks = folders.check_adapter(config) if work != SCORING else []
    vocabulary = read_vocabulary(config)
    _check_caches(config, work, vocabulary, sides[0])
    if work.generates or work.evaluates:
        ends.check_ends(config, vocabulary.tokenizer, vocabulary.size)
        remarks += ends.remarks(config, vocabulary.tokenizer, vocabulary.size) if len(sides) > 1 else []
    split = split_of(config, vocabulary.tokenizer) if work.generates and work.evaluates else None
    prompts = refresh.prompts_of(run, vocabulary, split) if work.generates else []
    heldout = heldout_of(run, vocabulary, split) if work.evaluates else []
    for what, some in (("prompts", prompts), ("held-out prompts", heldout)):
        if some:
            _check_ids(what, some, vocabulary)
            _check_lengths(config, what, some, sides)
    if config.eval.answer_checker == "gsm8k" and heldout and "answer" not in heldout[0].row:
        raise UserError(
            "answer_checker gsm8k compares with the column `answer` of the held-out data, which has only"
            f" {', '.join(heldout[0].row)}; name another checker, or leave answer_checker empty."
        )
    for side, is_loaded in zip(sides, (work != SCORING, work.scores), strict=False):
        if is_loaded:
            _check_weights(config, side)
    remarks += about_prompts(config, prompts, heldout)
    for remark in [*remarks, *_about_settings(config, work, Ready(vocabulary, prompts, heldout))]:
        run.metrics.say(remark)
    return Ready(vocabulary, prompts, heldout)


def _check_weights(config: Config, side: Side) -> None:
    """Check a local folder: files are complete and match config.json, and LoRA settings fit the student."""
    folders.check_weights(side.key, side.name)
    if Path(side.name).is_dir():
        attention = config.models.attn_implementation
        model = pretrained.load_model(side.name, torch.bfloat16, attention, reads_weights=False)
        if side.key == "student_model":
            folders.check_student(config, model)


def _check_settings(run: Run, work: Work) -> None:
    """Check what needs only the configuration and the files it names, but no model."""
    config = run.config
    if work.trains:
        rows_per_micro_step(config, run.world.size)
    if work.scores and config.models.teacher_ds_zero3:
        zero3_settings(config)
        if is_sharded(config, run.world.size) and importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "teacher_ds_zero3 needs DeepSpeed, which is not installed here; set teacher_ds_zero3: false."
            )
    if work.scores or work.generates:
        quantization.check_available(config.models.teacher_quantization, run.world.device)
    attention = config.models.attn_implementation
    known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if attention not in known and "/" not in attention:  # a slash names a kernel on the hub
        raise UserError(
            f"attn_implementation {attention} is not known to transformers; sdpa, eager and"
            " flash_attention_2 are."
        )
    if work.evaluates:
        open_checker(config.eval.answer_checker)
    if work.generates or work == SCORING:
        _check_writable(config.cache_root)


def _check_writable(root: str) -> None:
    """Raise UserError unless the local folder `root` exists or can be created. Creates nothing."""
    if "://" in root:
        return
    path = Path(root).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is read-only" if there.is_dir() else "is a file"
        raise UserError(f"the cache {root} cannot be written: {there} {why}; choose another cache_dir.")


def _open_models(config: Config, work: Work) -> list[Side]:
    """The student, and the teacher if the command uses it."""
    models = config.models
    named = {"student_model": models.student_model}
    if work.scores or work.generates:
        require(config, "teacher_model")
        named["teacher_model"] = models.teacher_model
    return [Side(key, name, folders.open_config(key, name)) for key, name in named.items()]


def _check_caches(config: Config, work: Work, vocabulary: Vocabulary, student: Side) -> None:
    """Check that the caches to read or extend match this configuration and can be trained on."""
    root, text = config.cache_root, config.eval.eval_teacher_text
    exists = cache.exists(root)
    if work.generates and work.scores and exists:
        wanted = setup.fingerprint(config, vocabulary, config.teacher_signal)
        cache.open(root).fingerprint.compare(wanted, root)
    if work.trains:
        caches.check_trainable(config, vocabulary)
        for one in [root] * exists + list(config.run.extra_caches):
            _check_rows(one, student)
    if work.evaluates and text:
        caches.check_teacher_text(config, text, vocabulary)


def _check_rows(root: str, student: Side) -> None:
    """Raise UserError if cached rows are longer than the student's positions."""
    index, limit = cache.open(root).index, positions_of(student.config)
    lengths = pc.add(index["num_prompt_tokens"], index["num_completion_tokens"])
    longest = pc.max(lengths).as_py() or 0
    if limit is not None and longest > limit:
        raise UserError(
            f"{root} holds rows of up to {longest} tokens, but the student {student.name} has {limit}"
            " positions; train a student that has more, or write rows with a lower max_prompt_tokens and"
            " max_new_tokens."
        )


def _check_ids(what: str, prompts: list[Prompt], vocabulary: Vocabulary) -> None:
    """Raise UserError for ids that only the student knows.

    Rollouts give them no probability, and the teacher cannot read them.
    """
    size, tokenizer = vocabulary.size, vocabulary.tokenizer
    outside = [prompt for prompt in prompts if len(prompt.ids) and int(prompt.ids.max()) >= size]
    if not outside:
        return
    token_id = int(outside[0].ids[outside[0].ids >= size][0])
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    written = token in str(tokenizer.chat_template or "")
    raise UserError(
        f"{len(outside)} of {len(prompts)} {what} contain '{token}' (id {token_id}), which"
        f" {'the chat template of the student adds' if written else 'is in their text'}: only ids"
        f" below {size} are known to both student and teacher; "
        + (
            "use a chat template without it, or a teacher that has it."
            if written
            else "remove it from the data set."
        )
    )


def _check_lengths(config: Config, what: str, prompts: list[Prompt], sides: list[Side]) -> None:
    """Raise UserError if a prompt and its completion can exceed the positions of student or teacher."""
    longest, new = max(len(prompt.ids) for prompt in prompts), config.rollout.max_new_tokens
    for side in sides:
        limit = positions_of(side.config)
        if limit is not None and longest + new > limit:
            ways = [f"max_prompt_tokens to {limit - new}"] * (limit > new)
            ways += [f"max_new_tokens to {limit - longest}"] * (limit > longest)
            raise UserError(
                f"the longest of {len(prompts)} {what} has {longest} tokens and max_new_tokens is {new},"
                f" together {longest + new}, but {side.key} {side.name} has {limit} positions; lower"
                f" {' or '.join(ways) or 'both'}."
            )


def _about_settings(config: Config, work: Work, ready: Ready) -> Iterator[str]:
    """Warnings about settings that have no effect, or are larger than what the data or run can use."""
    train, signal, loss = config.train, config.teacher_signal, config.loss
    unused = [leaf for leaf in OF_GATE if getattr(loss, leaf) != type(loss).model_fields[leaf].default]
    if work.trains and unused and not loss.has_threshold:
        yield (
            f"no effect: {', '.join(unused)}, since gating {loss.gating:g} is a constant mix; gating soft is the gate"
        )
    if (work.trains or work.generates) and train.warmup_steps > train.max_steps:
        yield (
            f"warmup_steps {train.warmup_steps} is longer than the run of max_steps {train.max_steps}: lr"
            " never reaches its peak"
        )
    if work.generates and signal.signal in ("topk", "nucleus") and signal.signal_k > ready.vocabulary.size:
        yield (
            f"signal_k {signal.signal_k} is above the {ready.vocabulary.size} ids of the shared vocabulary:"
            " all of them are kept"
        )
    refresh = config.refresh
    if work.trains and refresh.refresh_mode == "external" and refresh.max_age + 1 < refresh.refresh_every:
        yield (
            f"refresh_every {refresh.refresh_every} has no effect: under refresh_mode external rows may be"
            f" max_age {refresh.max_age} steps old, so a version is published every {refresh.max_age + 1}"
            " steps"
        )
    for name, wanted, there in (
        ("num_prompts", config.data.num_prompts, ready.prompts),
        ("eval_prompts", config.eval.eval_prompts, ready.heldout),
    ):
        if there and wanted > len(there):
            yield f"{name} is {wanted}, but there are {len(there)}: all of them are used"
