"""Record classes, the Arrow schema of a shard, and the invariants of every row.

Shapes: P prompt tokens, T scored tokens (the completion, EOS included), K kept ids, V vocabulary, D teacher
width. Logprobs, entropies and tail masses are in nats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.plain import plain

FORMAT_VERSION = 1
_MOST_CHARACTERS = 2_000
MASS_TOLERANCE = 1e-4
FINISH_REASONS = ("eos", "length")
STATE_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(np.uint16),  # not in numpy: stored as bit patterns
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

Array: TypeAlias = npt.NDArray[Any]
Int32: TypeAlias = npt.NDArray[np.int32]
Float32: TypeAlias = npt.NDArray[np.float32]


class CacheError(ValueError):
    """A problem with the cache or its input that the user can fix; states what, where and what to do.

    Quoted text is escaped and truncated, so it cannot control or flood a terminal.
    """

    def __init__(self, message: object = "") -> None:
        text = plain(str(message))
        super().__init__(text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…")


class OtherVersionError(CacheError):
    """The cache is intact, but another version of this program wrote it."""


def as_array(name: str, value: npt.ArrayLike, dtype: npt.DTypeLike, ndim: int) -> Array:
    """Return `value` as a contiguous array. CacheError on a wrong rank or a lossy conversion to integers."""
    array, wanted = np.asarray(value), np.dtype(dtype)
    if array.ndim != ndim:
        raise CacheError(
            f"{name} has shape {list(array.shape)}; expected {ndim} dimension{'s' * (ndim != 1)}."
        )
    if array.dtype != wanted:
        if array.size and array.dtype.kind not in ("iu" if wanted.kind in "iu" else "iuf"):
            raise CacheError(f"{name} is an array of {array.dtype}; expected {wanted}.")
        with np.errstate(over="ignore"):
            converted = array.astype(wanted)
        if wanted.kind in "iu" and not np.array_equal(converted, array):
            raise CacheError(f"{name} holds numbers that do not fit {wanted}.")
        array = converted
    return np.ascontiguousarray(array)


def as_states(name: str, value: npt.ArrayLike, dtype: str) -> Array:
    """Return a matrix in one of `STATE_DTYPES`; CacheError unless the array's dtype can carry `dtype`."""
    if dtype not in STATE_DTYPES:
        raise CacheError(f"{name} has dtype {dtype!r}; expected one of {', '.join(STATE_DTYPES)}.")
    array = np.asarray(value)
    if array.dtype != STATE_DTYPES[dtype] or array.ndim != 2:
        raise CacheError(
            f"{name} is an array of {array.dtype} with shape {list(array.shape)}; expected two dimensions of"
            f" {STATE_DTYPES[dtype]}, which carries {dtype}."
        )
    return np.ascontiguousarray(array)


def to_float32(array: Array, dtype: str) -> Float32:
    """Convert an array in one of `STATE_DTYPES` to float32 (exact)."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


@dataclass(frozen=True, eq=False)
class TopK:
    """The teacher's most likely ids per position and the mass of all others, normalised together.

    Attributes:
        ids: int32 [T, K], in descending logprob; empty slots hold -1 and come last.
        logprobs: float32 [T, K], nats; -inf in empty slots.
        log_tail_mass: float32 [T], ln of the mass outside the kept ids, nats; -inf if everything is kept.
        temperature: temperature of logprobs and tail.
    """

    ids: Int32
    logprobs: Float32
    log_tail_mass: Float32
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", as_array("signal.ids", self.ids, np.int32, 2))
        object.__setattr__(self, "logprobs", as_array("signal.logprobs", self.logprobs, np.float32, 2))
        tail = as_array("signal.log_tail_mass", self.log_tail_mass, np.float32, 1)
        object.__setattr__(self, "log_tail_mass", tail)


@dataclass(frozen=True, eq=False)
class Hidden:
    """The teacher's last hidden states [T, D]; `dtype` as in `STATE_DTYPES` (bfloat16 stored as uint16)."""

    states: Array
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", as_states("signal.states", self.states, self.dtype))


@dataclass(frozen=True, eq=False)
class Full:
    """The teacher's logits [T, V] before any temperature; `dtype` as in `STATE_DTYPES`."""

    logits: Array
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", as_states("signal.logits", self.logits, self.dtype))


Signal: TypeAlias = TopK | Hidden | Full


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """Maps hidden states to logits: cap(scale * (states @ weight.T + bias)), cap(x) = c tanh(x / c).

    Attributes:
        weight: [V, D], `dtype` as in `STATE_DTYPES`.
        bias: float32 [V] or None.
        scale: factor on the logits before the cap.
        softcap: c, the bound of the logits' magnitude; 0 for none.
    """

    weight: Array
    dtype: str
    bias: Float32 | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", as_states("head.weight", self.weight, self.dtype))
        if self.bias is None:
            return
        object.__setattr__(self, "bias", as_array("head.bias", self.bias, np.float32, 1))
        if len(self.bias) != len(self.weight):
            raise CacheError(
                f"head.bias has {len(self.bias)} entries; expected {len(self.weight)}, as its weight."
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Record:
    """One decoded rollout: tokens, with the student's and teacher's statistics for each.

    Attributes:
        row_id: 32 hex digits, the identity of the planned rollout.
        prompt_ids, completion_ids: int32 [P], [T]; the completion includes its EOS.
        behaviour_logprobs: float32 [T], under the true sampling distribution.
        behaviour_entropy: float32 [T], of the same distribution; None if the engine does not report it.
        teacher_logprobs: float32 [T], of the sampled tokens.
        teacher_entropy, top1_id, top1_logprob: [T], of the teacher's full distribution.
        log_tail_mass: float32 [T], ln of the mass outside the signal's kept ids; -inf if it keeps everything.
        signal: the teacher's distribution. Like all teacher columns, None in unscored rows.
    """

    row_id: str
    prompt_id: str
    occurrence: int
    sample_index: int
    refresh_index: int
    run_id: str
    policy_step: int
    policy_hash: str
    finish_reason: str
    prompt_text: str
    completion_text: str
    prompt_ids: Int32
    completion_ids: Int32
    behaviour_logprobs: Float32
    behaviour_entropy: Float32 | None
    teacher_logprobs: Float32 | None = None
    teacher_entropy: Float32 | None = None
    log_tail_mass: Float32 | None = None
    top1_id: Int32 | None = None
    top1_logprob: Float32 | None = None
    signal: Signal | None = None

    def __post_init__(self) -> None:
        for name, dtype in TOKEN_COLUMNS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_array(f"row {self.row_id}: {name}", value, dtype, 1))


TEACHER_COLUMNS = ("teacher_logprobs", "teacher_entropy", "log_tail_mass", "top1_id", "top1_logprob")
OPTIONAL_COLUMN = "behaviour_entropy"  # null if the row's engine does not report it
TOKEN_COLUMNS: dict[str, type[np.generic]] = {
    "prompt_ids": np.int32,
    "completion_ids": np.int32,
    "behaviour_logprobs": np.float32,
    "behaviour_entropy": np.float32,
    "teacher_logprobs": np.float32,
    "teacher_entropy": np.float32,
    "log_tail_mass": np.float32,
    "top1_id": np.int32,
    "top1_logprob": np.float32,
}
_SCALARS = {
    "row_id": pa.string(),
    "prompt_id": pa.string(),
    "occurrence": pa.int32(),
    "sample_index": pa.int32(),
    "refresh_index": pa.int32(),
    "run_id": pa.string(),
    "policy_step": pa.int64(),
    "policy_hash": pa.string(),
    "finish_reason": pa.string(),
    "prompt_text": pa.string(),
    "completion_text": pa.string(),
}
SCALAR_COLUMNS = tuple(_SCALARS)
SCHEMA = pa.schema(
    [pa.field(name, kind, nullable=False) for name, kind in _SCALARS.items()]
    + [
        pa.field(
            name, pa.list_(pa.from_numpy_dtype(dtype)), nullable=name in (*TEACHER_COLUMNS, OPTIONAL_COLUMN)
        )
        for name, dtype in TOKEN_COLUMNS.items()
    ]
    + [pa.field("signal", pa.large_binary(), nullable=True)]
)


def to_batch(records: list[Record], signals: list[bytes | memoryview | None]) -> pa.RecordBatch:
    """Build the record batch of some rows, all or none of them scored; `signals` are packed, in row order."""
    columns: list[pa.Array] = [
        pa.array([getattr(record, name) for record in records], kind) for name, kind in _SCALARS.items()
    ]
    columns += [_list_column(name, [getattr(record, name) for record in records]) for name in TOKEN_COLUMNS]
    columns.append(pa.array(signals, pa.large_binary()))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _list_column(name: str, arrays: list[Array | None]) -> pa.Array:
    kept = [array for array in arrays if array is not None]
    if not kept:
        return pa.nulls(len(arrays), SCHEMA.field(name).type)
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([0 if array is None else len(array) for array in arrays], out=offsets[1:])
    is_null = pa.array([array is None for array in arrays]) if len(kept) < len(arrays) else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(kept)), mask=is_null)


@dataclass(frozen=True)
class Rules:
    """The fingerprint's constraints on every row.

    Attributes:
        k: maximum kept ids per position, or None.
        width: D of hidden states, from the teacher's head; None if unknown.
    """

    vocab_size: int
    kind: str
    temperature: float
    k: int | None
    width: int | None = None


_SIGNAL_OF_KIND: dict[str, type[Any]] = {
    "none": type(None),
    "topk": TopK,
    "nucleus": TopK,
    "hidden": Hidden,
    "full": Full,
}
SIGNAL_KINDS = tuple(_SIGNAL_OF_KIND)


def check_record(record: Record, rules: Rules, rounding: float = 0.0) -> None:
    """Raise CacheError, naming row, field and position, if the row violates an invariant of the format.

    `rounding` (nats) is the allowed difference between signal and columns beyond `MASS_TOLERANCE`: 0 for a
    row to be written, `codec.ROUNDING_NATS` for a row that was read.
    """
    _check_identity(record)
    _check_tokens(record, rules)
    expected = _SIGNAL_OF_KIND[rules.kind]
    if not isinstance(record.signal, expected):
        _refuse(record, f"signal is {_kind(record.signal)}; expected {rules.kind}, as the fingerprint says")
    if isinstance(record.signal, TopK):
        _check_topk(record, record.signal, rules, rounding)
    elif isinstance(record.signal, Hidden):
        _check_states(record, "states", record.signal.states, None)
    elif isinstance(record.signal, Full):
        _check_states(record, "logits", record.signal.logits, rules.vocab_size)


def _kind(signal: Signal | None) -> str:
    return "none" if signal is None else type(signal).__name__.lower()


def _refuse(record: Record, problem: str) -> None:
    raise CacheError(f"row {record.row_id}: {problem}.")


def _refuse_where(record: Record, name: str, bad: Array, values: Array, expected: str) -> None:
    """Report the first bad position of `bad` [T] or [T, K]."""
    if bad.any():
        place = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        index = ", ".join(map(str, place))
        _refuse(record, f"{name}[{index}] is {values[place]}; expected {expected}")


def _check_identity(record: Record) -> None:
    if not re.fullmatch("[0-9a-f]{32}", record.row_id):
        raise CacheError(f"row_id is {record.row_id!r}; expected 32 hex digits.")
    for name in ("prompt_id", "run_id", "policy_hash"):
        if not getattr(record, name):
            _refuse(record, f"{name} is empty; expected a name")
    for name, bits in (("occurrence", 31), ("sample_index", 31), ("refresh_index", 31), ("policy_step", 63)):
        if not 0 <= getattr(record, name) < 2**bits:
            _refuse(record, f"{name} is {getattr(record, name)}; expected a count from 0 to 2**{bits} - 1")
    if record.finish_reason not in FINISH_REASONS:
        _refuse(
            record, f"finish_reason is {record.finish_reason!r}; expected one of {', '.join(FINISH_REASONS)}"
        )


def _check_tokens(record: Record, rules: Rules) -> None:
    num_tokens = len(record.completion_ids)
    for name in ("prompt_ids", "completion_ids"):
        if not len(getattr(record, name)):
            _refuse(record, f"{name} is empty; expected at least one token")
    scored = rules.kind != "none"
    for name in TOKEN_COLUMNS:
        values = getattr(record, name)
        if name in TEACHER_COLUMNS and (values is not None) != scored:
            _refuse(
                record, f"{name} is {'missing' if scored else 'given'}, but the signal kind is {rules.kind}"
            )
        if values is None:
            continue
        if name != "prompt_ids" and len(values) != num_tokens:
            _refuse(
                record, f"{name} has {len(values)} entries; expected {num_tokens}, one a completion token"
            )
        _check_values(record, name, values, rules)


def _check_values(record: Record, name: str, values: Array, rules: Rules) -> None:
    _refuse_where(record, name, *_bad_values(name, values, rules))


def wrong_value(name: str, values: Array, rules: Rules) -> tuple[int, str] | None:
    """Return a token column's first invalid position and the format's requirement, or None."""
    bad, _, expected = _bad_values(name, values, rules)
    return (int(bad.argmax()), expected) if bad.any() else None


def _bad_values(name: str, values: Array, rules: Rules) -> tuple[Array, Array, str]:
    """Return a mask of invalid values of a token column, the values, and a description of valid ones."""
    if values.dtype == np.int32:
        bad = (values < 0) | (values >= rules.vocab_size)
        return bad, values, f"an id from 0 to {rules.vocab_size - 1}, the vocabulary"
    if name == "log_tail_mass":
        return ~(values <= MASS_TOLERANCE), values, "the ln of a mass, nats (-inf for none)"
    if name.endswith("entropy"):
        return ~np.isfinite(values) | (values < -1e-3), values, "an entropy, nats: finite and not negative"
    return ~np.isfinite(values) | (values > MASS_TOLERANCE), values, "a logprob, nats: finite and not above 0"


def _check_topk(record: Record, signal: TopK, rules: Rules, rounding: float) -> None:
    ids, logprobs, tail = signal.ids, signal.logprobs, signal.log_tail_mass
    num_tokens, most = len(record.completion_ids), rules.k or rules.vocab_size
    if ids.shape != logprobs.shape or len(ids) != num_tokens or len(tail) != num_tokens or not ids.shape[1]:
        shapes = f"ids {list(ids.shape)}, logprobs {list(logprobs.shape)}, log_tail_mass {list(tail.shape)}"
        _refuse(record, f"signal has {shapes}; expected [{num_tokens}, K] twice and [{num_tokens}], K >= 1")
    if ids.shape[1] > most:
        _refuse(
            record,
            f"signal keeps {ids.shape[1]} ids a token; expected at most {most}, as the fingerprint says",
        )
    if np.float32(signal.temperature) != np.float32(rules.temperature):  # float32, as it is packed
        _refuse(record, f"signal is at temperature {signal.temperature}; expected {rules.temperature}")
    bad = (ids < -1) | (ids >= rules.vocab_size)
    _refuse_where(
        record, "signal.ids", bad, ids, f"an id from 0 to {rules.vocab_size - 1}, or -1 for an empty slot"
    )
    _check_topk_order(record, ids, logprobs)
    _refuse_where(record, "signal.log_tail_mass", np.isnan(tail), tail, "the ln of a mass, nats")
    mass = np.exp(logprobs.astype(np.float64)).sum(1) + np.exp(tail.astype(np.float64))
    bad = ~(np.abs(mass - 1) <= MASS_TOLERANCE)
    _refuse_where(record, "the mass of signal's kept ids and tail", bad, mass, f"1 within {MASS_TOLERANCE}")
    _check_topk_columns(record, signal, MASS_TOLERANCE + rounding)


def _check_topk_order(record: Record, ids: Int32, logprobs: Float32) -> None:
    kept = ids >= 0
    name = "signal.logprobs"
    _refuse_where(record, name, kept & ~np.isfinite(logprobs), logprobs, "a finite logprob for a kept id")
    _refuse_where(record, name, ~kept & (logprobs != -np.inf), logprobs, "-inf in an empty slot")
    gap = np.zeros_like(kept)
    gap[:, 1:] = kept[:, 1:] & ~kept[:, :-1]
    _refuse_where(record, "signal.ids", gap, ids, "empty slots (id -1) last")
    rising = np.zeros_like(kept)
    rising[:, 1:] = kept[:, 1:] & (logprobs[:, 1:] > logprobs[:, :-1])
    _refuse_where(record, name, rising, logprobs, "falling logprobs, the most likely id in slot 0")
    ordered = np.sort(ids, axis=1)
    twice = np.zeros_like(kept)
    twice[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        position, slot = np.argwhere(twice)[0]
        _refuse(
            record, f"signal.ids[{position}] keeps id {ordered[position, slot]} twice; expected each id once"
        )


def _check_topk_columns(record: Record, signal: TopK, tolerance: float) -> None:
    """Reject columns that differ from the signal by more than `tolerance` (nats; a share for the tail)."""
    assert record.top1_id is not None
    assert record.top1_logprob is not None
    assert record.log_tail_mass is not None
    first, filled = signal.ids[:, 0], signal.ids[:, 0] >= 0
    bad = filled & (record.top1_id != first)
    _refuse_where(record, "top1_id", bad, record.top1_id, "the id in the signal's slot 0")
    with np.errstate(invalid="ignore"):
        bad = filled & ~(np.abs(record.top1_logprob - signal.logprobs[:, 0]) <= tolerance)
    _refuse_where(record, "top1_logprob", bad, record.top1_logprob, "the logprob in the signal's slot 0")
    bad = ~(
        np.abs(np.exp(record.log_tail_mass) - np.exp(signal.log_tail_mass))
        <= min(tolerance, 3 * MASS_TOLERANCE)
    )
    _refuse_where(record, "log_tail_mass", bad, record.log_tail_mass, "the signal's own log_tail_mass")


def _check_states(record: Record, name: str, array: Array, width: int | None) -> None:
    num_tokens = len(record.completion_ids)
    if len(array) != num_tokens or (array.shape[1] != width if width else not array.shape[1]):
        _refuse(
            record, f"signal.{name} has shape {list(array.shape)}; expected [{num_tokens}, {width or 'D'}]"
        )
    bad = (array & 0x7F80) == 0x7F80 if array.dtype == np.uint16 else ~np.isfinite(array)
    if bad.any():
        shown = to_float32(array, "bfloat16") if array.dtype == np.uint16 else array
        _refuse_where(record, f"signal.{name}", bad, shown, "finite numbers")
