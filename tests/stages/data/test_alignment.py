"""Which position predicts which token."""

import numpy as np
import pytest
import torch

from stages.data.alignment import MOST_PADDING, Packing, align, at_scored

CPU = torch.device("cpu")


def loop_positions(prompts: list[list[int]], completions: list[list[int]]) -> list[tuple[int, int, int]]:
    """(row, position, token) of every scored position, position by position: the state at i predicts the
    token at i + 1.
    """
    found = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        sequence = prompt + completion
        found += [(row, i, sequence[i + 1]) for i in range(len(sequence) - 1) if i + 1 >= len(prompt)]
    return found


def check(prompts: list[list[int]], completions: list[list[int]]) -> None:
    aligned = align([np.array(p) for p in prompts], [np.array(c) for c in completions], 0, CPU)
    width = aligned.input_ids.shape[1]
    scored = [
        (int(s) // width, int(s) % width, int(y))
        for s, y in zip(aligned.scored, aligned.targets, strict=True)
    ]
    assert scored == loop_positions(prompts, completions)
    assert aligned.attention_mask is not None
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        length = len(prompt) + len(completion)
        assert aligned.input_ids[row].tolist() == prompt + completion + [0] * (width - length)
        assert aligned.attention_mask[row].tolist() == [1] * length + [0] * (width - length)


def check_packed(prompts: list[list[int]], completions: list[list[int]]) -> None:
    aligned = align([np.array(p) for p in prompts], [np.array(c) for c in completions], 0, CPU, packed=True)
    sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
    starts = np.cumsum([0, *map(len, sequences)])
    assert aligned.input_ids.tolist() == [[token for sequence in sequences for token in sequence]]
    assert aligned.position_ids is not None
    assert aligned.position_ids.tolist() == [[i for sequence in sequences for i in range(len(sequence))]]
    assert aligned.attention_mask is None
    assert aligned.packing is not None
    assert aligned.packing.bounds.tolist() == starts.tolist()
    assert aligned.packing.bounds.dtype == torch.int32
    assert aligned.packing.lengths == tuple(map(len, sequences))
    expected = [(int(starts[row]) + i, y) for row, i, y in loop_positions(prompts, completions)]
    assert list(zip(aligned.scored.tolist(), aligned.targets.tolist(), strict=True)) == expected


def test_scored_positions_are_those_whose_next_token_is_of_the_completion() -> None:
    check([[5, 6, 7], [8, 9], [4, 4, 4, 4]], [[1, 2, 3, 4], [5, 6, 7], [8]])
    check_packed([[5, 6, 7], [8, 9], [4, 4, 4, 4]], [[1, 2, 3, 4], [5, 6, 7], [8]])


def test_a_prompt_of_one_token_scores_from_its_only_position() -> None:
    check([[5], [6, 7]], [[1, 2], [3]])


def test_an_immediate_eos_is_one_scored_position_at_the_last_prompt_token() -> None:
    check([[5, 6, 7]], [[1]])
    aligned = align([np.array([5, 6, 7])], [np.array([1])], 0, CPU)
    assert aligned.scored.tolist() == [2]
    assert aligned.targets.tolist() == [1]


@pytest.mark.parametrize("seed", range(5))
def test_random_batches_agree_with_the_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = [(int(random.integers(1, 9)), int(random.integers(1, 9))) for _ in range(7)]
    prompts, completions = (
        [random.integers(1, 50, n).tolist() for n in column] for column in zip(*sizes, strict=True)
    )
    check(prompts, completions)
    check_packed(prompts, completions)


@pytest.mark.parametrize("lengths", [(5,), (3, 3, 3), (1, 50, 2, 49, 7, 8, 30), (100, 1, 1, 1)])
def test_groups_hold_every_packed_position_once_among_few_others(lengths: tuple[int, ...]) -> None:
    packing = Packing(lengths, torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), max(lengths))
    held = torch.cat([grid.flatten() for grid in packing.groups.grids])
    assert held[packing.groups.places].tolist() == list(range(sum(lengths)))
    assert len(packing.groups.places.unique()) == sum(lengths) <= len(held) <= MOST_PADDING * sum(lengths)
    for grid in packing.groups.grids:
        assert torch.equal(grid[:, 0], grid.min(dim=1).values)
        assert (grid.diff(dim=1) <= 1).all()


def test_a_shared_prompt_is_in_the_row_once_and_scored_for_each_completion() -> None:
    prompts, completions = [[5, 6], [5, 6], [7], [7], [8]], [[1], [2, 3], [4, 1], [2], [3]]
    aligned = align(
        [np.array(p) for p in prompts], [np.array(c) for c in completions], 0, CPU, packed=True, shared=True
    )
    assert aligned.input_ids.tolist() == [[5, 6, 1, 2, 3, 7, 4, 1, 2, 8, 3]]
    assert aligned.position_ids is not None
    assert aligned.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1, 0, 1]]
    assert aligned.scored.tolist() == [1, 1, 3, 5, 6, 5, 9]
    assert aligned.targets.tolist() == [1, 2, 3, 4, 1, 2, 3]
    packing = aligned.packing
    assert packing is not None
    assert packing.lengths == (3, 2, 3, 1, 2)
    assert packing.bounds.tolist() == [0, 3, 5, 8, 9, 11]
    assert [row.tolist() for row in packing.places()] == [[0, 1, 2], [0, 1, 3, 4], [5, 6, 7], [5, 8], [9, 10]]
    shared = packing.shared
    assert shared is not None
    assert (shared.bounds.tolist(), shared.longest) == ([0, 3, 7, 10, 12, 14], 4)
    assert shared.places.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 5, 8, 9, 10]
    assert shared.copies.tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 10, 8, 9, 11, 12, 13]
    assert shared.firsts.tolist() == [0, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13]


def test_without_equal_neighbours_nothing_is_shared() -> None:
    prompts = [np.array([5, 6]), np.array([7]), np.array([5, 6])]
    completions = [np.array([1, 2])] * 3
    found, plain = (
        align(prompts, completions, 0, CPU, packed=True, shared=wanted) for wanted in (True, False)
    )
    assert found.packing is not None
    assert plain.packing is not None
    assert found.packing.shared is None
    assert found.packing.lengths == plain.packing.lengths
    assert torch.equal(found.input_ids, plain.input_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_goes_to_a_gpu_without_waiting_for_it(packed: bool) -> None:
    gpu, batch = (
        torch.device("cuda"),
        ([np.array([5, 6, 7]), np.array([8])], [np.array([1, 2]), np.array([3])], 0),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = align(*batch, gpu, packed=packed)
        if found.packing:
            assert found.packing.groups.places.is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.input_ids.cpu(), align(*batch, CPU, packed=packed).input_ids)


def test_hidden_states_are_picked_at_the_scored_positions_in_order() -> None:
    aligned = align([np.array([5, 6]), np.array([7])], [np.array([1]), np.array([2, 3, 4])], 0, CPU)
    hidden = torch.arange(2 * 4 * 3).reshape(2, 4, 3)
    expected = torch.stack([hidden[0, 1], hidden[1, 0], hidden[1, 1], hidden[1, 2]])
    assert torch.equal(at_scored(hidden, aligned), expected)
