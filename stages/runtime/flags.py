"""Command-line flags and the names that people try: no types here, and nothing heavy to import."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Collection, Iterable

import cache.arguments
from stages.runtime.errors import UserError
from stages.runtime.yaml_text import short

REMOVED = {
    "gate": "set tau_share in section loss",
    "tau_schedule": "tau stays, or follows the divergences with tau_share above 0",
    "tau_end": "let tau follow the divergences (tau_share above 0), or change tau between two runs",
    "tau_rate": "an adaptive tau moves at a fixed rate; leave the key out",
    "mix": "write the weight as gating, e.g. gating: 0.5",
    "refresh_ess": "refresh by drift with refresh_drift instead",
    "refresh_age": "refresh by steps with refresh_every instead",
    "refresh_min_steps": "leave it out; raise refresh_every or refresh_drift for fewer refreshes",
    "drift_window": "refresh_drift is averaged over 4 steps; leave the key out",
    "drift_to_forward": "refresh earlier (refresh_every, refresh_drift) to keep rows from drifting",
    "replay_share": "set max_age to keep the rows of earlier refreshes, and lower rollouts_per_refresh",
    "signal_floor": "a nucleus keeps at least 4 ids; leave the key out",
    "tail_floor": "the tail bucket holds at least 1e-8; leave the key out",
    "score_patience": "role score waits an hour for the next unit; leave the key out",
    "offload_idle": "the idle model leaves the GPU by itself where both do not fit; leave the key out",
    "wandb_mode": "set the environment variable WANDB_MODE, which wandb reads",
    "student_revision": "write student_model: NAME@REVISION",
    "teacher_revision": "write teacher_model: NAME@REVISION",
    "dataset_split": "write dataset: NAME:CONFIG:SPLIT",
    "eval_split": "write eval_dataset: NAME:CONFIG:SPLIT",
    "overlong": "longer prompts are skipped; allow_skipped 0 refuses data sets that have any",
    "max_staleness": "set max_age, which bounds the age of rows in every refresh_mode",
    "weight_decay": "AdamW runs without weight decay, which changes little in a few hundred steps;"
    " leave the key out",
    "lr_min_ratio": "the cosine ends at a tenth of lr; leave the key out",
}
"""Keys of earlier versions, and what to do instead."""

RENAMED = {"score_tokens": "micro_batch_tokens"}
"""Keys of earlier versions that still work, and their present names."""

ELSEWHERE = {
    "batch": "batch_size",
    "beta": "gating",
    "bf16": "dtype",
    "data": "dataset",
    "dataset_name": "dataset",
    "epochs": "max_steps",
    "eval_steps": "eval_every",
    "fp16": "dtype",
    "gradient_accumulation_steps": "grad_accum",
    "k": "signal_k",
    "learning_rate": "lr",
    "lora_rank": "lora_r",
    "lora_target_modules": "lora_targets",
    "max_completion_length": "max_new_tokens",
    "max_length": "max_prompt_tokens and max_new_tokens",
    "max_new_token": "max_new_tokens",
    "max_prompt_length": "max_prompt_tokens",
    "max_seq_length": "max_prompt_tokens and max_new_tokens",
    "model": "student_model",
    "model_id": "student_model",
    "model_name": "student_model",
    "model_name_or_path": "student_model",
    "num_generations": "group_size",
    "num_steps": "max_steps",
    "num_train_epochs": "max_steps",
    "output": "run_name",
    "output_dir": "run_name",
    "per_device_eval_batch_size": "lp_micro_batch",
    "per_device_train_batch_size": "batch_size",
    "report_to": "wandb_project",
    "resume_from_checkpoint": "resume_from",
    "run": "run_name",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "steps": "max_steps",
    "student": "student_model",
    "student_model_name_or_path": "student_model",
    "target_modules": "lora_targets",
    "teacher": "teacher_model",
    "teacher_model_name_or_path": "teacher_model",
    "top_k": "sample_top_k",
    "top_p": "sample_top_p",
    "torch_dtype": "dtype",
    "train_batch_size": "batch_size",
    "use_peft": "use_lora",
    "warmup_ratio": "warmup_steps",
}
"""Names of other libraries, mostly transformers and TRL, and the key or keys that come closest."""


EVERYWHERE = ("config", "help", "quiet", "json")
"""Options of every command, beside the keys."""


class Parser(cache.arguments.Parser):
    """For the options that a command has beside the keys."""

    mistake = UserError


def split(
    arguments: list[str], keys: Collection[str], bare: Collection[str], options: Collection[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Split a command line into configuration files, in order, and flags; a repeated flag's last value wins.

    `bare`: keys that may stand without a value, which means true. `options`: what the command takes beside
    the keys, for the sentence about a mistyped name.
    """
    files, flags = list[str](), dict[str, str]()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if word.startswith("-"):
                raise UserError(f"unknown option {short(word)}; keys are given as --KEY VALUE.")
            files.append(word)
            continue
        key, has_value, value = word[2:].partition("=")
        key = present_name(key)
        if key != "config" and key not in keys:
            raise UserError(unknown_key(key, "on the command line", (*keys, *EVERYWHERE, *options)))
        if not has_value:
            is_next = bool(rest) and not rest[0].startswith("--")
            if key in bare and not (is_next and not _is_file(rest[0])):
                value = "true"
            elif not is_next:
                raise UserError(f"--{key} needs a value: --{key} {'FILE' if key == 'config' else 'VALUE'}.")
            else:
                value = rest.pop(0)
        if key == "config":
            files.append(value)
        else:
            flags[key] = value
    return files, flags


def _is_file(word: str) -> bool:
    return "." in word or "/" in word


@functools.cache
def present_name(key: str) -> str:
    """The name of a key in this version; a renamed one is reported on stderr, once."""
    if key in RENAMED:
        print(f"{key} is now {RENAMED[key]}, which bounds every forward", file=sys.stderr)
    return RENAMED.get(key, key)


def unknown_key(key: str, where: str, known: Iterable[str]) -> str:
    """A sentence about a key that does not exist: what replaced it, or the nearest one that does."""
    key = short(key)
    if key in REMOVED:
        kind = "section" if key == "gate" else "key"
        return f"the {kind} {key} {where} was removed: {REMOVED[key]}."
    plain = key.replace("-", "_")
    names = [ELSEWHERE[plain]] if plain in ELSEWHERE else difflib.get_close_matches(plain, known, 1, 0.5)
    hint = f"; did you mean {names[0]}?" if names else "; `dualkl run --help all` lists all keys."
    return f"unknown key {key} {where}{hint}"
