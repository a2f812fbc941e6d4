"""Data sets -> chat turns up to the last user message -> chat template -> prompt ids."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from stages.runtime.config import Config
from stages.runtime.errors import UserError

NAMED = {"tulu3": "allenai/tulu-3-sft-mixture"}
Turns = list[dict[str, str]]
Checker = Callable[[dict[str, Any], str], bool]


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt; `prompt_id` hashes its token ids, `row` is the data set's record (for answer checkers)."""

    prompt_id: str
    ids: np.ndarray
    text: str
    row: dict[str, Any]


@dataclass(frozen=True)
class PromptSet:
    prompts: list[Prompt]
    num_skipped: int  # longer than max_prompt_tokens, under overlong: skip


def training_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    data = _open(config.data.dataset, config.data.dataset_split)
    limit = config.data.num_prompts or len(data)
    return _take(config, tokenizer, data, config.data.dataset, _order(config, data), limit)


def heldout_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """`eval_prompts` prompts of eval_dataset, or of dataset after its first num_prompts in the seeded order."""
    if config.eval.eval_dataset:
        data = _open(config.eval.eval_dataset, config.eval.eval_split)
        return _take(
            config,
            tokenizer,
            data,
            config.eval.eval_dataset,
            list(range(len(data))),
            config.eval.eval_prompts,
        )
    data = _open(config.data.dataset, config.data.dataset_split)
    if config.data.num_prompts == 0:
        raise UserError("num_prompts 0 trains on the whole data set: name an eval_dataset, or give num_prompts.")
    both = config.data.num_prompts + config.eval.eval_prompts
    taken = _take(config, tokenizer, data, config.data.dataset, _order(config, data), both)
    held_out = taken.prompts[config.data.num_prompts :]
    if not held_out:
        raise UserError(f"dataset {config.data.dataset} has no prompts beyond num_prompts; name an eval_dataset.")
    seen = {prompt.prompt_id for prompt in taken.prompts[: config.data.num_prompts]}
    unseen = [prompt for prompt in held_out if prompt.prompt_id not in seen]
    if not unseen:
        raise UserError(
            f"dataset {config.data.dataset}: all prompts beyond num_prompts repeat earlier ones; name an eval_dataset."
        )
    return PromptSet(unseen, taken.num_skipped)


def encode(turns: Turns, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> Prompt:
    """Applies the chat template with a generation prompt; a tokenizer without a template gets the plain text."""
    if tokenizer.chat_template:
        try:
            templated = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
            text = cast(str, templated)  # not ids, as it is not tokenized
        except jinja2.TemplateError as error:
            raise UserError(f"the student's chat template refuses a prompt ({error}): {str(turns)[:120]}") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text = "\n".join(turn["content"] for turn in turns)
        ids = tokenizer(text)["input_ids"]
    array = np.asarray(ids, dtype=np.int32)
    return Prompt(hashlib.sha256(array.tobytes()).hexdigest()[:16], array, text, row)


def turns_of(row: dict[str, Any]) -> Turns | None:
    """The turns of a record up to its last user message: `messages`, `prompt` (text or turns), or `question`."""
    value = next((row[key] for key in ("messages", "prompt", "question") if row.get(key)), None)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "role" in turn for turn in value):
        return None
    turns = [{"role": turn["role"], "content": turn.get("content") or ""} for turn in value]
    last_user = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    return turns[: last_user + 1] or None


def load_checker(spec: str) -> Checker | None:
    """`gsm8k`, or `path/to/file.py:function`; empty gives None."""
    if not spec:
        return None
    if spec == "gsm8k":
        return check_gsm8k
    path, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("answer_checker", path) if Path(path).is_file() else None
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"answer_checker {spec}: expected gsm8k or path/to/file.py:function, and that file to exist.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where dataclasses and pickle look a module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"answer_checker {spec}: {path} cannot be imported ({_first_line(error)}).") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"answer_checker {spec}: {path} has no function {name}.")
    return getattr(module, name)


def check_gsm8k(row: dict[str, Any], completion: str) -> bool:
    """True if the last number of `completion` is the one after `####` in `row["answer"]`."""
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", completion)
    if not numbers:
        return False
    expected = str(row["answer"]).split("####")[-1]
    try:
        return float(numbers[-1].replace(",", "").rstrip(".")) == float(expected.replace(",", ""))
    except ValueError:
        return False


def _open(name: str, split: str) -> Dataset:
    path = Path(name)
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if path.suffix in kinds:
        if not path.is_file():
            raise UserError(f"dataset {name} does not exist (looked in {Path.cwd()}).")
        try:
            return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        except Exception as error:
            raise UserError(f"dataset {name} cannot be read as {kinds[path.suffix]}: {_first_line(error)}") from error
    try:
        return load_dataset(NAMED.get(name, name), split=split)
    except Exception as error:
        raise UserError(
            f"dataset {name} (split {split}) is neither a local .jsonl/.parquet nor found on the hub: {_first_line(error)}"
        ) from error


def _order(config: Config, data: Dataset) -> list[int]:
    return np.random.default_rng(config.run.seed).permutation(len(data)).tolist()


def _take(
    config: Config, tokenizer: PreTrainedTokenizerBase, data: Dataset, name: str, order: list[int], limit: int
) -> PromptSet:
    prompts: list[Prompt] = []
    num_skipped = 0
    for prompt in _encoded(config, tokenizer, data, order):
        if len(prompt.ids) > config.data.max_prompt_tokens:
            if config.data.overlong == "error":
                raise UserError(
                    f"dataset {name}: a prompt has {len(prompt.ids)} tokens, max_prompt_tokens is"
                    f" {config.data.max_prompt_tokens} (overlong: error): {prompt.text[:80]!r}. Raise it, or use overlong: skip."
                )
            num_skipped += 1
            continue
        prompts.append(prompt)
        if len(prompts) == limit:
            break
    if not prompts:
        why = f"all {num_skipped} are longer than max_prompt_tokens" if num_skipped else "no record has a prompt"
        raise UserError(
            f"dataset {name} gave no prompts ({why}); expected `messages` with a user turn, `prompt` or `question`,"
            f" found columns {', '.join(data.column_names)}."
        )
    return PromptSet(prompts, num_skipped)


def _encoded(config: Config, tokenizer: PreTrainedTokenizerBase, data: Dataset, order: list[int]) -> Iterator[Prompt]:
    for index in order:
        row = data[index]
        turns = turns_of(row)
        if turns is not None:
            yield encode(turns, row, tokenizer, config.data.chat_template_kwargs)


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()[:16]


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """Hash of the token -> id map below the vocabulary cut: equal for tokenizers that differ only in padding."""
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i < vocab_size)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
