"""What a command checks before it reads a weight: files, tokenizers, prompts, caches and sizes, in its first seconds."""

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
from stages.data.prompts import Prompt
from stages.loops import caches, refresh, setup
from stages.loops.measure import heldout_of
from stages.loops.setup import Vocabulary
from stages.models import ends, folders, pretrained
from stages.models.positions import positions_of
from stages.models.teacher import zero3_settings
from stages.runtime.config import Config
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.split import rows_per_micro_step


@dataclass(frozen=True)
class Work:
    """What a command will do: the student writes rollouts, the teacher scores, the student is trained, or is measured."""

    generates: bool = False
    scores: bool = False
    trains: bool = False
    evaluates: bool = False


SCORING = Work(scores=True)


@dataclass(frozen=True)
class Ready:
    """What was read on the way: the vocabulary, and prompts, which only a command that generates from them has."""

    vocabulary: Vocabulary
    prompts: list[Prompt]
    heldout: list[Prompt]


@dataclass(frozen=True)
class Side:
    """A model as its config.json has it; `key` is that of its name in the configuration."""

    key: str
    name: str
    config: Any


def check_early(
    run: Run, work: Work, read_vocabulary: Callable[[Config], Vocabulary] = setup.shared_vocabulary
) -> Ready:
    """Refuses in one sentence what cannot work, says what will not be as configured; reads no weights."""
    config = run.config
    _check_settings(run, work)
    sides = _open_models(config, work)
    remarks = folders.check_adapter(config) if work != SCORING else []
    vocabulary = read_vocabulary(config)
    _check_caches(config, work, vocabulary, sides[0])
    if work.generates or work.evaluates:
        ends.check_ends(config, vocabulary.tokenizer, vocabulary.size)
        remarks += ends.remarks(config, vocabulary.tokenizer, vocabulary.size) if len(sides) > 1 else []
    prompts = refresh.prompts_of(run, vocabulary) if work.generates else []
    heldout = heldout_of(run, vocabulary) if work.evaluates else []
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
    for remark in [*remarks, *_about_sizes(config, work, Ready(vocabulary, prompts, heldout))]:
        run.metrics.say(remark)
    return Ready(vocabulary, prompts, heldout)


def _check_weights(config: Config, side: Side) -> None:
    """Of a local folder: its files are whole, hold what config.json asks for, and what is put on the student fits it."""
    folders.check_weights(side.key, side.name)
    if Path(side.name).is_dir():
        attention = config.models.attn_implementation
        model = pretrained.load_model(side.name, torch.bfloat16, attention, reads_weights=False)
        if side.key == "student_model":
            folders.check_student(config, model)


def _check_settings(run: Run, work: Work) -> None:
    """What needs the configuration and the files that it names, but no model."""
    config = run.config
    if work.trains:
        rows_per_micro_step(config, run.world.size)
    if work.scores and config.models.teacher_ds_zero3:
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "teacher_ds_zero3 needs DeepSpeed, which is not installed here; set teacher_ds_zero3: false."
            )
        zero3_settings(config)
    attention = config.models.attn_implementation
    known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if attention not in known and "/" not in attention:  # with a slash: a kernel on the hub
        raise UserError(
            f"attn_implementation {attention} is not known to transformers; sdpa, eager and flash_attention_2 are."
        )
    if work.evaluates:
        open_checker(config.eval.answer_checker)
    if work.generates or work == SCORING:
        _check_writable(config.cache_root)


def _check_writable(root: str) -> None:
    """`UserError` unless the local folder `root` is there or can be made; nothing is made."""
    if "://" in root:
        return
    path = Path(root).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is read-only" if there.is_dir() else "is a file"
        raise UserError(f"the cache {root} cannot be written: {there} {why}; choose another cache_dir.")


def _open_models(config: Config, work: Work) -> list[Side]:
    """The student, and the teacher where the command uses it."""
    models = config.models
    named = {"student_model": models.student_model}
    if work.scores or work.generates:
        if not models.teacher_model:
            raise UserError(setup.NO_TEACHER)
        named["teacher_model"] = models.teacher_model
    return [Side(key, name, folders.open_config(key, name)) for key, name in named.items()]


def _check_caches(config: Config, work: Work, vocabulary: Vocabulary, student: Side) -> None:
    """The caches that are read or gone on with: what their rows mean, and whether they can be trained on."""
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
    """Cached rows that are longer than the student's positions."""
    index, limit = cache.open(root).index, positions_of(student.config)
    lengths = pc.add(index["num_prompt_tokens"], index["num_completion_tokens"])
    longest = pc.max(lengths).as_py() or 0
    if limit is not None and longest > limit:
        raise UserError(
            f"{root} holds rows of up to {longest} tokens, but the student {student.name} has {limit} positions; train a student"
            " that has more, or write rows with a lower max_prompt_tokens and max_new_tokens."
        )


def _check_ids(what: str, prompts: list[Prompt], vocabulary: Vocabulary) -> None:
    """Ids that only the student knows have no probability in rollouts, and the teacher cannot read them."""
    size, tokenizer = vocabulary.size, vocabulary.tokenizer
    outside = [prompt for prompt in prompts if len(prompt.ids) and int(prompt.ids.max()) >= size]
    if not outside:
        return
    token_id = int(outside[0].ids[outside[0].ids >= size][0])
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    written = token in str(tokenizer.chat_template or "")
    raise UserError(
        f"{len(outside)} of {len(prompts)} {what} hold '{token}' (id {token_id}), which"
        f" {'the chat template of the student writes' if written else 'stands in their text'}: only ids below {size} are known to"
        " both student and teacher; "
        + (
            "use a chat template without it, or a teacher that has it."
            if written
            else "remove it from the data set."
        )
    )


def _check_lengths(config: Config, what: str, prompts: list[Prompt], sides: list[Side]) -> None:
    """Prompts and completions that together are longer than the positions of student or teacher."""
    longest, new = max(len(prompt.ids) for prompt in prompts), config.rollout.max_new_tokens
    for side in sides:
        limit = positions_of(side.config)
        if limit is not None and longest + new > limit:
            ways = [f"max_prompt_tokens to {limit - new}"] * (limit > new)
            ways += [f"max_new_tokens to {limit - longest}"] * (limit > longest)
            raise UserError(
                f"the longest of {len(prompts)} {what} has {longest} tokens and max_new_tokens is {new}, together"
                f" {longest + new}, but {side.key} {side.name} has {limit} positions; lower {' or '.join(ways) or 'both'}."
            )


def _about_sizes(config: Config, work: Work, ready: Ready) -> Iterator[str]:
    """Settings that go beyond what is there."""
    train, signal = config.train, config.teacher_signal
    if (work.trains or work.generates) and train.warmup_steps > train.max_steps:
        yield f"warmup_steps {train.warmup_steps} is longer than the run of max_steps {train.max_steps}: lr never reaches its peak"
    if work.generates and signal.signal in ("topk", "nucleus") and signal.signal_k > ready.vocabulary.size:
        yield f"signal_k {signal.signal_k} is above the {ready.vocabulary.size} ids of the shared vocabulary: all of them are kept"
    for name, wanted, there in (
        ("num_prompts", config.data.num_prompts, ready.prompts),
        ("eval_prompts", config.eval.eval_prompts, ready.heldout),
    ):
        if there and wanted > len(there):
            yield f"{name} is {wanted}, but there are {len(there)}: all of them are used"
