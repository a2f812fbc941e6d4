"""Selects the rows that `dualkl cache view` and `show` print.

Row numbers are in row-id order, as in `Snapshot.__getitem__`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.reader import Snapshot
from cache.schema import CacheError

_MOST_NAMED = 5
_SHORTEST_ID = 8


def by_index(snapshot: Snapshot, index: int) -> list[int]:
    """Return row `index`, counted from the end if negative; CacheError if there is none."""
    if not -len(snapshot) <= index < len(snapshot):
        raise CacheError(f"{snapshot.root} has {len(snapshot)} committed rows; there is no row {index}.")
    return [index % len(snapshot)]


def page(snapshot: Snapshot, first: int, count: int) -> list[int]:
    """Return up to `count` rows starting at `first` (negative: from the end); CacheError if out of range."""
    _check_count(snapshot, "--count", count)
    (first,) = by_index(snapshot, first)
    return list(range(first, min(first + count, len(snapshot))))


def by_row(snapshot: Snapshot, beginning: str) -> list[int]:
    """Return the row whose id has this prefix; CacheError unless there is exactly one."""
    found = [i for i, row_id in enumerate(snapshot.row_ids) if row_id.startswith(beginning)]
    if len(found) != 1:
        raise CacheError(
            f"{snapshot.root}: {len(found)} row ids begin with {beginning!r}; give the beginning of one."
        )
    return found


def by_prompt(snapshot: Snapshot, beginning: str) -> list[int]:
    """Return all rows of one prompt, by refresh, then row id. An exact prompt id wins over a prefix.

    CacheError if no prompt or several prompts match.
    """
    prompt_ids = snapshot.index["prompt_id"].to_pylist()
    found = sorted({prompt_id for prompt_id in prompt_ids if prompt_id.startswith(beginning)})
    if not found:
        raise CacheError(f"{snapshot.root}: no prompt id begins with {beginning!r}.")
    if beginning not in found and len(found) > 1:
        named = ", ".join(found[:_MOST_NAMED]) + (", …" if len(found) > _MOST_NAMED else "")
        raise CacheError(
            f"{snapshot.root}: {len(found)} prompt ids begin with {beginning!r} ({named}); give one."
        )
    prompt = beginning if beginning in found else found[0]
    refreshes = snapshot.index["refresh_index"].to_pylist()
    return sorted((i for i, own in enumerate(prompt_ids) if own == prompt), key=lambda i: refreshes[i])


def longest(snapshot: Snapshot, count: int) -> list[int]:
    """Return the `count` rows with the most scored tokens, longest first, ties by row id; reads no shard."""
    _check_count(snapshot, "--longest", count)
    return _largest(snapshot.index["num_completion_tokens"].to_numpy(), count)


def worst(snapshot: Snapshot, count: int) -> list[int]:
    """Return the `count` rows with the largest sum of behaviour − teacher logprob, largest first.

    These are rollouts that the student likes and the teacher does not. Ties by row id. Reads two plain
    columns of all rows into memory: 8 bytes per scored token, twice that while sorting. CacheError if the
    rows are not scored.
    """
    _check_count(snapshot, "--worst", count)
    if snapshot.fingerprint.rules.kind == "none":
        raise CacheError(
            f"{snapshot.root} is not scored (signal kind none): it has no teacher logprobs for --worst."
        )
    table = snapshot.to_table(["behaviour_logprobs", "teacher_logprobs"])
    return _largest(_row_sums(table["behaviour_logprobs"]) - _row_sums(table["teacher_logprobs"]), count)


def shortest_ids(snapshot: Snapshot, positions: Sequence[int]) -> list[str]:
    """Return id prefixes of one common length for `show --row`, long enough to be unique."""
    ids = snapshot.row_ids
    pairs = [(i, j) for i in positions for j in (i - 1, i + 1) if 0 <= j < len(ids)]  # ids are sorted
    length = max([_SHORTEST_ID, *(_num_shared(ids[i], ids[j]) + 1 for i, j in pairs)])
    return [ids[i][:length] for i in positions]


def _num_shared(left: str, right: str) -> int:
    """Return the length of the common prefix of two different ids of equal length."""
    return next(n for n, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)


def _check_count(snapshot: Snapshot, option: str, count: int) -> None:
    if count < 1:
        raise CacheError(f"{option} is {count}; expected a number of rows, at least 1.")
    if not len(snapshot):
        raise CacheError(f"{snapshot.root} has no committed rows yet.")


def _largest(values: npt.NDArray[np.number], count: int) -> list[int]:
    order: list[int] = np.argsort(-values, kind="stable")[:count].tolist()
    return order


def _row_sums(column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Return the sum of each row's list of floats, in float64; no list is empty."""
    sums = [
        np.add.reduceat(
            chunk.flatten().to_numpy(), np.append(0, np.cumsum(chunk.value_lengths())[:-1]), dtype=np.float64
        )
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(sums)
