"""Which rows `python -m cache view` and `show` print: row numbers in row-id order, as `Snapshot.__getitem__` counts them."""

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
    """Row number `index`, from the end if negative; CacheError if there is none."""
    if not -len(snapshot) <= index < len(snapshot):
        raise CacheError(f"{snapshot.root} has {len(snapshot)} committed rows; there is no row {index}.")
    return [index % len(snapshot)]


def page(snapshot: Snapshot, first: int, count: int) -> list[int]:
    """At most `count` rows from number `first` on, which counts from the end if negative; CacheError if there is no such row."""
    _check_count(snapshot, "--count", count)
    (first,) = by_index(snapshot, first)
    return list(range(first, min(first + count, len(snapshot))))


def by_row(snapshot: Snapshot, beginning: str) -> list[int]:
    """The row whose id begins so; CacheError unless it is exactly one."""
    found = [i for i, row_id in enumerate(snapshot.row_ids) if row_id.startswith(beginning)]
    if len(found) != 1:
        raise CacheError(
            f"{snapshot.root}: {len(found)} rows begin with {beginning!r}; give the beginning of one row id."
        )
    return found


def by_prompt(snapshot: Snapshot, beginning: str) -> list[int]:
    """All rows of one prompt, by refresh, then row id: of the prompt with this id, else the one that begins so.

    CacheError if no prompt does, or several do.
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
    """The `count` rows of the most scored tokens, the longest first, ties by row id; reads no shard."""
    _check_count(snapshot, "--longest", count)
    return _largest(snapshot.index["num_completion_tokens"].to_numpy(), count)


def worst(snapshot: Snapshot, count: int) -> list[int]:
    """The `count` rows of the largest sum over tokens of behaviour − teacher logprob, the largest first.

    Ties by row id. Text that the student likes and the teacher does not. Reads two plain columns of all rows into
    memory: 8 bytes a scored token, twice while they are put in order. CacheError if the rows are not scored.
    """
    _check_count(snapshot, "--worst", count)
    if snapshot.fingerprint.rules.kind == "none":
        raise CacheError(
            f"{snapshot.root} is not scored (signal kind none): it has no teacher logprobs for --worst."
        )
    table = snapshot.to_table(["behaviour_logprobs", "teacher_logprobs"])
    return _largest(_row_sums(table["behaviour_logprobs"]) - _row_sums(table["teacher_logprobs"]), count)


def shortest_ids(snapshot: Snapshot, positions: Sequence[int]) -> list[str]:
    """Beginnings of these rows' ids, all of one length, that `show --row` takes: long enough to name one row each."""
    ids = snapshot.row_ids
    pairs = [(i, j) for i in positions for j in (i - 1, i + 1) if 0 <= j < len(ids)]  # ids are sorted
    length = max([_SHORTEST_ID, *(_num_shared(ids[i], ids[j]) + 1 for i, j in pairs)])
    return [ids[i][:length] for i in positions]


def _num_shared(left: str, right: str) -> int:
    """How many characters two different ids of one length begin with alike."""
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
    """The sum of each row's list of floats, in float64; no list is empty."""
    sums = [
        np.add.reduceat(
            chunk.flatten().to_numpy(), np.append(0, np.cumsum(chunk.value_lengths())[:-1]), dtype=np.float64
        )
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(sums)
