"""Traces of training: what stage two computed for each token of a few rows (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.runtime import files, schema
from stages.runtime.errors import UserError

Array = npt.NDArray[Any]
NUM_TOP = 5
SCALARS = ("gate", "reverse_kl", "forward_kl", "student_logprob", "student_entropy")
SCHEMA = pa.schema(
    [pa.field("row_id", pa.string(), nullable=False), pa.field("step", pa.int64(), nullable=False)]
    + [pa.field("token_ids", pa.list_(pa.int32()), nullable=False)]
    + [pa.field(name, pa.list_(pa.float32()), nullable=False) for name in SCALARS]
    + [pa.field("student_log_tail_mass", pa.list_(pa.float32()))]
    + [pa.field("top_ids", pa.list_(pa.int32()), nullable=False)]
    + [pa.field("top_logprobs", pa.list_(pa.float32()), nullable=False)]
)
"""One row per traced rollout: T numbers a list, the top lists NUM_TOP · T, token after token."""


@dataclass(frozen=True)
class Trace:
    """What step `step` computed for the T tokens of a row, before its update; nats.

    Attributes:
        scalars: [T] by name of `SCALARS`, and `student_log_tail_mass` with a top-k teacher.
        top_ids, top_logprobs: [T, NUM_TOP], the student's most likely ids.
    """

    row_id: str
    step: int
    token_ids: Array
    scalars: dict[str, Array]
    top_ids: Array
    top_logprobs: Array


def write(path: Path, traces: list[Trace]) -> None:
    """Write a new trace file, replacing an older one."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for trace in traces:
        columns["row_id"].append(trace.row_id)
        columns["step"].append(trace.step)
        columns["token_ids"].append(trace.token_ids.astype(np.int32))
        for name in (*SCALARS, "student_log_tail_mass"):
            columns[name].append(trace.scalars.get(name))
        columns["top_ids"].append(trace.top_ids.reshape(-1).astype(np.int32))
        columns["top_logprobs"].append(trace.top_logprobs.reshape(-1))
    table = pa.table(columns, schema=SCHEMA)
    path.unlink(missing_ok=True)  # always a new file
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)


def paths(folder: Path) -> list[Path]:
    """The trace files of a run, by step."""
    return sorted(path for path in (folder / "trace").glob("step-*.arrow") if path.stem[5:].isdecimal())


def read(path: Path) -> list[Trace]:
    """The rows of a trace file; ValueError (or an Arrow error) if it is not one."""
    data = files.read(path)
    table = pa.ipc.open_file(pa.py_buffer(data or b"")).read_all()
    if not table.schema.equals(SCHEMA):
        raise ValueError("its columns are not those of a trace, or another version wrote it")
    table.validate(full=True)  # invalid offsets would crash the interpreter
    return [_trace(row) for row in table.to_pylist()]


def _trace(row: dict[str, Any]) -> Trace:
    count = len(row["token_ids"])
    names = [name for name in (*SCALARS, "student_log_tail_mass") if row[name] is not None]
    scalars = {name: np.array(row[name], np.float64) for name in names}
    ids = np.array(row["top_ids"], np.int64)
    top = np.array(row["top_logprobs"], np.float64)
    if (
        any(len(values) != count for values in scalars.values())
        or not len(ids) == len(top) == count * NUM_TOP
    ):
        raise ValueError(f"the lists of row {row['row_id'][:40]} differ in length")
    tokens = np.array(row["token_ids"], np.int64)
    if ids.min(initial=0) < -1 or tokens.min(initial=0) < 0:
        raise ValueError(f"row {row['row_id'][:40]} has a negative id")
    shape = (count, NUM_TOP)
    return Trace(row["row_id"], row["step"], tokens, scalars, ids.reshape(shape), top.reshape(shape))


def newest_by_row(folder: Path, say: Callable[[str], None]) -> dict[str, Trace]:
    """The last trace of each row of a run; files that cannot be read are left out, which `say` reports."""
    found: dict[str, Trace] = {}
    faults = []
    for path in paths(folder):
        try:
            found |= {trace.row_id: trace for trace in read(path)}
        except (OSError, ValueError, LookupError, TypeError, UserError, pa.ArrowException) as error:
            faults.append(f"{path} cannot be read ({schema.complaint(error)})")
    if faults:
        more = f", nor {len(faults) - 1} more traces" if len(faults) > 1 else ""
        say(f"{faults[0]}{more}: the page shows no trace of their rows.")
    return found
