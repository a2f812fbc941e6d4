"""Which rows of a cache a page shows: all, or some of each kind that a reader looks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import cache
from cache.reader import Place

SEED = 20_260_101
SCANNED_BYTES = 2**29  # of shards, read to find the worst and the cut rows of a large cache
SHARES = {"traced in training": 0.3, "least likely to the teacher": 0.2, "longest": 0.1, "cut": 0.1}
"""Shares of the rows by kind; the others are drawn at random, evenly over the refreshes."""
Say = Callable[[str], None]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Scan:
    """Figures of the rows that were read, by their numbers in the snapshot.

    `gaps`: sums over tokens of behaviour - teacher logprob, nats; NaN in unscored rows.
    """

    positions: Array
    gaps: Array
    is_cut: Array
    lengths: Array
    refreshes: Array

    def __len__(self) -> int:
        return len(self.positions)


def scan(snapshot: cache.Snapshot, say: Say, most_bytes: float = SCANNED_BYTES) -> Scan:
    """Read the plain columns of all rows, or of a random part of a larger cache; `say` reports damage."""
    places = snapshot.places()
    total = sum(place.shard.batches[place.batch].num_bytes for place in places)
    order = np.random.default_rng(SEED).permutation(len(places)) if total > most_bytes else range(len(places))
    parts, left = list[tuple[Array, ...]](), most_bytes
    for place in (places[i] for i in order):
        left -= place.shard.batches[place.batch].num_bytes
        if left < 0 and parts:
            break
        try:
            parts.append(_figures(snapshot, place))
        except cache.CacheError as error:
            say(f"{error} The page leaves its rows out.")
    if not parts:
        empty = np.zeros(0, np.int64)
        return Scan(empty, empty.astype(float), empty.astype(bool), empty, empty)
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    by_row = np.argsort(joined[0], kind="stable")
    return Scan(*(column[by_row] for column in joined))


def _figures(snapshot: cache.Snapshot, place: Place) -> tuple[Array, ...]:
    names = ["row_id", "finish_reason", "refresh_index", "behaviour_logprobs", "teacher_logprobs"]
    table = snapshot.read_columns(place, names).combine_chunks()
    positions = np.searchsorted(np.array(snapshot.row_ids), np.array(table["row_id"].to_pylist()))
    behaviour, teacher = (_sums(table[name]) for name in names[3:])
    lengths = pc.list_value_length(table["behaviour_logprobs"]).to_numpy()
    is_cut = pc.equal(table["finish_reason"], "length").to_numpy()
    return positions, behaviour - teacher, is_cut, lengths, table["refresh_index"].to_numpy()


def _sums(column: pa.ChunkedArray) -> Array:
    """Sum of each row's numbers, float64; NaN for rows without any."""
    if column.null_count or not len(column):
        return np.full(len(column), np.nan)
    starts = np.cumsum(np.append(0, pc.list_value_length(column).to_numpy()))[:-1]
    numbers = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
    sums: Array = np.add.reduceat(numbers.astype(np.float64), starts)
    return sums


def choose(found: Scan, count: int, traced: Sequence[int]) -> tuple[list[int], str]:
    """Row numbers, and the sentence that says how they were drawn.

    At most `count`; any beginning of the list has rows of each kind. `traced`: rows that training traced.
    """
    if len(found) <= count:
        return found.positions.tolist(), ""
    random = np.random.default_rng(SEED)
    kinds = {
        "traced in training": random.permutation(np.array(traced, np.int64)).tolist(),
        "least likely to the teacher": _largest(found, found.gaps),
        "longest": _largest(found, found.lengths.astype(float)),
        "cut": random.permutation(found.positions[found.is_cut]).tolist(),
    }
    chosen: dict[str, list[int]] = {}
    taken: set[int] = set()
    for kind, rows in kinds.items():
        own = [row for row in rows if row not in taken][: round(SHARES[kind] * count)]
        chosen[kind] = own
        taken |= {*own}
    rest = [row for row in _over_refreshes(found, random) if row not in taken]
    chosen["at random over the refreshes"] = rest[: count - len(taken)]
    mixed = [
        row for rows in zip_longest(*map(_spread(count), chosen.values())) for row in rows if row is not None
    ]
    parts = ", ".join(f"{len(rows)} {kind}" for kind, rows in chosen.items() if rows)
    return mixed, parts


def _spread(count: int) -> Callable[[list[int]], list[int | None]]:
    """Places a kind's rows evenly over `count` turns, so that any beginning has its share of them."""

    def spread(rows: list[int]) -> list[int | None]:
        turns: list[int | None] = [None] * count
        for number, row in enumerate(rows):
            turns[number * count // len(rows)] = row
        return turns

    return spread


def _largest(found: Scan, values: Array) -> list[int]:
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    largest: list[int] = found.positions[order].tolist()
    return [] if np.isnan(values).all() else largest


def _over_refreshes(found: Scan, random: np.random.Generator) -> list[int]:
    """All rows in random order, one of each refresh in turn."""
    order = random.permutation(len(found))
    queues = [
        found.positions[order][found.refreshes[order] == own].tolist() for own in np.unique(found.refreshes)
    ]
    return [row for rows in zip_longest(*queues) for row in rows if row is not None]
