"""Track which refreshes, written by another process, are complete in the cache."""

from __future__ import annotations

import cache
from stages.runtime.checkpoint import Position
from stages.runtime.run import Run
from stages.runtime.split import rollouts_of


class Arrivals:
    """Watches the cache for rows written elsewhere."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._snapshot = cache.open(run.config.cache_root) if run.world.is_main else None

    def bring_newer(self, position: Position) -> bool:
        """Whether all rows of a newer refresh have arrived (collective)."""
        return position.newest > position.refresh_index and self.newest(position) > position.refresh_index

    def newest(self, position: Position) -> int:
        """Newest fully committed refresh, no older than the one in use; -1 if there is none (collective)."""
        found = -1
        if self._snapshot is not None:
            self._snapshot = self._snapshot.refresh()
            indices = range(position.refresh_index, position.newest + 1)
            found = max((index for index in indices if self._is_complete(position, index)), default=-1)
        return int(self._run.world.gather(found)[0])

    def _is_complete(self, position: Position, index: int) -> bool:
        assert self._snapshot is not None
        if index and index == position.refresh_index:
            return True  # checked when training switched to it
        wanted, rows = position.policies.get(index) if index else None, set()
        for record in self._snapshot.commit_records():
            right = [
                run_id == self._run.run_id and refresh == index and wanted in (None, policy)
                for run_id, _, policy, refresh in record.policies
            ]
            if any(right):
                rows |= {
                    row for row, of in zip(record.row_ids, record.policy_of_row, strict=True) if right[of]
                }
        return len(rows) >= len(rollouts_of(self._run.config, index))
