"""Score unscored rows, one unit at a time, in teacher forwards over rows of similar length.

Shapes: N scored positions, D teacher width, V vocabulary, K kept ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cache
from cache.schema import TEACHER_COLUMNS
from dualkl import Head
from dualkl.compress import Compressed, compress
from stages.data.alignment import Aligned, align, at_scored
from stages.data.batches import map_tensors, micro_batches, num_tokens
from stages.data.signals import KINDS, SignalKind
from stages.loops.budgets import score_tokens_of_run
from stages.loops.progress import Counts, Progress
from stages.loops.writing import HostCopy, UnitWriter, to_numpy
from stages.models.teacher import Teacher
from stages.runtime.config import SignalSection
from stages.runtime.errors import UserError
from stages.runtime.run import Run

FORWARD_COST = 1 / 32  # fixed cost of a forward, as a share of the token budget


@dataclass(frozen=True)
class Scoring:
    """Scoring settings; `pad_id` and `vocab_size` are those of the rows' student."""

    signal: SignalSection
    vocab_size: int
    pad_id: int


@dataclass(frozen=True)
class ScoredBatch:
    """Rows, in order, and the teacher's columns of all their tokens.

    The copy to the host may still be running.
    """

    rows: list[cache.Record]
    copies: HostCopy
    kind: SignalKind

    def records(self) -> Iterator[cache.Record]:
        """The scored rows. Raises UserError if the teacher returned NaN or infinite values."""
        columns = self.copies.arrays()
        for name in ("teacher_logprobs", "teacher_entropy"):
            if not np.isfinite(columns[name]).all():
                raise UserError(
                    f"the teacher gave NaN or infinite values ({name}) in the unit of row"
                    f" {self.rows[0].row_id}; none of that unit was kept. Check its weights and"
                    " teacher_dtype."
                )
        start = 0
        for row in self.rows:
            part = slice(start, start + len(row.completion_ids))
            own = {name: array[part] for name, array in columns.items()}
            plain: dict[str, Any] = {name: own[name] for name in TEACHER_COLUMNS}
            yield replace(row, signal=self.kind.signal(own), **plain)
            start = part.stop


def score_rows(
    run: Run,
    rows: list[cache.Record],
    scoring: Scoring,
    teacher: Teacher,
    writing: UnitWriter,
    progress: Progress,
    counts: Counts,
) -> None:
    """Score a unit's rows, hand them to the writer and count them (collective).

    `rows` is empty on a rank without a unit. The host runs one forward behind the device, to keep it busy.
    """
    lengths = [num_tokens(row) for row in rows]
    has_groups = run.config.rollout.group_size > 1
    shared = teacher.shares and has_groups
    if teacher.packs and has_groups and not shared:
        run.metrics.say_once(f"the teacher reads a prompt once a completion: {teacher.unshared_because}")
    score = partial(_states_and_kept, scoring, teacher)
    max_rows, max_tokens = _max_rows(run), score_tokens_of_run(run, teacher, scoring.vocab_size, score)
    if teacher.packs:
        batches = packed_batches(lengths, max_rows, max_tokens, rows if shared else None)
    else:
        batches = scoring_batches(lengths, max_rows, max_tokens)
    for scored in _when_copied(_forwards(run, rows, batches, scoring, teacher, shared)):
        with progress.waiting("write"):
            writing.append(scored.records(), scored.copies.num_bytes)
    counts.scored_tokens = sum(lengths)
    padded = 0 if teacher.packs else sum(len(batch) * lengths[batch[0]] for batch in batches)
    counts.padded_tokens = padded or counts.scored_tokens


def _max_rows(run: Run) -> int | None:
    rows = run.config.rollout.lp_micro_batch
    return None if rows == "auto" else rows


def scoring_batches(lengths: Sequence[int], max_rows: int | None, max_tokens: int) -> list[list[int]]:
    """Row indices of each scoring forward: longest rows first, similar lengths together, every row once.

    A forward holds at most `max_rows` rows and `max_tokens` tokens including padding, or one row. This is the
    cheapest partition of the sorted rows, where a forward costs its padded tokens plus `FORWARD_COST` of the
    budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    num_rows = len(order)
    least = np.zeros(num_rows + 1)  # cost of all rows from here to the shortest
    end = np.zeros(num_rows, int)  # of the batch that starts here
    for first in reversed(range(num_rows)):
        longest = lengths[order[first]]
        most = max(1, min(max_tokens // longest, max_rows or num_rows, num_rows - first))
        costs = (
            np.arange(1, most + 1) * longest + FORWARD_COST * max_tokens + least[first + 1 : first + most + 1]
        )
        end[first] = first + 1 + int(costs.argmin())
        least[first] = costs.min()
    batches, first = [], 0
    while first < num_rows:
        batches.append(order[first : end[first]])
        first = int(end[first])
    return batches


def packed_batches(
    lengths: Sequence[int],
    max_rows: int | None,
    max_tokens: int,
    sharing: Sequence[cache.Record] | None = None,
) -> list[list[int]]:
    """The same for packed rows, without padding: each forward is filled as far as possible.

    Lengths are sorted here too: attention without the flash kernel handles equal lengths in one call, and the
    plain columns compress better. `sharing`: the rows, if those of one prompt share it; they follow each
    other then, and the prompt counts once in a forward.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if sharing is None:
        return list(micro_batches(order, lengths.__getitem__, max_rows, max_tokens, packed=True))
    groups: dict[str, list[int]] = {}
    for i in order:
        groups.setdefault(sharing[i].prompt_id, []).append(i)
    rows = sharing

    def shared(before: int, i: int) -> int:
        return len(rows[i].prompt_ids) if rows[before].prompt_id == rows[i].prompt_id else 0

    together = [i for group in groups.values() for i in group]
    return list(
        micro_batches(together, lengths.__getitem__, max_rows, max_tokens, packed=True, shared=shared)
    )


def _forwards(
    run: Run,
    rows: list[cache.Record],
    batches: list[list[int]],
    scoring: Scoring,
    teacher: Teacher,
    shared: bool,
) -> Iterator[ScoredBatch]:
    """Scored batches of this rank; ranks with fewer run dummy forwards alongside the others."""
    num_forwards = int(run.world.max([len(batches)])[0]) if teacher.is_collective else len(batches)
    for index in range(num_forwards):
        if index >= len(batches):
            teacher.dummy()
            continue
        yield from _forward([rows[i] for i in batches[index]], scoring, teacher, shared)


def _forward(
    rows: list[cache.Record], scoring: Scoring, teacher: Teacher, shared: bool
) -> Iterator[ScoredBatch]:
    """Score one batch. A kind with large tensors (`by_row`) yields one batch per row."""
    prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
    aligned = align(prompts, completions, scoring.pad_id, teacher.device, packed=teacher.packs, shared=shared)
    hidden_ND, kept = _states_and_kept(scoring, teacher, aligned)
    kind, head = KINDS[scoring.signal.signal], teacher.head
    start = 0
    for own in [[row] for row in rows] if kind.by_row else [rows]:
        part = slice(start, start + sum(len(row.completion_ids) for row in own))
        columns = teacher_columns(
            kind, hidden_ND[part], head, map_tensors(itemgetter(part), kept), scoring.vocab_size
        )
        yield ScoredBatch(own, HostCopy(columns), kind)
        start = part.stop


def _states_and_kept(scoring: Scoring, teacher: Teacher, aligned: Aligned) -> tuple[Tensor, Compressed]:
    """The teacher's hidden states [N, D] at the scored positions, and what the signal keeps of them."""
    hidden_ND = at_scored(teacher.hidden(aligned), aligned)
    return hidden_ND, kept_of(hidden_ND, teacher.head, aligned.targets, scoring.signal, scoring.vocab_size)


def _when_copied(batches: Iterator[ScoredBatch]) -> Iterator[ScoredBatch]:
    """Yield each batch once it is on the host. By then the next forward is queued on the device."""
    before: ScoredBatch | None = None
    for batch in batches:
        if before is not None:
            before.copies.wait()
            yield before
        before = batch
    if before is not None:
        before.copies.wait()
        yield before


def kept_of(
    hidden_ND: Tensor, head: Head, targets_N: Tensor, section: SignalSection, vocab_size: int
) -> Compressed:
    """What the configured signal keeps of the teacher at each scored position."""
    limits = {"k": 1} | KINDS[section.signal].limits(section, vocab_size)
    return compress(hidden_ND, head, targets_N, vocab_size=vocab_size, **limits)


def teacher_columns(
    kind: SignalKind, hidden_ND: Tensor, head: Head, kept: Compressed, vocab_size: int
) -> dict[str, Tensor]:
    """Per scored token: the columns that every row stores, and the tensors of its signal."""
    tail = torch.full_like(kept.entropy, -torch.inf) if kind.is_whole else kept.log_tail_mass
    return kind.tensors(hidden_ND, head, kept, vocab_size) | {
        "teacher_logprobs": kept.sampled_logprobs,
        "teacher_entropy": kept.entropy,
        "log_tail_mass": tail,
        "top1_id": kept.ids[:, 0],
        "top1_logprob": kept.logprobs[:, 0],
    }


def teacher_head(head: Head, vocab_size: int) -> cache.TeacherHead:
    """The head in the format of a `hidden` cache, cut to the shared vocabulary."""
    dtype = "bfloat16" if head.weight.dtype == torch.bfloat16 else "float32"
    bias = None if head.bias is None else to_numpy(head.bias[:vocab_size].float())
    return cache.TeacherHead(
        to_numpy(head.weight[:vocab_size]), dtype, bias=bias, scale=head.scale, softcap=head.softcap or 0.0
    )
