"""Schemas of the records in metrics.jsonl, eval/*.json and traces, checked once when they are read.

A run's files may be truncated by a crash, written by another version, or come from an untrusted source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, ValidationError

from stages.runtime import files
from stages.runtime.errors import one_line

DEPTH = 32
LARGEST = 1e40  # outside the range of fp32


def _figure(value: Any) -> Any:
    if value is not None and (type(value) not in (int, float) or LARGEST < abs(value) != math.inf):
        raise ValueError("must be a number or null")
    return value


Figure = Annotated[Any, PlainValidator(_figure)]
"""A number (including NaN and infinities) or None."""
Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0, le=1e18, allow_inf_nan=False)]
Bins = Annotated[list[Count], Field(min_length=1, max_length=200)]
Name = Annotated[str, StringConstraints(max_length=40)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Figures(_Checked):
    """All extra fields are numbers too."""

    __pydantic_extra__: dict[str, Figure]


class Record(_Checked):
    kind: str
    time: Amount = 0


class Configured(Record):
    from_step: Count
    config: dict[str, dict[str, Any]]
    command: str = ""
    versions: dict[str, str] = {}
    hardware: str | None = None
    commit: str | None = None


class Step(_Figures):
    kind: str
    step: Count
    tokens: Count = 0


class GroupRow(_Figures):
    tokens: Annotated[int, Field(ge=1, le=2**53)]


class Gate(Record):
    step: Count
    tau: Figure = None
    gate_histogram: Bins
    divergence_histogram: Bins
    histogram_from: Annotated[float, Field(ge=1e-30, le=1)]
    histogram_bins_per_decade: Annotated[int, Field(ge=1, le=100)]
    by_position: dict[Name, GroupRow]
    by_age: dict[Name, GroupRow]


class Refreshed(Record):
    step: Count
    refresh_index: Count = 0
    reason: str = ""
    memory_allocated_bytes: Count = 0


class Rows(_Checked):
    """Sums over the tokens of each row."""

    tokens: list[Count] = []
    forward_kl: list[Figure] = []
    reverse_kl: list[Figure] = []
    top1_agreement: list[Figure] = []


class Prompts(_Checked):
    """Answers of each prompt."""

    solved: list[bool | Figure] = []
    cut: list[bool] = []


class Measured(_Checked):
    forward_kl: Figure = None
    forward_kl_error: Figure = None
    reverse_kl: Figure = None
    reverse_kl_error: Figure = None
    top1_agreement: Figure = None
    cut_share: Figure = None
    by_row: Rows | None = None


class Sample(_Checked):
    prompt: str
    completion: str
    solved: bool | Figure = None
    prompt_id: str | None = None
    finish: str | None = None


class Evaluation(Measured):
    """An eval/*.json file."""

    accuracy: Figure = None
    answers: Count = 0
    on_student: Measured | None = None
    by_prompt: Prompts | None = None
    samples: list[Sample] = []
    text_rows: list[str] | None = None
    of: dict[str, Any] = {}


class Evaluated(Record, Measured):
    step: Count = 0
    label: str = ""
    policy_hash: str = ""
    accuracy: Figure = None
    answers: Count = 0
    on_student: Measured | None = None


class Progressed(Record):
    began: Amount = 0
    evaluation: bool = True  # older runs lack it


class Round(Progressed):
    seconds: Amount
    rollouts: Amount
    generated_tokens: Amount
    scored_tokens: Amount
    padded_tokens: Amount
    share_generate: Amount
    share_score: Amount
    share_write: Amount
    share_rows: Amount
    peak_memory_bytes: Amount


class Exported(Record):
    step: Count
    policy_hash: str


class Warned(Record):
    step: Count = 0
    text: str


class Clocked(Record):
    start: Amount
    load: Amount
    rollout: Amount
    score: Amount
    train: Amount
    evaluate: Amount
    total: Amount


KINDS: dict[str, type[BaseModel]] = {
    "config": Configured,
    "step": Step,
    "gate": Gate,
    "refresh": Refreshed,
    "evaluation": Evaluated,
    "eval": Evaluated,
    "export": Exported,
    "warning": Warned,
    "clock": Clocked,
}


def is_record(value: Any) -> bool:
    """Whether a line of metrics.jsonl is a valid record of its kind; unknown kinds need only be `Record`s."""
    if not isinstance(value, dict) or is_deeper(value, DEPTH):
        return False
    kind = KINDS.get(str(value.get("kind")), Record)
    if value.get("kind") == "rollout_progress":
        kind = Round if value.get("evaluation") is False else Progressed
    try:
        kind.model_validate(value)
    except ValidationError:
        return False
    return True


def evaluation(path: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Read the evaluation at `path`; {} if it is missing, or unreadable, which `say` reports."""
    try:
        data = files.read(path)
        found = {} if data is None else finite(json.loads(data))
        Evaluation.model_validate(found)
    except (OSError, ValueError, RecursionError) as error:
        say(f"{path} cannot be read ({complaint(error)}): it counts as not measured")
        return {}
    return found


def complaint(error: Exception) -> str:
    """Where and what went wrong, on one line, for an error in reading or validation."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part)[:40] for part in first['loc'])}: {first['msg']}"
    return one_line(error)


def finite(values: Any) -> Any:
    """The same plain values with NaN and infinities, which JSON cannot hold, replaced by None."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and maps are nested more than `depth` levels deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(is_deeper(one, depth - 1) for one in inner if isinstance(one, dict | list))
