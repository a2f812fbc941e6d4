"""Micro-batches and the tensors of a forward."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import cache
from dualkl import TopKTeacher
from stages.data.batches import map_tensors, micro_batches, num_tokens, on_device, to_tensors
from stages.data.signals import teacher_of
from stages.runtime.errors import UserError
from tests.support.training_rows import V, make_record, topk

CPU = torch.device("cpu")


def rows_of(lengths: list[int]) -> list[cache.Record]:
    return [make_record(i, prompt=1, completion=n - 1) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(None, None), (3, None), (None, 24), (2, 24), (1, 1)])
def test_micro_batches_keep_the_order_and_their_caps(max_rows: int | None, max_tokens: int | None) -> None:
    records = rows_of([5, 9, 3, 12, 4, 4, 4, 20, 2])
    batches = list(micro_batches(records, num_tokens, max_rows, max_tokens))
    assert [r.row_id for batch in batches for r in batch] == [r.row_id for r in records]
    for batch in batches:
        widest = max(len(r.prompt_ids) + len(r.completion_ids) for r in batch)
        assert max_rows is None or len(batch) <= max_rows
        assert max_tokens is None or widest * len(batch) <= max_tokens or len(batch) == 1


def test_micro_batches_are_as_large_as_their_caps_allow() -> None:
    sizes = [len(batch) for batch in micro_batches(rows_of([6] * 9), num_tokens, None, 24)]
    assert sizes == [4, 4, 1]
    assert [len(batch) for batch in micro_batches(rows_of([6] * 9), num_tokens, 5, None)] == [5, 4]


def test_packed_micro_batches_count_no_padding() -> None:
    lengths = [5, 9, 3, 12, 4, 4, 4, 20, 2]
    batches = list(micro_batches(rows_of(lengths), num_tokens, None, 24, packed=True))
    assert [[num_tokens(r) for r in batch] for batch in batches] == [[5, 9, 3], [12, 4, 4, 4], [20, 2]]


def cut(rows: list[tuple[str, int, int]], max_rows: int | None, max_tokens: int | None) -> list[list[str]]:
    """Rows (prompt, its tokens, tokens of the completion) in forwards, each named by its prompt."""
    batches = micro_batches(
        rows,
        lambda row: row[1] + row[2],
        max_rows,
        max_tokens,
        packed=True,
        shared=lambda before, row: row[1] if before[0] == row[0] else 0,
    )
    return [[row[0] for row in batch] for batch in batches]


def test_a_shared_prompt_counts_once_and_its_rows_stay_together() -> None:
    rows = [(name, 10, 5) for name in "aaabbbcc"]
    assert cut(rows, None, 50) == [["a", "a", "a", "b", "b", "b"], ["c", "c"]]
    assert cut(rows, None, 49) == [["a", "a", "a"], ["b", "b", "b", "c", "c"]]
    assert cut(rows, None, 20) == [["a", "a"], ["a"], ["b", "b"], ["b"], ["c", "c"]]
    assert cut(rows, 4, None) == [["a", "a", "a"], ["b", "b", "b"], ["c", "c"]]


def test_copies_of_keys_are_limited_too() -> None:
    rows = [("a", 100, 1)] * 12
    assert cut(rows, None, 112) == [["a"] * 4, ["a"] * 4, ["a"] * 4]


def test_no_rows_make_no_micro_batches() -> None:
    assert list(micro_batches([], num_tokens, 4, 10)) == []


def test_rows_that_are_not_scored_are_a_sentence() -> None:
    with pytest.raises(UserError, match="not scored yet"):
        teacher_of([make_record(0)], None, V)
    with pytest.raises(UserError, match="not scored yet"):
        to_tensors(
            [replace(make_record(0), teacher_logprobs=None, teacher_entropy=None)], 1.0, None, 0, CPU, V
        )


def test_all_parts_of_a_micro_batch_speak_of_the_same_tokens() -> None:
    records = [make_record(i, prompt=2 + i, completion=4 - i, signal=topk(4 - i, 5, i)) for i in range(3)]
    batch = to_tensors(records, 0.25, None, 0, CPU, V)
    num_tokens = 4 + 3 + 2
    assert batch.aligned.targets.tolist() == [int(y) for r in records for y in r.completion_ids]
    assert torch.equal(batch.sampled.ids, batch.aligned.targets)
    for name in ("teacher_logprobs", "behaviour_logprobs"):
        assert np.array_equal(
            getattr(batch.sampled, name).numpy(), np.concatenate([getattr(r, name) for r in records])
        )
    assert isinstance(batch.teacher, TopKTeacher)
    assert len(batch.teacher.ids) == num_tokens
    assert torch.equal(batch.weights, torch.full((num_tokens,), 0.25))


@pytest.mark.parametrize("packed", [False, True])
def test_moving_a_micro_batch_keeps_every_tensor(packed: bool) -> None:
    records = [make_record(i, prompt=2 + i, completion=4 - i, signal=topk(4 - i, 5, i)) for i in range(3)]
    batch = to_tensors(records, 0.25, None, 0, CPU, V, packed=packed)
    moved = on_device(batch, torch.device("meta"))
    shapes: list[list[tuple[int, ...]]] = [[], []]
    for seen, value in zip(shapes, (batch, moved), strict=True):

        def note(tensor: torch.Tensor, seen: list[tuple[int, ...]] = seen) -> torch.Tensor:
            seen.append(tuple(tensor.shape))
            return tensor

        map_tensors(note, value)
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == (13 if packed else 12)
    assert (
        moved.weights.device.type
        == moved.teacher.ids.device.type
        == moved.aligned.scored.device.type
        == "meta"
    )
