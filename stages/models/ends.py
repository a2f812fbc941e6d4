"""EOS ids of student and teacher below the vocabulary cut, from their files; weights are not read."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from stages.models import pretrained
from stages.runtime.config import Config, name_and_revision
from stages.runtime.errors import UserError

MARK = "dualkl0mark"


def student_ends(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, ...]:
    """Ids below `vocab_size` that end a rollout: those of `eos_token`, else the student's; may be empty."""
    return tuple(i for i in wanted_ends(config, tokenizer) if i < vocab_size)


def teacher_ends(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, ...]:
    """Ids that end the teacher's own text: those of its files, and the EOS of the student's tokenizer."""
    own = _own(config.models.teacher_model, tokenizer)
    named = _named(config.rollout.eos_token, tokenizer) if config.rollout.eos_token else ()
    drawable = {i for i in {*own, *named} if i < vocab_size}
    return tuple(sorted(drawable)) or student_ends(config, tokenizer, vocab_size)


def wanted_ends(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that should end the student's text: those of `eos_token`, else the student's own."""
    if config.rollout.eos_token:
        return _named(config.rollout.eos_token, tokenizer)
    return _own(config.models.student_model, tokenizer)


def check_ends(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """`UserError` if there is no EOS token, or if it (or one of `eos_token`) can never be sampled."""
    wanted = wanted_ends(config, tokenizer)
    if not wanted:
        raise UserError(
            f"the student {config.models.student_model} has no EOS token, neither in its tokenizer nor in"
            " its generation_config.json; name the token that ends a completion with eos_token."
        )
    unsampled = [i for i in wanted if i >= vocab_size]
    if len(unsampled) == len(wanted) or (unsampled and config.rollout.eos_token):
        raise UserError(
            f"the student's EOS token {names(unsampled, tokenizer)} can never be sampled: only ids below"
            f" {vocab_size} are known to both student and teacher, so no rollout would end at it; set"
            " eos_token to a token that both have."
        )


def remarks(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """Remarks on EOS tokens that do not end rollouts; none if the models agree or `eos_token` is set."""
    models, own = config.models, wanted_ends(config, tokenizer)
    if config.rollout.eos_token:
        return []
    found, ends = [], {i for i in own if i < vocab_size}
    at = names(sorted(ends), tokenizer)
    if unsampled := [i for i in own if i >= vocab_size]:
        found.append(
            f"the student's EOS token {names(unsampled, tokenizer)} is never sampled, as only ids below"
            f" {vocab_size} are known to both student and teacher; rollouts end at {at}"
        )
    teacher = pretrained.load_tokenizer(models.teacher_model)
    wanted = {*_own(models.teacher_model, teacher), *turn_end(config, teacher)}
    missing = sorted(wanted - ends)
    if settable := [i for i in missing if i < vocab_size]:
        both = ",".join(_name(i, tokenizer) for i in sorted({*ends, *settable}))
        found.append(
            f"the teacher ends a turn at {names(settable, teacher)}, where the student's rollouts go on:"
            f" they end at {at} alone. If they should not, set eos_token: '{both}'"
        )
    elif missing and not wanted & ends:
        found.append(
            f"the teacher ends a turn at {names(missing, teacher)}, which the student cannot sample (only ids"
            f" below {vocab_size} are shared); rollouts end at {at}"
        )
    return found


def turn_end(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Special token that the chat template writes after an assistant's text; empty if there is none."""
    if not tokenizer.chat_template:
        return ()
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": MARK}]
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False, **config.data.chat_template_kwargs)
    except Exception:  # templates may raise anything; reading the prompts reports it
        return ()
    _, mark, rest = text.rpartition(MARK)
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if mark else []
    first = next((i for i in ids if str(tokenizer.decode([i])).strip()), None)
    return (first,) if first in {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} else ()


@lru_cache(maxsize=16)
def checkpoint_ends(name: str) -> tuple[int, ...]:
    """EOS ids a loaded model would have: from generation_config.json, else from config.json."""
    path = Path(name) / "generation_config.json"
    where, revision = name_and_revision(name)
    try:
        found = GenerationConfig.from_pretrained(where, revision=revision)
    except Exception as error:  # malformed files raise various errors
        if path.is_file():
            raise UserError(f"{path} cannot be read as a generation config; fix or delete it.") from error
        found = GenerationConfig.from_model_config(pretrained.load_config(name))
    own = found.eos_token_id
    ids = own if isinstance(own, list) else [own]
    wrong = [i for i in ids if i is not None and (type(i) is not int or i < 0)]
    if wrong:
        file = path if path.is_file() else f"{name}'s config.json"
        raise UserError(
            f"{file} has the eos_token_id {wrong[0]!r}, which is not a valid token id; fix or delete it."
        )
    return tuple(i for i in ids if i is not None)


def _own(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(sorted({tokenizer.eos_token_id, *checkpoint_ends(name)} - {None}))


def _named(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of tokens separated by commas, or of `text` if it is a single token."""
    vocabulary = tokenizer.get_vocab()
    parts = [text] if text in vocabulary else text.split(",")
    names = [part if part in vocabulary else part.strip() for part in parts]
    unknown = [name for name in names if name not in vocabulary]
    if unknown:
        raise UserError(f"eos_token: {unknown[0]!r} is not a token of the student's tokenizer.")
    return tuple(sorted({vocabulary[name] for name in names}))


def _name(token_id: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.convert_ids_to_tokens(token_id))


def names(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return " and ".join(f"'{_name(i, tokenizer)}' (id {i})" for i in ids)
