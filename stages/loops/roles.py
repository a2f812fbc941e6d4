"""Stage one split into processes that only generate and processes that only score, on separate GPUs.

The generator commits rows with signal `none` to a cache beside the main one (`Config.unscored_root`). The
scorer follows that cache, scores whole committed units, and commits them to the main cache under the same
unit names and row ids. They do not communicate otherwise; each can be stopped and restarted at any time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import cache
from stages.data.prompts import Prompt
from stages.loops import setup
from stages.loops.collect import collect
from stages.loops.progress import Progress, counts_of
from stages.loops.refresh import planned_units, scored_writer, tokenizer_json
from stages.loops.scoring import Scoring, score_rows, teacher_head
from stages.loops.setup import Vocabulary
from stages.loops.waiting import wait_for
from stages.loops.writing import UnitWriter
from stages.models.policy import Policy
from stages.models.teacher import TeacherLoader
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.split import rollouts_of

PATIENCE = 3600.0  # seconds to wait for a unit to score
PolicyKey = tuple[int, str]  # refresh index and policy hash; one plan each


def generate_rollouts(
    run: Run,
    policy: Policy,
    vocabulary: Vocabulary,
    prompts: list[Prompt],
    *,
    refresh_index: int,
) -> int:
    """Write, unscored, the units of refresh `refresh_index` missing from both caches; return their number.

    Collective.
    """
    config = run.config
    units = planned_units(run, policy, prompts, refresh_index)
    scored = set(cache.open(config.cache_root).row_ids) if cache.exists(config.cache_root) else set()
    fingerprint = setup.unscored_fingerprint(config, vocabulary)
    with cache.Writer(config.unscored_root, fingerprint, tokenizer_json=tokenizer_json(vocabulary)) as writer:
        return collect(run, units, policy, None, writer, config.teacher_signal, elsewhere=scored)


def score_rollouts(run: Run, vocabulary: Vocabulary, *, refresh_index: int, teacher: TeacherLoader) -> int:
    """Score units from refresh `refresh_index` on as they appear; return their number (collective).

    Ends when all planned rows of every policy found there are scored. Raises UserError if no unit appears for
    `PATIENCE` seconds.
    """
    config, world = run.config, run.world
    inbox = Inbox(run, vocabulary, refresh_index)
    num_left = world.gather(inbox.look().num_unscored if world.is_main else 0)[0]
    if not num_left:
        return 0
    with run.clock.phase("load"):
        loaded = teacher.get()
        head = (
            teacher_head(loaded.head, vocabulary.size) if config.teacher_signal.signal == "hidden" else None
        )
    scoring = Scoring(config.teacher_signal, vocabulary.size, vocabulary.tokenizer.pad_token_id)
    num_units = 0
    with (
        scored_writer(config, vocabulary, head) as writer,
        UnitWriter(writer) as writing,
        Progress(run, num_left) as progress,
    ):
        while units := _next_units(run, inbox, progress):
            own = units[world.rank] if world.rank < len(units) else None
            rows = inbox.read(own) if own else []
            counts = counts_of(rows, generated=False)
            with progress.phase("score"):
                score_rows(run, rows, scoring, loaded, writing, progress, counts)
            if own:
                writing.commit(own.unit)
            num_units += len(units)
            progress.add(counts)
        with progress.waiting("write"):
            writing.drain()
    world.barrier()
    return num_units


def _next_units(run: Run, inbox: Inbox, progress: Progress) -> list[cache.CommitRecord]:
    """Next units, chosen by the main process for all ranks: at most one per rank, none if all are scored."""
    answer: list[cache.CommitRecord] | str = []
    if run.world.is_main:
        with progress.waiting("rows"):
            answer = inbox.wait(run.world.size)
    answer = run.world.gather(answer)[0]
    if isinstance(answer, str):
        raise UserError(answer)
    inbox.taken.update(record.name for record in answer)
    return answer


@dataclass(frozen=True)
class Found:
    """Progress by policy: rows `planned`, and rows `there`, scored or not.

    If no policy has written yet, `planned` counts the first refresh wanted.
    """

    planned: dict[PolicyKey, int]
    there: dict[PolicyKey, int]
    num_unscored: int  # planned rows missing from the main cache
    ready: list[cache.CommitRecord]

    @property
    def num_missing(self) -> int:
        """Planned rows not generated yet."""
        return sum(max(0, planned - self.there.get(policy, 0)) for policy, planned in self.planned.items())

    def __str__(self) -> str:
        parts = [
            f"refresh {refresh} by policy {policy}: {count}"
            for (refresh, policy), count in self.there.items()
        ]
        return f"of {sum(self.planned.values())} planned rollouts there are {' and '.join(parts) or 'none'}"


class Inbox:
    """Unscored units of a run's refreshes from `first_refresh` on, as they are committed.

    Raises CacheError if either cache was written with another configuration.
    """

    def __init__(self, run: Run, vocabulary: Vocabulary, first_refresh: int) -> None:
        self._run, self._first, self._vocabulary = run, first_refresh, vocabulary
        self._snapshots: dict[str, cache.Snapshot] = {}
        self.taken: set[str] = set()  # commit records that this world has scored or is scoring

    def wait(self, most: int) -> list[cache.CommitRecord] | str:
        """At most `most` ready units, none if all planned rows are scored, or an error message on timeout."""
        found = wait_for(self._next, on_wait=self._tell, patience=PATIENCE)
        if found is not None:
            return found.ready[:most]
        return (
            f"no unit to score appeared at {self._run.config.unscored_root} for {PATIENCE / 60:g} minutes:"
            f" {self.look()}. Is stages.rollout --role generate running with the same configuration? What is"
            " scored is kept."
        )

    def _next(self) -> Found | None:
        """Progress, once there is a unit to score or nothing left to wait for; else None."""
        found = self.look()
        return found if found.ready or not found.num_missing else None

    def _tell(self) -> None:
        root = self._run.config.unscored_root
        self._run.metrics.say(f"waiting for rollouts at {root}: {self.look()}")

    def look(self) -> Found:
        """Current contents of the two caches."""
        config = self._run.config
        unscored, scored = self._rows(config.unscored_root), self._rows(config.cache_root)
        policies = sorted(unscored or scored)  # with no unscored rows, all work may be done
        planned = {policy: len(rollouts_of(config, policy[0])) for policy in policies or [(self._first, "")]}
        there = {policy: len(unscored[policy].keys() | scored[policy].keys()) for policy in policies}
        num_unscored = sum(max(0, count - len(scored[policy])) for policy, count in planned.items())
        waiting = {
            record.name: record
            for policy in policies
            for row_id, record in unscored[policy].items()
            if row_id not in scored[policy] and record.name not in self.taken
        }
        return Found(planned, there, num_unscored, list(waiting.values()))

    def read(self, record: cache.CommitRecord) -> list[cache.Record]:
        """The rows of a unit in commit order."""
        root = self._run.config.unscored_root

        def look() -> cache.Snapshot | None:
            snapshot = self._open(root)
            names = {known.name for known in snapshot.commit_records()} if snapshot else set()
            return snapshot if record.name in names else None

        snapshot = wait_for(look, patience=PATIENCE)
        if snapshot is None:  # shared file systems may show a file to one node before another
            raise UserError(
                f"{root} does not show commits/{record.name} on this machine; is it the same folder?"
            )
        return [snapshot[snapshot.position(row_id)] for row_id in record.row_ids]

    def _rows(self, root: str) -> dict[PolicyKey, dict[str, cache.CommitRecord]]:
        """Row ids of the run in the cache at `root`, by policy, each with its commit record."""
        found: dict[PolicyKey, dict[str, cache.CommitRecord]] = defaultdict(dict)
        snapshot = self._open(root)
        for record in snapshot.commit_records() if snapshot else []:
            own = {
                number: (refresh, policy)
                for number, (run_id, _, policy, refresh) in enumerate(record.policies)
                if run_id == self._run.run_id and refresh >= self._first
            }
            for row_id, number in zip(record.row_ids, record.policy_of_row, strict=True) if own else []:
                if number in own:
                    found[own[number]].setdefault(row_id, record)
        return found

    def _open(self, root: str) -> cache.Snapshot | None:
        """Current snapshot; None if nothing has been written yet."""
        if root in self._snapshots:
            self._snapshots[root] = self._snapshots[root].refresh()
        elif cache.exists(root):
            self._snapshots[root] = cache.open(root)
            self._snapshots[root].fingerprint.compare(self._wanted(root), root)
        return self._snapshots.get(root)

    def _wanted(self, root: str) -> cache.Fingerprint:
        config = self._run.config
        if root == config.unscored_root:
            return setup.unscored_fingerprint(config, self._vocabulary)
        return setup.fingerprint(config, self._vocabulary, config.teacher_signal)
