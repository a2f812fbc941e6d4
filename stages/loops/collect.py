"""Generate, score and commit missing rollouts, one planned unit at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

import cache
from stages.data.prompts import Prompt
from stages.engine.protocol import Completion
from stages.loops.budgets import slots_of_run
from stages.loops.progress import Progress, counts_of
from stages.loops.scoring import Scoring, score_rows
from stages.loops.writing import UnitWriter
from stages.models.offload import Offloader
from stages.models.policy import Policy
from stages.models.teacher import Teacher
from stages.runtime.config import SignalSection
from stages.runtime.errors import UserError
from stages.runtime.run import Run


@dataclass(frozen=True)
class PlannedRow:
    row_id: str
    prompt: Prompt
    occurrence: int  # how often the same prompt occurs earlier in this plan
    sample_index: int
    refresh_index: int


@dataclass(frozen=True)
class Unit:
    """Rows generated, scored and committed together. Its content depends on the plan alone."""

    name: str
    rows: tuple[PlannedRow, ...]


def plan(
    prompts: Sequence[Prompt],
    *,
    seed: int,
    run_id: str,
    policy_hash: str,
    refresh_index: int,
    num_rollouts: int,
    group_size: int,
    rollouts_per_unit: int,
    first_rollout: int = 0,
) -> list[Unit]:
    """Units of a refresh: `group_size` completions of each of the next `num_rollouts / group_size` prompts.

    `first_rollout`: number of rollouts planned for earlier refreshes.
    """
    occurrences: Counter[str] = Counter()
    rows = []
    for index in range(first_rollout // group_size, (first_rollout + num_rollouts) // group_size):
        prompt = prompts[index % len(prompts)]
        for sample in range(group_size):
            row_id = _row_id(
                seed, policy_hash, prompt.prompt_id, occurrences[prompt.prompt_id], sample, refresh_index
            )
            rows.append(PlannedRow(row_id, prompt, occurrences[prompt.prompt_id], sample, refresh_index))
        occurrences[prompt.prompt_id] += 1
    starts = range(0, len(rows), rollouts_per_unit)
    prefix = f"{run_id}-g{refresh_index:04d}-{policy_hash[:8]}"
    return [Unit(f"{prefix}-{i:05d}", tuple(rows[s : s + rollouts_per_unit])) for i, s in enumerate(starts)]


def missing_units(units: Sequence[Unit], committed_ids: set[str]) -> list[Unit]:
    return [unit for unit in units if not all(row.row_id in committed_ids for row in unit.rows)]


@dataclass(frozen=True)
class Round:
    """Unscored rows that one round gives to this process, none if there are fewer units than processes."""

    unit: str
    rows: list[cache.Record]
    num_units: int  # of all processes
    is_generated: bool = False  # by this process, just now


def collect(
    run: Run,
    units: Sequence[Unit],
    policy: Policy,
    get_teacher: Callable[[], Teacher] | None,
    writer: cache.Writer,
    signal: SignalSection,
    elsewhere: Set[str] = frozenset(),
) -> int:
    """Write the units missing from `writer`'s cache, spread over the ranks; return their number (collective).

    Without a teacher they are committed unscored. `elsewhere`: row ids to skip although this cache lacks
    them. Frees the engine's memory at the end.
    """
    rank, size = run.world.rank, run.world.size
    todo = missing_units(units, run.world.gather(writer.committed_ids | elsewhere)[0])
    num_slots = slots_for(run, policy, scores_too=get_teacher is not None)
    offloader = Offloader(run, policy.model, policy.engine)

    def rounds(progress: Progress) -> Iterator[Round]:
        for start in range(0, len(todo), size):
            now = todo[start : start + size]
            unit = now[rank] if rank < len(now) else None
            with progress.phase("generate"):
                offloader.to_student()
                rows = write_unit(unit, policy, num_slots) if unit else []
            yield Round(unit.name if unit else "", rows, len(now), is_generated=True)
        offloader.to_student()

    scoring = Scoring(signal, policy.sampling.vocab_size, policy.tokenizer.pad_token_id)
    get = None if get_teacher is None else partial(offloader.to_teacher, get_teacher)
    num_rollouts = sum(len(unit.rows) for unit in todo)
    with closing(policy.engine):
        return write_rounds(run, writer, rounds, num_rollouts, scoring, get)


def write_rounds(
    run: Run,
    writer: cache.Writer,
    rounds: Callable[[Progress], Iterator[Round]],
    num_rollouts: int,
    scoring: Scoring,
    get_teacher: Callable[[], Teacher] | None,
) -> int:
    """Score (if a teacher is given) and commit each round's rows; return the number of units.

    Collective. Ranks without rows run dummies in the others' ZeRO-3 forwards. A thread encodes and writes
    rows while the next ones are made.
    """
    num_units = 0
    with UnitWriter(writer) as writing, Progress(run, num_rollouts) as progress:
        for own in rounds(progress):
            counts = counts_of(own.rows, generated=own.is_generated)
            if get_teacher is None:
                writing.append(own.rows)
            else:
                with progress.phase("score"):
                    score_rows(run, own.rows, scoring, get_teacher(), writing, progress, counts)
            with run.clock.phase("save"):
                run.saver.settle(run.world)  # rows must not outlive the weights that wrote them
            if own.unit:
                writing.commit(own.unit)
            num_units += own.num_units
            progress.add(counts)
        with run.clock.phase("write"), progress.waiting("write"):
            writing.drain()
            run.world.barrier()
    return num_units


def slots_for(run: Run, policy: Policy, *, scores_too: bool) -> int:
    """Rows decoded together: `gen_micro_batch`, or as many as fit in free memory (collective)."""
    return slots_of_run(run, policy, scores_too=scores_too)


def _row_id(*parts: object) -> str:
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:32]


def write_unit(unit: Unit, policy: Policy, num_slots: int) -> list[cache.Record]:
    """The unit's rows, unscored. Raises UserError if the model returns logits that are not finite."""
    prompts, seeds = [row.prompt.ids for row in unit.rows], [int(row.row_id, 16) for row in unit.rows]
    completions = policy.generate(prompts, seeds, num_slots)
    for row, completion in zip(unit.rows, completions, strict=True):
        if not np.isfinite(completion.logprobs).all():
            raise UserError(
                f"the generating model gave NaN or infinite logits on prompt {row.prompt.prompt_id} (policy"
                f" step {policy.step}); nothing of unit {unit.name} was kept. Check the weights, or lower lr."
            )
    return [_record(row, done, policy) for row, done in zip(unit.rows, completions, strict=True)]


def _record(row: PlannedRow, completion: Completion, policy: Policy) -> cache.Record:
    return cache.Record(
        row_id=row.row_id,
        prompt_id=row.prompt.prompt_id,
        occurrence=row.occurrence,
        sample_index=row.sample_index,
        refresh_index=row.refresh_index,
        run_id=policy.run_id,
        policy_step=policy.step,
        policy_hash=policy.policy_hash,
        finish_reason=completion.finish_reason,
        prompt_text=row.prompt.text,
        completion_text=cast(str, policy.tokenizer.decode(completion.ids, skip_special_tokens=True)),
        prompt_ids=row.prompt.ids,
        completion_ids=completion.ids,
        behaviour_logprobs=completion.logprobs,
        behaviour_entropy=completion.entropy,
    )
