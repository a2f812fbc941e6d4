"""Draws prompts from data sets: records -> chat template -> token ids. Counts skipped records by reason."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.data.conversations import TEXTS, TURNS, Turn, Unusable, conversation, plain
from stages.data.records import Record, open_records
from stages.runtime.config import Config, require
from stages.runtime.errors import UserError, one_line

FEW = 50
"""Up to this many records may be skipped regardless of the share (unless none may be skipped)."""
HOPELESS = 200  # unusable records after which a data set is given up
SHOWN = 4  # reasons
REFUSED = "that the chat template refuses"


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt. `prompt_id` is a hash of the ids; `row` is the record (for answer checkers)."""

    prompt_id: str
    ids: np.ndarray
    text: str
    row: dict[str, Any]


@dataclass(frozen=True)
class PromptSet:
    prompts: list[Prompt]
    drawn: dict[str, int]  # number of prompts per data set
    skipped: Counter[str]  # number of records per reason
    num_records: int  # records read
    num_there: int  # records that the data sets hold
    num_repeats: int = 0  # left out so that no prompt is both trained on and held out

    @property
    def num_skipped(self) -> int:
        return self.skipped.total()

    @property
    def summary(self) -> str:
        """`512 prompts from a.jsonl (9 of 521 records skipped: 9 without a user turn)`"""
        names = ", ".join(f"{number} from {name}" for name, number in self.drawn.items())
        number, drawn = len(self.prompts), sum(self.drawn.values())
        text = f"{number} prompt{'s' * (number != 1)}" + (
            f"{f' of {drawn} drawn' if number != drawn else ''}: {names}"
            if len(self.drawn) > 1
            else f" from {next(iter(self.drawn))}"
        )
        text += f" ({self.skips})" if self.skipped else ""
        return text + (
            f" ({self.num_repeats} more left out: they repeat prompts that are trained on or held out)"
            if self.num_repeats
            else ""
        )

    @property
    def skips(self) -> str:
        """`9 of 521 records skipped: 9 without a user turn`"""
        return _skips(self.skipped, self.num_records)


Split = tuple[PromptSet, PromptSet]
"""The prompts of `dataset` to train on, and those held out from it."""


def split_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> Split | None:
    """What `training_prompts` and `heldout_prompts` both read; None if they read different data."""
    apart = config.eval.eval_dataset or not config.eval.eval_prompts
    return None if apart else _split(config, tokenizer)


def training_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, split: Split | None = None
) -> PromptSet:
    """Return `num_prompts` prompts of `dataset` (0: all) in a seeded order, without those held out.

    `split`: the result of `split_of`, if known. Several data sets are mixed by weight. One that ends before the others is repeated until all have ended.
    Errors: `UserError` if a data set cannot be read, has no prompts, or more than `allow_skipped` of its
    records are skipped.
    """
    if config.eval.eval_dataset or not config.eval.eval_prompts:
        return _mixed(_sources(config, tokenizer), config.data.num_prompts or sys.maxsize)
    return (split or _split(config, tokenizer))[0]


def heldout_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, split: Split | None = None
) -> PromptSet:
    """Return `eval_prompts` prompts of `eval_dataset` or, if it is empty, prompts held out from `dataset`.

    `split`: the result of `split_of`, if known.
    """
    if not config.eval.eval_dataset:
        train, held_out = split or _split(config, tokenizer)
        if held_out.prompts:
            return held_out
        repeats = f", and {held_out.num_repeats} that repeat them" if held_out.num_repeats else ""
        raise UserError(
            f"dataset {', '.join(train.drawn)} is too small to hold out prompts: it has"
            f" {len(train.prompts)} to train on{repeats}, and none besides. Name an eval_dataset, or turn"
            " evaluation off with eval_prompts 0."
        )
    name = config.eval.eval_dataset
    records = open_records(name, "test")
    order = range(len(records))
    return _mixed([_Source(name, 1.0, records, order, config, tokenizer)], config.eval.eval_prompts)


def _split(config: Config, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Prompts of `dataset` to train on, and to hold out: those after `num_prompts`.

    If there are none, or `num_prompts` is 0, the last tenth of the different prompts is held out, at least
    one. No prompt is in both. UserError if there is only one.
    """
    train, most = config.data.num_prompts, config.eval.eval_prompts
    taken = _mixed(_sources(config, tokenizer), train + most if train else sys.maxsize)
    prompts = taken.prompts
    if 0 < train < len(prompts):
        known = {prompt.prompt_id for prompt in prompts[:train]}
        trained, rest = prompts[:train], prompts[train:]
        held_out = [prompt for prompt in rest if prompt.prompt_id not in known]
    else:
        different = {prompt.prompt_id: prompt for prompt in reversed(prompts)}
        count = min(most, max(1, len(different) // 10))
        apart = dict(list(different.items())[:count])
        trained = [prompt for prompt in prompts if prompt.prompt_id not in apart]
        held_out = list(reversed(apart.values()))
    if not trained:
        raise UserError(
            f"dataset {', '.join(taken.drawn)} has only one prompt ({len(prompts)} in all), which cannot be"
            " both trained on and held out. Give more, or turn evaluation off with eval_prompts 0."
        )
    num_repeats = len(prompts) - len(trained) - len(held_out)
    return replace(taken, prompts=trained), replace(taken, prompts=held_out, num_repeats=num_repeats)


# --- drawing ------------------------------------------------------------------------------------------------


@dataclass
class _Source:
    """A data set with prompts drawn in `order`."""

    name: str
    weight: float
    records: Sequence[Record]
    order: Sequence[int]
    config: Config
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt] = field(default_factory=list)
    num_drawn: int = 0
    num_records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)  # a skipped record's index for each reason
    columns: dict[str, None] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        return self.num_records == len(self.order)

    def check(self) -> None:
        """Raise `UserError` if too few records are prompts."""
        if not self.num_records:
            return
        skips = _skips(self.skipped, self.num_records, self.examples)
        if not self.prompts:
            refused = Counter(
                {why: number for why, number in self.skipped.items() if why.startswith(REFUSED)}
            )
            if 2 * refused.total() > self.num_records:
                cause = refused.most_common(1)[0][0].removeprefix(REFUSED).strip()
                raise UserError(
                    f"the chat template fails on {refused.total()} of {self.num_records} records of dataset"
                    f" {self.name}, which gave no prompts {cause}. Mend the template, chat_template_kwargs"
                    " or the records."
                )
            too_long = self.skipped[_too_long(self.config)]
            if 2 * too_long > self.num_records:
                raise UserError(
                    f"dataset {self.name} gave no prompts ({skips}); raise max_prompt_tokens, or give shorter"
                    " prompts."
                )
            found = f", found columns {', '.join(self.columns)}" if self.columns else ""
            raise UserError(
                f"dataset {self.name} gave no prompts ({skips}); expected {_quoted(TURNS)} with a user turn,"
                f" or text in {_quoted(TEXTS)}{found}."
            )
        allowed = self.config.data.allow_skipped
        is_judged = self.num_records > FEW or allowed == 0
        if is_judged and self.skipped.total() > allowed * self.num_records:
            raise UserError(
                f"dataset {self.name}: {skips}; that is more than allow_skipped {allowed:g} of them. Mend"
                " the data set, or raise allow_skipped."
            )

    def next_prompt(self) -> Prompt | None:
        while not self.has_ended:
            if self.num_records == HOPELESS and not self.prompts and self.config.data.allow_skipped < 1:
                self.check()
            index = self.order[self.num_records]
            self.num_records += 1
            try:
                self.prompts.append(self._prompt(index))
                return self.prompts[-1]
            except Unusable as reason:
                self.skipped[str(reason)] += 1
                self.examples[str(reason)] = min(index, self.examples.get(str(reason), index))
        return None

    def _prompt(self, index: int) -> Prompt:
        data = self.config.data
        try:
            record = self.records[index]
        except (UserError, Unusable):
            raise
        except Exception as error:  # invalid UTF-8, a date out of range, ...
            raise Unusable(f"that cannot be read ({one_line(error)})") from error
        if len(self.columns) < 20:
            self.columns |= dict.fromkeys(record)
        found = conversation(record, data.system_prompt)
        prompt = encode(found.turns, record, self.tokenizer, data.chat_template_kwargs, found.tools)
        if len(prompt.ids) > data.max_prompt_tokens:
            raise Unusable(_too_long(self.config))
        return prompt


def _too_long(config: Config) -> str:
    return f"longer than max_prompt_tokens {config.data.max_prompt_tokens}"


def _sources(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[_Source]:
    require(config, "dataset")
    names = config.data.dataset
    weights = names if isinstance(names, dict) else {names: 1.0}
    sources = []
    for name, weight in weights.items():
        records = open_records(name, "train")
        order = np.random.default_rng(config.run.seed).permutation(len(records)).tolist()
        sources.append(_Source(name, weight, records, order, config, tokenizer))
    return sources


def _mixed(sources: list[_Source], limit: int) -> PromptSet:
    """Return up to `limit` prompts, each from the data set furthest behind its share."""
    prompts: list[Prompt] = []
    whole = sum(source.weight for source in sources)
    while len(prompts) < limit and not all(source.has_ended for source in sources):
        source = max(sources, key=lambda each: each.weight / whole * (len(prompts) + 1) - each.num_drawn)
        prompt = source.next_prompt()
        if prompt is None:
            if not source.prompts or all(each.has_ended for each in sources):
                break
            prompt = source.prompts[source.num_drawn % len(source.prompts)]
        source.num_drawn += 1
        prompts.append(prompt)
    for source in sources:
        source.check()
    skipped = sum((source.skipped for source in sources), Counter[str]())
    return PromptSet(
        prompts,
        {each.name: each.num_drawn for each in sources},
        skipped,
        sum(each.num_records for each in sources),
        sum(len(each.order) for each in sources),
    )


def _skips(
    skipped: Counter[str], num_records: int, examples: Mapping[str, int] = MappingProxyType({})
) -> str:
    """`9 of 521 records skipped: 9 without a user turn, such as record 12`; records are counted from 1."""
    reasons = [
        f"{number} {reason}" + (f", such as record {examples[reason] + 1}" if reason in examples else "")
        for reason, number in skipped.most_common(SHOWN)
    ]
    rest = skipped.total() - sum(number for _, number in skipped.most_common(SHOWN))
    return f"{skipped.total()} of {num_records} records skipped: " + ", ".join(
        reasons + [f"{rest} for other reasons"] * (rest > 0)
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# --- encoding -----------------------------------------------------------------------------------------------


def encode(
    turns: list[Turn],
    row: Record,
    tokenizer: PreTrainedTokenizerBase,
    kwargs: dict[str, Any],
    tools: Sequence[Any] = (),
) -> Prompt:
    """Apply the chat template with a generation prompt; without a template, join the turns' texts.

    Errors: `Unusable` if the template rejects the turns or the result has no tokens.
    """
    if tokenizer.chat_template:
        text = _templated(turns, tokenizer, kwargs | ({"tools": list(tools)} if tools else {}))
    else:
        text = "\n".join(str(turn["content"]) for turn in plain(turns))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("with half a surrogate pair, which is no Unicode text") from None
    array = np.asarray(_text_ids(text, tokenizer), dtype=np.int32)
    if not len(array):
        raise Unusable("with an empty prompt")
    return Prompt(hashlib.sha256(array.tobytes()).hexdigest()[:16], array, text, row)


def _text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return token ids; without a chat template, keep leading special tokens (BOS), not trailing (EOS)."""
    ids = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.chat_template:
        return ids
    around = cast(list[int], tokenizer(text)["input_ids"])
    begin = next((i for i in range(len(around) - len(ids) + 1) if around[i : i + len(ids)] == ids), 0)
    before = around[:begin]
    return ids if ids[:begin] == before else before + ids


def _templated(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """Render the turns; if the template rejects text parts or nulls, render plain text instead."""
    as_text = plain(turns)
    has_parts = any(isinstance(turn.get("content"), list) for turn in turns)
    tries = (
        [as_text]
        if has_parts and not _takes_parts(tokenizer, kwargs)
        else [turns] + [as_text] * (as_text != turns)
    )
    for attempt in tries:
        try:
            return _render(attempt, tokenizer, kwargs)
        except Exception as error:  # templates are programs and may raise anything
            refusal = one_line(error)[:120]
    raise Unusable(f"{REFUSED} ({refusal})")


def _takes_parts(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> bool:
    """Return whether the template renders a text part as text; others raise or print its repr or JSON."""
    word = "part-0f3a"
    try:
        text = _render([{"role": "user", "content": [{"type": "text", "text": word}]}], tokenizer, kwargs)
    except Exception:  # a template that raises here has no text parts; its message is of no use to anyone
        return False
    return word in text and f"'{word}'" not in text and f'"{word}"' not in text


def _render(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    return cast(
        str, tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
    )


# --- fingerprints -------------------------------------------------------------------------------------------


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()[:16]


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """Hash the token -> id map below `vocab_size`: equal for tokenizers that differ only in padding."""
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i < vocab_size)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
