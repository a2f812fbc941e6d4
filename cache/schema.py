"""Record classes, the Arrow schema of a shard, and the invariants of every row.

Shapes: P prompt tokens, T scored tokens (the completion, EOS included), K kept ids, V vocabulary, D teacher
width. Logprobs, entropies and tail masses are in nats.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NoReturn, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.plain import plain
from cache.planes import Array, Bytes, Header, Source

if TYPE_CHECKING:
    from cache.matrices import TeacherHead

FORMAT_VERSION = 1
_MOST_CHARACTERS = 2_000
MASS_TOLERANCE = 1e-4
FINISH_REASONS = ("eos", "length")

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


class Signal(ABC):
    """The teacher's distribution over the tokens of a row; each subclass defines one signal kind completely.

    To add one, write the class and put it in `cache.signals.KINDS`.

    Attributes:
        number: the class's number in the header of the packed form; never reused.
        needs_head: whether the signal means nothing without the teacher's head, stored once in the cache.
        column_types: names and types of the numbers that `columns` returns, for an empty cache.
    """

    number: ClassVar[int]
    needs_head: ClassVar[bool] = False
    column_types: ClassVar[dict[str, pa.DataType]]

    @abstractmethod
    def check(self, record: Record, rules: Rules, *, packed: bool) -> None:
        """Raise CacheError unless the signal obeys FORMAT.md and agrees with its row (`check_record`)."""

    @abstractmethod
    def pack(self) -> tuple[Header, Iterable[Bytes]]:
        """Return header and planes of the packed form."""

    @classmethod
    @abstractmethod
    def unpack(cls, header: Header, source: Source, rules: Rules | None) -> Self:
        """Read the planes that `pack` made. ValueError if they, or the header, break the rules.

        The header is checked before any plane is unpacked.
        """

    @classmethod
    def unpack_together(
        cls, headers: Sequence[Header], sources: Sequence[Source], rules: Rules | None
    ) -> list[Self]:
        """The same for several signals whose headers differ in `num_tokens` alone."""
        return [cls.unpack(header, source, rules) for header, source in zip(headers, sources, strict=True)]

    @abstractmethod
    def columns(self) -> tuple[dict[str, Array], Array]:
        """Return the numbers that an export writes, by name, token after token, and how many a token has."""

    @abstractmethod
    def most_likely(self, count: int, head: Callable[[], TeacherHead | None]) -> tuple[Int32, Float32] | None:
        """Return the `count` most likely ids [T, count] (-1 beyond the kept ones) and their probabilities.

        None if that takes a head and there is none.
        """


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


def check_columns(record: Record, rules: Rules) -> None:
    """Raise CacheError, naming row, field and position, unless all but the signal obeys the format."""
    _check_identity(record)
    _check_tokens(record, rules)


def refuse(record: Record, problem: str) -> NoReturn:
    """Raise the CacheError of a row that breaks the format."""
    raise CacheError(f"row {record.row_id}: {problem}.")


def refuse_where(record: Record, name: str, bad: Array, values: Array, expected: str) -> None:
    """Refuse the row for the first bad position of `bad` [T] or [T, K], if there is one."""
    if bad.any():
        place = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        index = ", ".join(map(str, place))
        refuse(record, f"{name}[{index}] is {values[place]}; expected {expected}")


def _check_identity(record: Record) -> None:
    if not re.fullmatch("[0-9a-f]{32}", record.row_id):
        raise CacheError(f"row_id is {record.row_id!r}; expected 32 hex digits.")
    for name in ("prompt_id", "run_id", "policy_hash"):
        if not getattr(record, name):
            refuse(record, f"{name} is empty; expected a name")
    for name, bits in (("occurrence", 31), ("sample_index", 31), ("refresh_index", 31), ("policy_step", 63)):
        if not 0 <= getattr(record, name) < 2**bits:
            refuse(record, f"{name} is {getattr(record, name)}; expected a count from 0 to 2**{bits} - 1")
    if record.finish_reason not in FINISH_REASONS:
        refuse(
            record, f"finish_reason is {record.finish_reason!r}; expected one of {', '.join(FINISH_REASONS)}"
        )


def _check_tokens(record: Record, rules: Rules) -> None:
    num_tokens = len(record.completion_ids)
    for name in ("prompt_ids", "completion_ids"):
        if not len(getattr(record, name)):
            refuse(record, f"{name} is empty; expected at least one token")
    scored = rules.kind != "none"
    for name in TOKEN_COLUMNS:
        values = getattr(record, name)
        if name in TEACHER_COLUMNS and (values is not None) != scored:
            refuse(
                record, f"{name} is {'missing' if scored else 'given'}, but the signal kind is {rules.kind}"
            )
        if values is None:
            continue
        if name != "prompt_ids" and len(values) != num_tokens:
            refuse(record, f"{name} has {len(values)} entries; expected {num_tokens}, one a completion token")
        bad, expected = bad_values(name, values, rules)
        refuse_where(record, name, bad, values, expected)


def bad_values(name: str, values: Array, rules: Rules) -> tuple[Array, str]:
    """Return a mask of invalid values of a token column, and a description of valid ones."""
    if values.dtype == np.int32:
        bad = (values < 0) | (values >= rules.vocab_size)
        return bad, f"an id from 0 to {rules.vocab_size - 1}, the vocabulary"
    if name == "log_tail_mass":
        return ~(values <= MASS_TOLERANCE), "the ln of a mass, nats (-inf for none)"
    if name.endswith("entropy"):
        return ~np.isfinite(values) | (values < -1e-3), "an entropy, nats: finite and not negative"
    return ~np.isfinite(values) | (values > MASS_TOLERANCE), "a logprob, nats: finite and not above 0"
