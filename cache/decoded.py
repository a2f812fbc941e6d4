"""Rows as Arrow record batches with the signal decoded into typed list columns, for formats that other tools read.

T tokens of a row, K kept ids, V vocabulary, D teacher width. Logprobs are in nats.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.reader import PLAIN_COLUMNS, Snapshot
from cache.schema import SCHEMA, Array, CacheError, Full, Hidden, Record, TopK, to_batch, to_float32

_MATRICES = {"hidden": "signal_states", "full": "signal_logits"}
_MOST_VALUES = 2**31 - 1  # what the 32-bit offsets of an Arrow list column can count


def decoded_schema(snapshot: Snapshot) -> pa.Schema:
    """The plain columns, and after them the signal's.

    top-k and nucleus: `signal_ids` list<list<int32>> [T, K], `signal_logprobs` list<list<float>> [T, K], without the
    empty slots. hidden: `signal_states` [T, D]; full: `signal_logits` [T, V]; both list<list<halffloat>> if the first
    row is in float16, else list<list<float>>, into which bfloat16 goes exactly. none: no more columns.
    """
    kind = snapshot.fingerprint.rules.kind
    fields = [pa.field(name, SCHEMA.field(name).type) for name in PLAIN_COLUMNS]
    if kind in ("topk", "nucleus"):
        fields += [
            pa.field("signal_ids", _nested(pa.int32())),
            pa.field("signal_logprobs", _nested(pa.float32())),
        ]
    elif kind in _MATRICES:
        signal = snapshot[0].signal if len(snapshot) else None
        is_half = isinstance(signal, Hidden | Full) and signal.dtype == "float16"
        fields.append(pa.field(_MATRICES[kind], _nested(pa.float16() if is_half else pa.float32())))
    return pa.schema(fields)


def decoded_batch(records: list[Record], schema: pa.Schema) -> pa.RecordBatch:
    """Some rows as a record batch of `decoded_schema`; CacheError on float32 states in a cache of float16 ones."""
    plain = to_batch(records, [None] * len(records)).select(list(PLAIN_COLUMNS))
    columns = [*plain.columns, *_signal_columns(records, schema)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _nested(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.list_(kind))


def _signal_columns(records: list[Record], schema: pa.Schema) -> list[pa.Array]:
    """The columns of `schema` that follow the plain ones."""
    names = schema.names[len(PLAIN_COLUMNS) :]
    if not names:
        return []
    row_lengths = [len(record.completion_ids) for record in records]
    if len(names) == 1:
        dtype = np.dtype(schema.field(names[0]).type.value_type.value_type.to_pandas_dtype())
        matrices = [_matrix(record, dtype) for record in records]
        widths = np.repeat([matrix.shape[1] for matrix in matrices], row_lengths)
        return [_lists(records[0], [matrix.reshape(-1) for matrix in matrices], widths, row_lengths)]
    signals = [_topk(record) for record in records]
    kept = [signal.ids >= 0 for signal in signals]
    widths = np.concatenate([slots.sum(1) for slots in kept])
    ids = [signal.ids[slots] for signal, slots in zip(signals, kept, strict=True)]
    logprobs = [signal.logprobs[slots] for signal, slots in zip(signals, kept, strict=True)]
    return [_lists(records[0], values, widths, row_lengths) for values in (ids, logprobs)]


def _topk(record: Record) -> TopK:
    assert isinstance(record.signal, TopK)
    return record.signal


def _matrix(record: Record, dtype: np.dtype[np.generic]) -> Array:
    """States or logits [T, D or V] as float16 or float32, exactly."""
    signal = record.signal
    assert isinstance(signal, Hidden | Full)
    values = signal.states if isinstance(signal, Hidden) else signal.logits
    if dtype == np.float16 and signal.dtype != "float16":
        raise CacheError(
            f"row {record.row_id}: its signal is {signal.dtype}, that of the cache's first row float16; they cannot go"
            " into one column. Read this cache with `cache.open`."
        )
    return values if dtype == np.float16 else to_float32(values, signal.dtype)


def _lists(
    first: Record, values: list[Array], widths: npt.NDArray[np.integer], row_lengths: list[int]
) -> pa.ListArray:
    """list<list>: `values` of all rows, cut into one list a token by `widths`, those into rows by `row_lengths`."""
    inner, outer = _offsets(widths), _offsets(row_lengths)
    if inner[-1] > _MOST_VALUES:
        raise CacheError(
            f"the record batch that begins with row {first.row_id} decodes to {inner[-1]:,} numbers; an Arrow list"
            f" column holds at most {_MOST_VALUES:,}. Read this cache with `cache.open`."
        )
    tokens = pa.ListArray.from_arrays(pa.array(inner, pa.int32()), pa.array(np.concatenate(values)))
    return pa.ListArray.from_arrays(pa.array(outer, pa.int32()), tokens)


def _offsets(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
