"""Per-token traces of a few rows of a step: what the loss and the student said before the update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

import cache
from dualkl import DualKLOutput
from dualkl.compress import Compressed
from stages.runtime import traces
from stages.runtime.run import Run
from stages.runtime.traces import Trace

NUM_ROWS = 16
"""Rows per trace: they cost the student's head once more, on their tokens alone."""


def is_due(run: Run, step: int) -> bool:
    """Whether this process traces `step`: the main one, at step 1 and every `trace_every` steps."""
    every = run.config.log.trace_every
    return bool(run.world.is_main and every and (step == 1 or step % every == 0))


def num_positions(rows: list[cache.Record]) -> int:
    """Scored positions, at the start of a forward of `rows`, that a trace keeps."""
    return sum(len(record.completion_ids) for record in rows[:NUM_ROWS])


def write(run: Run, step: int, rows: list[cache.Record], out: DualKLOutput, top: Compressed) -> None:
    """Write the trace of the first rows of a forward; `top` has the student's most likely ids there."""
    lengths = [len(record.completion_ids) for record in rows[:NUM_ROWS]]
    edges = np.cumsum(lengths)[:-1]

    def split(values: Tensor) -> list[np.ndarray]:
        return np.split(values[: sum(lengths)].float().cpu().numpy(), edges)

    columns = {"gate": out.gate, "reverse_kl": out.rkl, "forward_kl": out.fkl}
    columns |= {"student_logprob": top.sampled_logprobs, "student_entropy": top.entropy}
    if out.student_log_tail_mass is not None:
        columns["student_log_tail_mass"] = out.student_log_tail_mass
    parts = {name: split(values) for name, values in columns.items()}
    ids, logprobs = np.split(top.ids.cpu().numpy(), edges), split(top.logprobs)
    found = [
        Trace(
            record.row_id,
            step,
            record.completion_ids,
            {n: p[i] for n, p in parts.items()},
            ids[i],
            logprobs[i],
        )
        for i, record in enumerate(rows[:NUM_ROWS])
    ]
    path = Path(run.folder / "trace" / f"step-{step:06d}.arrow")
    path.parent.mkdir(exist_ok=True)
    traces.write(path, found)
