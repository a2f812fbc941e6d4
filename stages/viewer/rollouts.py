"""Rollouts of a page: rows with their prompts, and their tokens as columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import cache
from stages.runtime.schema import finite
from stages.runtime.traces import NUM_TOP, Trace
from stages.viewer.chat import messages_of
from stages.viewer.columns import FINE_LAWS, LAWS, Law, deflated, id_columns, number_columns
from stages.viewer.tokens import Speller, Vocabulary

LEAST_SHOWN = np.log(1e-3)  # less likely ids are left out of a top five, but for the first
MOST_CHARACTERS = 6_000  # of a prompt
MOST_STATES = 1_024  # tokens whose hidden states go through the head together
Array = npt.NDArray[Any]
Figures = dict[str, Any]
CACHED = {
    "teacher_logprob": "teacher_logprobs",
    "behaviour_logprob": "behaviour_logprobs",
    "teacher_entropy": "teacher_entropy",
    "student_entropy": "behaviour_entropy",
}
TRACED = {
    "lambda": "gate",
    "rkl": "reverse_kl",
    "fkl": "forward_kl",
    "trained_logprob": "student_logprob",
    "trained_entropy": "student_entropy",
}
REFERS: dict[str, tuple[str, ...]] = {
    "token": (),
    "teacher_top": ("token",),
    "student_top": ("token", "teacher_top"),
}
"""Columns of ids, and those that their codes refer to."""
MASSES = {"tail": "log_tail_mass", "student_tail": "student_log_tail_mass"}


@dataclass(frozen=True)
class Rollout:
    """A row of the page.

    Attributes:
        source: "cache", or "before", "after" or "teacher" for held-out text of an evaluation.
        trace: what training noted of its tokens; None if it was not traced.
        top: ids and logprobs [T, NUM_TOP] of the teacher's most likely tokens; None if unknown.
    """

    record: cache.Record
    source: str = "cache"
    trace: Trace | None = None
    top: tuple[Array, Array] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.record.completion_ids)

    def ids(self, name: str) -> Array:
        """[T] or [T, NUM_TOP] token ids of a column; -1 where missing."""
        if name == "token":
            return self.record.completion_ids.astype(np.int64)
        own = self._student_top if name == "student_top" else self.top
        if own is None:
            return np.full((self.num_tokens, NUM_TOP), -1)
        return np.where(_is_shown(own[1]), own[0], -1)

    @property
    def _student_top(self) -> tuple[Array, Array] | None:
        return None if self.trace is None else (self.trace.top_ids, self.trace.top_logprobs)

    def values(self, name: str) -> Array:
        """[T] or [T, NUM_TOP] numbers of a column; NaN where missing."""
        if name.endswith("_top_logprob"):
            own = self._student_top if name.startswith("student") else self.top
            if own is None:
                return np.full((self.num_tokens, NUM_TOP), np.nan)
            return np.where(_is_shown(own[1]), own[1], np.nan)
        if name in CACHED:
            found = getattr(self.record, CACHED[name])
        elif name == "tail":
            found = self.record.log_tail_mass
        else:
            found = self.trace and self.trace.scalars.get(TRACED.get(name, MASSES.get(name, "")))
        if found is None:
            return np.full(self.num_tokens, np.nan)
        return np.exp(found.astype(np.float64)) if name in MASSES else found.astype(np.float64)

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return None if np.isnan(values).any() else float(values.mean())


def _is_shown(logprobs: Array) -> Array:
    shown = logprobs >= LEAST_SHOWN
    shown[:, :1] |= np.isfinite(logprobs[:, :1])
    return shown


def tops_of(records: Sequence[cache.Record], head: Any) -> list[tuple[Array, Array] | None]:
    """The teacher's most likely ids and their logprobs, [T, NUM_TOP] each, of every row; None for unscored rows.

    Rows kept as hidden states go through the head together, as converting it takes longer than one row.
    """
    hidden = {i: r.signal for i, r in enumerate(records) if isinstance(r.signal, cache.Hidden)}
    found = [None if i in hidden else _top(record.signal, head) for i, record in enumerate(records)]
    for places in _batches(hidden):
        signals = [hidden[place] for place in places]
        joined = cache.Hidden(np.concatenate([own.states for own in signals]), signals[0].dtype)
        top = _top(joined, head)
        starts = np.cumsum([0, *(len(own.states) for own in signals)])
        for place, start, end in zip(places, starts, starts[1:], strict=False):
            found[place] = None if top is None else (top[0][start:end], top[1][start:end])
    return found


def _batches(hidden: dict[int, cache.Hidden]) -> Iterator[list[int]]:
    """Places of rows of one dtype with at most MOST_STATES tokens, or of one row."""
    part, tokens, dtype = list[int](), 0, ""
    for place, own in hidden.items():
        if part and (tokens + len(own.states) > MOST_STATES or own.dtype != dtype):
            yield part
            part, tokens = [], 0
        part, tokens, dtype = [*part, place], tokens + len(own.states), own.dtype
    if part:
        yield part


def _top(signal: Any, head: Any) -> tuple[Array, Array] | None:
    found = None if signal is None else signal.most_likely(NUM_TOP, head)
    if found is None:
        return None
    ids = np.full((len(found[0]), NUM_TOP), -1)
    logprobs = np.full(ids.shape, -np.inf)
    width = found[0].shape[1]
    ids[:, :width] = found[0]
    with np.errstate(divide="ignore"):
        logprobs[:, :width] = np.log(found[1].astype(np.float64))
    return ids, np.where(ids < 0, -np.inf, logprobs)


def payload(rows: Sequence[Rollout], speller: Speller, laws: dict[str, Law] = FINE_LAWS) -> Figures:
    """`tokens` (their number), `columns`, and `packed`: the JSON of `rows`, `prompts` and `vocabulary`."""
    ids = {name: np.concatenate([row.ids(name) for row in rows]) for name in REFERS if rows}
    values = {name: np.concatenate([row.values(name) for row in rows]) for name in LAWS if rows}
    vocabulary = Vocabulary(ids.values())
    places = {name: vocabulary.places(found) for name, found in ids.items()}
    prompts = list(dict.fromkeys(row.record.prompt_text for row in rows))
    packed = {
        "rows": list(_described(rows, prompts)),
        "prompts": [prompt_of(text) for text in prompts],
        "vocabulary": vocabulary.entries(speller.entry),
    }
    return {
        "tokens": sum(row.num_tokens for row in rows),
        "packed": deflated(json.dumps(finite(packed), separators=(",", ":")).encode()),
        "columns": id_columns(places, REFERS) | number_columns(values, laws),
    }


def _described(rows: Sequence[Rollout], prompts: Sequence[str]) -> Iterator[Figures]:
    places, offset = {text: place for place, text in enumerate(prompts)}, 0
    for row in rows:
        yield described(row) | {"prompt": places[row.record.prompt_text], "offset": offset}
        offset += row.num_tokens


def described(row: Rollout) -> Figures:
    """What the list of rows shows of a row, without its tokens."""
    record = row.record
    teacher, behaviour = row.mean("teacher_logprob"), row.mean("behaviour_logprob")
    gap = None if teacher is None or behaviour is None else teacher - behaviour
    return {
        "id": record.row_id,
        "prompt_id": record.prompt_id,
        "step": record.policy_step,
        "refresh": record.refresh_index,
        "finish": "stop" if record.finish_reason == "eos" else record.finish_reason,
        "tokens": row.num_tokens,
        "source": row.source,
        "solved": None,
        "gap": gap,
        "rkl": row.mean("rkl"),
        "fkl": row.mean("fkl"),
        "lambda": row.mean("lambda"),
        "entropy": row.mean("teacher_entropy"),
        "traced_at": row.trace and row.trace.step,
    }


def prompt_of(text: str) -> Figures:
    """`messages`, the prompt's turns, or `text` if they cannot be told apart; long ones without their middle."""
    messages = messages_of(text)
    if messages is None:
        return {"text": shortened(text), "messages": None}
    turns = [turn | {"content": shortened(turn["content"])} for turn in messages]
    return {"text": None, "messages": turns}


def shortened(text: str) -> str:
    """A text of at most about MOST_CHARACTERS: the middle of a longer one is left out, which it says."""
    left = len(text) - MOST_CHARACTERS
    if left <= 0:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[… {left:,} characters left out …]\n{text[-half:]}"
