"""Rows that other processes write: what a run's caches hold of them, and waiting for more.

Processes meet on disk and nowhere else. A generator commits rows with signal `none` to a cache beside the
run's own (`Config.unscored_root`). Scorers read whole units of it and commit the same rows under the same
unit names to the run's cache, from which training takes them. Each can be stopped and started at any time.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import cache
from stages.loops import setup
from stages.loops.collect import Round
from stages.loops.progress import Progress
from stages.loops.setup import Vocabulary
from stages.runtime.checkpoint import Position
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.split import rollouts_of

T = TypeVar("T")
POLL_SECONDS = 0.5
PATIENCE = 3600.0  # seconds that a scorer waits for a unit
PolicyKey = tuple[int, str]  # refresh index and policy hash; one plan each


def wait_for(
    look: Callable[[], T | None],
    *,
    on_wait: Callable[[], None] | None = None,
    patience: float = math.inf,
) -> T | None:
    """Call `look` until it returns something other than None, and return that; None after `patience` seconds.

    `on_wait` is called once, before the first pause. Collective if `look` is; it must then return the same on
    all ranks.
    """
    began, waits = time.monotonic(), False
    while (found := look()) is None:
        if time.monotonic() - began > patience:
            return None
        if on_wait is not None and not waits:
            on_wait()
        waits = True
        time.sleep(POLL_SECONDS)
    return found


class WrittenRows:
    """A run's committed rows in a cache that other processes write to."""

    def __init__(self, root: str, run_id: str, fingerprint: cache.Fingerprint | None = None) -> None:
        """`fingerprint`: the cache's must match it, else `CacheError` when the cache is first opened."""
        self.root, self._run_id, self._fingerprint = root, run_id, fingerprint
        self._snapshot: cache.Snapshot | None = None

    def snapshot(self) -> cache.Snapshot | None:
        """The current one; None if nothing has been written yet."""
        if self._snapshot is not None:
            self._snapshot = self._snapshot.refresh()
        elif cache.exists(self.root):
            self._snapshot = cache.open(self.root)
            if self._fingerprint is not None:
                self._snapshot.fingerprint.compare(self._fingerprint, self.root)
        return self._snapshot

    def by_policy(self, first_refresh: int) -> dict[PolicyKey, dict[str, cache.CommitRecord]]:
        """Row ids of refreshes from `first_refresh` on, by policy, each with its commit record."""
        found: dict[PolicyKey, dict[str, cache.CommitRecord]] = defaultdict(dict)
        snapshot = self.snapshot()
        for record in snapshot.commit_records() if snapshot else []:
            own = {
                number: (refresh, policy)
                for number, (run_id, _, policy, refresh) in enumerate(record.policies)
                if run_id == self._run_id and refresh >= first_refresh
            }
            for row_id, number in zip(record.row_ids, record.policy_of_row, strict=True) if own else []:
                if number in own:
                    found[own[number]].setdefault(row_id, record)
        return found


class Arrivals:
    """Refreshes of a training run as they become complete in its cache."""

    def __init__(self, run: Run) -> None:
        self._run, self._written = run, WrittenRows(run.config.cache_root, run.run_id)

    def bring_newer(self, position: Position) -> bool:
        """Whether all rows of a newer refresh have arrived (collective)."""
        return position.newest > position.refresh_index and self.newest(position) > position.refresh_index

    def newest(self, position: Position) -> int:
        """Newest fully committed refresh, no older than the one in use; -1 if there is none (collective)."""
        return int(self._run.world.gather(self._newest(position) if self._run.world.is_main else -1)[0])

    def _newest(self, position: Position) -> int:
        in_use = position.refresh_index
        complete = [in_use] if in_use else []  # checked when training switched to it
        written = self._written.by_policy(in_use)
        for index in range(in_use, position.newest + 1):
            wanted = position.policies.get(index) if index else None
            rows = {
                row
                for (refresh, policy), own in written.items()
                if refresh == index and wanted in (None, policy)
                for row in own
            }
            if len(rows) >= len(rollouts_of(self._run.config, index)):
                complete.append(index)
        return max(complete, default=-1)


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
            f"{count} of refresh {index} by policy {policy}" for (index, policy), count in self.there.items()
        ]
        found = f"found {' and '.join(parts)}" if parts else "found none"
        return f"{found} of {sum(self.planned.values())} planned"


class Inbox:
    """Unscored units of a run's refreshes from `first_refresh` on, as they are committed.

    Raises CacheError if either cache was written with another configuration.
    """

    def __init__(self, run: Run, vocabulary: Vocabulary, first_refresh: int) -> None:
        config = run.config
        self._run, self._first = run, first_refresh
        self._unscored = WrittenRows(
            config.unscored_root, run.run_id, setup.unscored_fingerprint(config, vocabulary)
        )
        self._scored = WrittenRows(
            config.cache_root, run.run_id, setup.fingerprint(config, vocabulary, config.teacher_signal)
        )
        self._taken: set[str] = set()  # commit records that this world has scored or is scoring

    def look(self) -> Found:
        """Current contents of the two caches."""
        unscored, scored = self._unscored.by_policy(self._first), self._scored.by_policy(self._first)
        policies = sorted(unscored or scored)  # with no unscored rows, all work may be done
        planned = {
            policy: len(rollouts_of(self._run.config, policy[0]))
            for policy in policies or [(self._first, "")]
        }
        there = {policy: len(unscored[policy].keys() | scored[policy].keys()) for policy in policies}
        num_unscored = sum(max(0, count - len(scored[policy])) for policy, count in planned.items())
        waiting = {
            record.name: record
            for policy in policies
            for row_id, record in unscored[policy].items()
            if row_id not in scored[policy] and record.name not in self._taken
        }
        return Found(planned, there, num_unscored, list(waiting.values()))

    def rounds(self, progress: Progress) -> Iterator[Round]:
        """One unit per process and round, until all planned rows of every policy there are scored.

        Collective. Raises UserError if no unit appears for `PATIENCE` seconds.
        """
        world = self._run.world
        while units := self._next(progress):
            own = units[world.rank] if world.rank < len(units) else None
            yield Round(own.unit if own else "", self._read(own) if own else [], len(units))

    def _next(self, progress: Progress) -> list[cache.CommitRecord]:
        """Next units, at most one per rank, chosen by the main process; none if all are scored."""
        answer: list[cache.CommitRecord] | str = []
        if self._run.world.is_main:
            with progress.waiting("rows"):
                answer = self._wait()
        answer = self._run.world.gather(answer)[0]
        if isinstance(answer, str):
            raise UserError(answer)
        self._taken.update(record.name for record in answer)
        return answer

    def _wait(self) -> list[cache.CommitRecord] | str:
        """Units that are ready, none if all planned rows are scored, or an error message after `PATIENCE`."""
        root = self._unscored.root

        def look() -> Found | None:
            found = self.look()
            return found if found.ready or not found.num_missing else None

        def tell() -> None:
            self._run.metrics.say(f"waiting for rollouts in {root}: {self.look()}")

        found = wait_for(look, on_wait=tell, patience=PATIENCE)
        if found is not None:
            return found.ready[: self._run.world.size]
        return (
            f"no rollouts to score appeared in {root} for {PATIENCE / 60:g} minutes ({self.look()}). Start"
            " `dualkl rollout --role generate` with the same configuration, then this command again; what is"
            " scored is kept."
        )

    def _read(self, record: cache.CommitRecord) -> list[cache.Record]:
        """The rows of a unit in commit order."""

        def look() -> cache.Snapshot | None:
            snapshot = self._unscored.snapshot()
            names = {known.name for known in snapshot.commit_records()} if snapshot else set()
            return snapshot if record.name in names else None

        snapshot = wait_for(look, patience=PATIENCE)
        if snapshot is None:  # shared file systems may show a file to one node before another
            raise UserError(
                f"{self._unscored.root} does not show commits/{record.name} on this machine after"
                f" {PATIENCE / 60:g} minutes; all processes must see the same folder."
            )
        return [snapshot[snapshot.position(row_id)] for row_id in record.row_ids]
