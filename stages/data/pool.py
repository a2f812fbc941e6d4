"""The rows that a student may be trained on: those of the run's own cache, and of further ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

import cache


@dataclass(frozen=True)
class Pool:
    """The rows eligible for training.

    Attributes:
        row_ids: sorted.
        version: index of the newest refresh in the pool.
        ages: each row's staleness in optimizer steps; -1 for rows of other runs.
        lengths: prompt and completion tokens of each row.
        opened_at: the optimizer step at which `ages` were computed.
        extras: rows of further caches, under keys `NUMBER:ROW_ID`; the dictionaries include them.
        leaders: for rows that are trained on together because they have one prompt: the first of them.
    """

    row_ids: list[str]
    version: int
    ages: dict[str, int]
    lengths: dict[str, tuple[int, int]]
    opened_at: int = 0
    extras: tuple[Extra, ...] = ()
    leaders: dict[str, str] = field(default_factory=dict)

    def num_shared(self, before: str, row_id: str) -> int:
        """Prompt tokens of a row that the row before it has too, because they are in one group."""
        is_shared = before in self.leaders and self.leaders[before] == self.leaders.get(row_id)
        return self.lengths[row_id][0] if is_shared else 0

    @cached_property
    def groups(self) -> list[RowGroups]:
        """The rows of each cache, the main one first, by group."""
        return [_grouped(keys, self.leaders) for keys in (self.row_ids, *(own.keys for own in self.extras))]

    @property
    def num_off_policy(self) -> int:
        return sum(age < 0 for age in self.ages.values())

    @property
    def num_own(self) -> int:
        return sum(self.ages[row_id] >= 0 for row_id in self.row_ids)

    def with_extra(self, found: Pool, snapshot: cache.Snapshot, weight: float) -> Pool:
        """Add another cache's rows; `weight` rows of it are drawn for each row of the main cache."""
        prefix = f"{len(self.extras)}:"
        keys = [prefix + row_id for row_id in found.row_ids]
        return replace(
            self,
            extras=(*self.extras, Extra(keys, weight, snapshot)),
            ages=self.ages
            | {key: found.ages[row_id] for key, row_id in zip(keys, found.row_ids, strict=True)},
            lengths=self.lengths
            | {key: found.lengths[row_id] for key, row_id in zip(keys, found.row_ids, strict=True)},
            leaders=self.leaders
            | {prefix + row_id: prefix + leader for row_id, leader in found.leaders.items()},
        )

    def locate(self, key: str, own: cache.Snapshot) -> tuple[cache.Snapshot, str]:
        """Return the snapshot that holds the row, and the row's id there; `own` is the main cache."""
        number, found, row_id = key.rpartition(":")
        return (self.extras[int(number)].snapshot if found else own), row_id


class RowGroups(NamedTuple):
    """Row keys, group by group; where each group begins, and its number of rows."""

    keys: list[str]
    firsts: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Extra:
    """The rows of another cache in a pool; `weight` of them are drawn per row of the main cache."""

    keys: list[str]
    weight: float
    snapshot: cache.Snapshot


def live_pool(
    snapshot: cache.Snapshot,
    run_id: str,
    version: int,
    at_step: int,
    max_age: int,
    policies: dict[int, str],
    group_size: int = 1,
) -> Pool:
    """Return the rows eligible for training at step `at_step`.

    These are this run's rows of refresh `version`, its earlier ones up to `max_age` steps old, and all rows
    of other runs.

    `policies`: the policy hash of each refresh of this run. Rows written by another policy are excluded,
    except in refresh 0, where they count as rows of another run.
    `group_size`: at most so many rows of one prompt, run and refresh are trained on together.
    """
    index = snapshot.index.drop_columns(["unit"]).to_pylist()
    ages: dict[str, int] = {}
    for row in index:
        if row["run_id"] != run_id:
            ages[row["row_id"]] = -1
        elif row["policy_hash"] != policies.get(row["refresh_index"], row["policy_hash"]):
            if row["refresh_index"] == version == 0:
                ages[row["row_id"]] = -1
            continue  # written by rolled-back weights
        elif row["refresh_index"] == version or (
            row["refresh_index"] < version and at_step - row["policy_step"] <= max_age
        ):
            ages[row["row_id"]] = at_step - row["policy_step"]
    lengths = {
        row["row_id"]: (row["num_prompt_tokens"], row["num_completion_tokens"])
        for row in index
        if row["row_id"] in ages
    }
    leaders = _leaders([row for row in index if row["row_id"] in ages], group_size)
    return Pool(sorted(ages), version, ages, lengths, at_step, leaders=leaders)


def _grouped(keys: list[str], leaders: dict[str, str]) -> RowGroups:
    """Groups in the order of their first rows; without `leaders`, a row is a group."""
    if not leaders:
        return RowGroups(keys, np.arange(len(keys)), np.ones(len(keys), int))
    keys = sorted(keys, key=leaders.__getitem__)  # stable: the rows of a group keep their order
    _, firsts, sizes = np.unique([leaders[key] for key in keys], return_index=True, return_counts=True)
    return RowGroups(keys, firsts, sizes)


def _leaders(rows: list[dict[str, Any]], group_size: int) -> dict[str, str]:
    """`Pool.leaders` for rows sorted by id; empty for groups of one row."""
    if group_size == 1:
        return {}
    of_prompt: dict[tuple[str, int, str], list[str]] = {}
    for row in rows:
        of_prompt.setdefault((row["run_id"], row["refresh_index"], row["prompt_id"]), []).append(
            row["row_id"]
        )
    return {
        row_id: row_ids[place // group_size * group_size]
        for row_ids in of_prompt.values()
        for place, row_id in enumerate(row_ids)
    }
