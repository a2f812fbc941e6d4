"""Describe two models and a data set from their files, for `dualkl init` and `stages.distill`.

Reads configurations, tokenizers and a sample of the records, no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from stages.data.conversations import answer_of
from stages.data.prompts import PromptSet, template_fingerprint, training_prompts
from stages.loops import setup
from stages.loops.setup import Vocabulary
from stages.models import ends, folders, pretrained
from stages.models.positions import positions_of
from stages.runtime.config import Config

MOST_READ = 2000  # prompts; more records are estimated from them
SAFE_SHARE = 0.95  # of the estimate
NO_LIMIT = 2**31


@dataclass(frozen=True)
class Model:
    """A model as its config.json describes it. `positions`: most tokens of a sequence; None: no limit."""

    name: str
    kind: str
    parameters: int
    layers: int
    width: int
    vocab_size: int
    positions: int | None

    @property
    def about(self) -> str:
        return f"{self.kind}, {_short(self.parameters)} parameters, {self.layers} layers"


@dataclass(frozen=True)
class Data:
    """Prompts read from the data set, with their lengths and those of the answers beside them, in tokens."""

    read: PromptSet
    lengths: np.ndarray
    answers: np.ndarray
    checker: str

    @property
    def num_usable(self) -> int:
        """Number of prompts in the whole data set; a safe estimate if not all records were read."""
        read, there = self.read.num_records, self.read.num_there
        if read == there:
            return len(self.lengths)
        return int(there * len(self.lengths) / read * SAFE_SHARE)

    def longer_than(self, tokens: int) -> float:
        """Share of prompts longer than `tokens`."""
        return float(np.mean(self.lengths > tokens))

    def answers_longer_than(self, tokens: int) -> float:
        """Share of the data's answers longer than `tokens`; 0 if it has none."""
        return float(np.mean(self.answers > tokens)) if len(self.answers) else 0.0


@dataclass(frozen=True)
class Survey:
    student: Model
    teacher: Model
    vocabulary: Vocabulary
    data: Data
    remarks: list[str]

    @property
    def positions(self) -> int:
        """Most tokens of a sequence that both models take."""
        return min(model.positions or NO_LIMIT for model in (self.student, self.teacher))


def survey(config: Config) -> Survey:
    """Look at the models and data that `config` names.

    Errors: `UserError` if models or data are unusable: files, token ids, EOS tokens, records.
    """
    student = _model("student_model", config.models.student_model)
    teacher = _model("teacher_model", config.models.teacher_model)
    vocabulary = setup.shared_vocabulary(config)
    ends.check_ends(config, vocabulary.tokenizer, vocabulary.size)
    data = _data(config, vocabulary.tokenizer)
    return Survey(student, teacher, vocabulary, data, list(_remarks(config, vocabulary)))


def _model(key: str, name: str) -> Model:
    config = folders.open_config(key, name)
    folders.check_weights(key, name)
    text = config.get_text_config()
    return Model(
        name,
        config.model_type,
        _num_parameters(config),
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
        positions_of(config),
    )


def _num_parameters(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _data(config: Config, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read up to MOST_READ prompts in the order in which the run draws them, however long they are."""
    sample = {"num_prompts": MOST_READ, "max_prompt_tokens": NO_LIMIT, "allow_skipped": 0.999}
    sections = {
        "data": config.data.model_copy(update=sample),
        "eval": config.eval.model_copy(update={"eval_prompts": 0}),  # hold none out
    }
    read = training_prompts(config.model_copy(update=sections), tokenizer)
    answers = [answer_of(prompt.row) for prompt in read.prompts]
    own = [prompt.row.get("answer") for prompt in read.prompts]
    return Data(
        read,
        np.array([len(prompt.ids) for prompt in read.prompts]),
        np.array([len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers if text]),
        "gsm8k" if all(isinstance(text, str) and "####" in text for text in own) else "",
    )


def _remarks(config: Config, vocabulary: Vocabulary) -> Iterator[str]:
    """What the two tokenizers mean for prompts and ends."""
    student, size = vocabulary.tokenizer, vocabulary.size
    teacher = pretrained.load_tokenizer(config.models.teacher_model)
    if not student.chat_template:
        yield "the student is a base model without a chat template: a prompt is the text of its turns"
    elif template_fingerprint(student) != template_fingerprint(teacher):
        yield "the two chat templates differ: prompts are rendered with the student's"
    yield from ends.remarks(config, student, size)
    turn_end = set(ends.turn_end(config, student))
    if missing := sorted(turn_end - set(ends.student_ends(config, student, size))):
        token = student.convert_ids_to_tokens(missing[0])
        yield f"the chat template ends a turn with '{token}', which does not end a completion; see eos_token"


def findings(config: Config, found: Survey) -> Iterator[str]:
    """Lines that say what was found, each a word and a sentence."""
    student, data, tokenizer = found.student, found.data, found.vocabulary.tokenizer
    rows = max(student.vocab_size, found.teacher.vocab_size)
    yield f"student   {student.name} ({student.about})"
    yield f"teacher   {found.teacher.name} ({found.teacher.about})"
    yield f"tokens    {found.vocabulary.size:,} ids are the same in both" + (
        f" ({rows:,} rows in the larger embedding)" if rows > found.vocabulary.size else ""
    )
    is_chat = bool(tokenizer.chat_template)
    yield f"prompts   {'rendered by the chat template' if is_chat else 'plain text, no chat template'}"
    ids = ends.student_ends(config, tokenizer, found.vocabulary.size)
    yield f"ends      {ends.names(ids, tokenizer)}"
    read = data.read
    sample = "" if read.num_records == read.num_there else f", {read.num_records:,} of them read"
    number = len(data.lengths)
    yield f"data      {read.num_there:,} records{sample}: {number:,} prompt{'s' * (number > 1)}" + (
        f" ({read.skips})" if read.skipped else ""
    )
    yield f"lengths   prompts {_spread(data.lengths)} tokens" + (
        f"; answers {_spread(data.answers)}" if len(data.answers) else ""
    )
    for remark in found.remarks:
        yield f"note      {remark}"


def _spread(lengths: np.ndarray) -> str:
    p50, p95 = (int(value) for value in np.percentile(lengths, [50, 95]))
    return f"p50 {p50:,}, p95 {p95:,}, longest {int(lengths.max()):,}"


def _short(number: int) -> str:
    """E.g. 135M, 4.02B."""
    if number < 1e6:
        return f"{number:,}"
    return f"{number / 1e6:.3g}M" if number < 999.5e6 else f"{number / 1e9:.3g}B"
