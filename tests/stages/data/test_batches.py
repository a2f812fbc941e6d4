"""The live pool, the order of batches, micro-batches, and the teacher objects that the loss takes."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache
from dualkl import HiddenTeacher, LogitsTeacher, TopKTeacher
from stages.data.batches import map_tensors, micro_batches, num_tokens, on_device, to_tensors
from stages.data.pool import Pool, live_pool
from stages.data.signals import dual_kl_head, teacher_of
from stages.loops.feed import batch_rows, read_ahead
from stages.runtime.errors import UserError

CPU = torch.device("cpu")
V = 50


def make_record(
    number: int, *, prompt: int = 3, completion: int = 4, signal: Any = None, **values: Any
) -> cache.Record:
    random = np.random.default_rng(number)
    logprobs = [np.log(random.uniform(0.1, 0.9, completion)).astype(np.float32) for _ in range(2)]
    scored = {
        "teacher_logprobs": logprobs[1],
        "teacher_entropy": np.ones(completion, np.float32),
        "log_tail_mass": np.full(completion, -np.inf, np.float32),
        "top1_id": np.zeros(completion, np.int32),
        "top1_logprob": np.full(completion, -0.5, np.float32),
        "signal": signal,
    }
    identity = {
        "row_id": f"{number:032x}",
        "prompt_id": f"p{number}",
        "occurrence": 0,
        "sample_index": 0,
        "refresh_index": 0,
        "run_id": "mine",
        "policy_step": 0,
        "policy_hash": "h",
        "finish_reason": "eos",
        "prompt_text": "",
        "completion_text": "",
    }
    return cache.Record(
        **(identity | values),
        prompt_ids=random.integers(0, V, prompt),
        completion_ids=random.integers(0, V, completion),
        behaviour_logprobs=logprobs[0],
        behaviour_entropy=np.ones(completion, np.float32),
        **scored,
    )


def topk(num_tokens: int, k: int, seed: int = 0) -> cache.TopK:
    """A distribution over k ids and a tail at each position."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(V)[:k] for _ in range(num_tokens)])
    masses = -np.sort(-random.dirichlet(np.ones(k + 1), num_tokens)[:, :k], axis=1)
    return cache.TopK(ids, np.log(masses), np.log1p(-masses.sum(1)), 1.0)


def pool(num_rows: int, version: int = 0) -> Pool:
    ids = [f"{i:032x}" for i in range(num_rows)]
    return Pool(ids, version, dict.fromkeys(ids, 0), dict.fromkeys(ids, (1, 1)))


# Order


def stream(of: Pool, seed: int, num_batches: int, size: int) -> list[str]:
    return [row_id for index in range(num_batches) for row_id in batch_rows(of, seed, index, size)]


def test_each_epoch_holds_every_row_once() -> None:
    rows = stream(pool(30), seed=1, num_batches=9, size=10)
    for epoch in range(3):
        assert sorted(rows[epoch * 30 : (epoch + 1) * 30]) == pool(30).row_ids


def test_epochs_follow_each_other_inside_a_batch() -> None:
    rows = stream(pool(10), seed=1, num_batches=5, size=4)
    assert sorted(rows[:10]) == sorted(rows[10:20]) == pool(10).row_ids
    assert rows[:10] != rows[10:20]


def test_a_batch_may_be_larger_than_the_pool() -> None:
    rows = batch_rows(pool(3), 0, 0, 8)
    assert len(rows) == 8
    assert sorted(rows[:3]) == sorted(rows[3:6]) == pool(3).row_ids


@pytest.mark.parametrize("size", [3, 4, 7])
def test_the_stream_does_not_depend_on_how_it_is_cut(size: int) -> None:
    assert stream(pool(10), 5, 84 // size, size) == stream(pool(10), 5, 84, 1)


def test_the_order_depends_on_seed_epoch_and_version_alone() -> None:
    assert stream(pool(20), 0, 2, 10) == stream(pool(20), 0, 2, 10)
    assert stream(pool(20), 0, 2, 10) != stream(pool(20), 1, 2, 10)
    assert stream(pool(20), 0, 2, 10) != stream(pool(20, version=1), 0, 2, 10)


def test_a_batch_can_be_asked_for_out_of_turn() -> None:
    later = batch_rows(pool(10), 0, 7, 4)
    batch_rows(pool(10), 0, 0, 4)
    assert batch_rows(pool(10), 0, 7, 4) == later


# The live pool


def snapshot_of(folder: Path, records: list[cache.Record]) -> cache.Snapshot:
    must_match = {"vocab_size": V, "signal": {"kind": "topk", "k": 5, "temperature": 1.0}}
    with cache.Writer(folder, cache.Fingerprint(must_match, {})) as writer:
        for record in records:
            writer.append(record)
        writer.commit("unit")
    return cache.open(folder)


@pytest.fixture
def aged(tmp_path: Path) -> cache.Snapshot:
    """Rows of refreshes 0, 1, 2 at steps 0, 10, 20 of `mine`, and two rows of another run."""

    def row(number: int, run_id: str, refresh: int) -> cache.Record:
        signal = topk(4, 5, number)
        plain = {
            "top1_id": signal.ids[:, 0],
            "top1_logprob": signal.logprobs[:, 0],
            "log_tail_mass": signal.log_tail_mass,
        }
        made = make_record(
            number, signal=signal, run_id=run_id, refresh_index=refresh, policy_step=10 * refresh
        )
        return cache.Record(**{**made.__dict__, **plain})

    rows = [row(9 - i, "mine", i // 2) for i in range(6)] + [row(20, "other", 0), row(21, "other", 7)]
    return snapshot_of(tmp_path / "cache", rows)


def ids(*numbers: int) -> list[str]:
    return [f"{n:032x}" for n in sorted(numbers)]


def test_the_pool_is_sorted_and_holds_rows_no_older_than_max_age(aged: cache.Snapshot) -> None:
    assert live_pool(aged, "mine", 2, 20, max_age=0, policies={}).row_ids == ids(4, 5, 20, 21)
    assert live_pool(aged, "mine", 2, 20, max_age=10, policies={}).row_ids == ids(4, 5, 6, 7, 20, 21)
    assert live_pool(aged, "mine", 2, 20, max_age=20, policies={}).row_ids == ids(4, 5, 6, 7, 8, 9, 20, 21)


def test_rows_of_later_refreshes_are_not_in_the_pool_yet(aged: cache.Snapshot) -> None:
    assert live_pool(aged, "mine", 1, 10, max_age=0, policies={}).row_ids == ids(6, 7, 20, 21)
    assert live_pool(aged, "mine", 0, 0, max_age=100, policies={}).row_ids == ids(8, 9, 20, 21)


def test_ages_count_steps_and_other_runs_have_none(aged: cache.Snapshot) -> None:
    found = live_pool(aged, "mine", 2, 20, max_age=20, policies={})
    assert [found.ages[row_id] for row_id in ids(8, 6, 4)] == [0, 10, 20]
    assert found.ages[ids(20)[0]] == found.ages[ids(21)[0]] == -1
    assert found.num_off_policy == 2


def test_max_age_does_not_touch_rows_of_another_run(aged: cache.Snapshot) -> None:
    found = live_pool(aged, "third", 0, 1000, max_age=0, policies={})
    assert len(found.row_ids) == found.num_off_policy == 8


# Micro-batches


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


def test_rows_of_a_trajectory_that_was_given_up_are_left_out(aged: cache.Snapshot) -> None:
    hashes = dict(
        zip(
            aged.index.column("row_id").to_pylist(), aged.index.column("policy_hash").to_pylist(), strict=True
        )
    )
    right = {refresh: hashes[ids(8 - 2 * refresh)[0]] for refresh in range(3)}
    everything = live_pool(aged, "mine", 2, 20, max_age=20, policies=right)
    assert everything.row_ids == ids(4, 5, 6, 7, 8, 9, 20, 21)
    left = live_pool(aged, "mine", 2, 20, max_age=20, policies=right | {1: "f" * 16})
    assert left.row_ids == ids(4, 5, 8, 9, 20, 21)


def test_packed_micro_batches_count_no_padding() -> None:
    lengths = [5, 9, 3, 12, 4, 4, 4, 20, 2]
    batches = list(micro_batches(rows_of(lengths), num_tokens, None, 24, packed=True))
    assert [[num_tokens(r) for r in batch] for batch in batches] == [[5, 9, 3], [12, 4, 4, 4], [20, 2]]


def test_no_rows_make_no_micro_batches() -> None:
    assert list(micro_batches([], num_tokens, 4, 10)) == []


# Teachers


def test_top_k_rows_of_unequal_width_are_widened_with_empty_slots() -> None:
    records = [make_record(0, signal=topk(4, 3)), make_record(1, completion=2, signal=topk(2, 5, seed=1))]
    teacher = teacher_of(records, None, CPU, V)
    assert isinstance(teacher, TopKTeacher)
    assert teacher.ids.shape == teacher.logprobs.shape == (6, 5)
    assert (teacher.ids[:4, 3:] == -1).all()
    assert teacher.logprobs[:4, 3:].isneginf().all()
    for rows, record in ((slice(0, 4), records[0]), (slice(4, 6), records[1])):
        k = record.signal.ids.shape[1]
        assert np.array_equal(teacher.ids[rows, :k].numpy(), record.signal.ids)
        assert np.array_equal(teacher.logprobs[rows, :k].numpy(), record.signal.logprobs)
        assert np.array_equal(teacher.log_tail_mass[rows].numpy(), record.signal.log_tail_mass)


def test_top_k_values_are_checked_on_the_host_before_they_leave_it() -> None:
    signal = topk(4, 3)
    signal.ids[2, 1] = signal.ids[2, 0]
    with pytest.raises(ValueError, match="keeps the same id twice"):
        teacher_of([make_record(0, signal=signal)], None, torch.device("meta"), V)


def bf16_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.bfloat16).view(torch.uint16).numpy()


def test_bf16_hidden_states_keep_their_bits() -> None:
    states = torch.randn(4, 6).to(torch.bfloat16)
    head = dual_kl_head(
        cache.TeacherHead(bf16_bits(torch.randn(V, 6)), "bfloat16", scale=0.5, softcap=30.0), CPU
    )
    teacher = teacher_of([make_record(0, signal=cache.Hidden(bf16_bits(states), "bfloat16"))], head, CPU, V)
    assert isinstance(teacher, HiddenTeacher)
    assert torch.equal(teacher.hidden, states)
    assert teacher.lm_head is head
    assert head is not None
    assert (head.weight.dtype, head.scale, head.softcap) == (torch.bfloat16, 0.5, 30.0)


def test_a_head_without_softcap_or_bias_has_none() -> None:
    head = dual_kl_head(cache.TeacherHead(np.ones((V, 6), np.float32), "float32"), CPU)
    assert head is not None
    assert head.softcap is None
    assert head.bias is None
    assert dual_kl_head(None, CPU) is None


def test_hidden_states_without_a_head_are_a_sentence() -> None:
    record = make_record(0, signal=cache.Hidden(np.ones((4, 6), np.float32), "float32"))
    with pytest.raises(UserError, match="no teacher head"):
        teacher_of([record], None, CPU, V)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_logits_reach_the_loss_as_float32(dtype: str) -> None:
    logits = torch.randn(4, V).to(torch.bfloat16).float()
    stored = bf16_bits(logits) if dtype == "bfloat16" else logits.numpy()
    teacher = teacher_of([make_record(0, signal=cache.Full(stored, dtype))], None, CPU, V)
    assert isinstance(teacher, LogitsTeacher)
    assert teacher.logits.dtype == torch.float32
    assert torch.equal(teacher.logits, logits)


def test_rows_that_are_not_scored_are_a_sentence() -> None:
    with pytest.raises(UserError, match="not scored yet"):
        teacher_of([make_record(0)], None, CPU, V)
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


def test_rows_are_read_ahead_by_so_many_and_no_further() -> None:
    events: list[int] = []
    ahead = read_ahead(lambda item: events.append(item) or item, range(6), 2)
    assert next(ahead) == 0
    while 2 not in events:
        time.sleep(0.001)
    time.sleep(0.05)
    assert 3 not in events
    assert list(ahead) == [1, 2, 3, 4, 5]


def test_rows_are_read_ahead_by_one_and_no_further() -> None:
    events: list[str] = []

    def read(item: int) -> int:
        events.append(f"read {item}")
        return 10 * item

    ahead = read_ahead(read, range(4))
    assert next(ahead) == 0
    while "read 1" not in events:  # nobody asked for it yet
        time.sleep(0.001)
    time.sleep(0.05)
    assert "read 2" not in events
    assert list(ahead) == [10, 20, 30]
    assert events == [f"read {n}" for n in range(4)]


def test_what_goes_wrong_while_reading_ahead_is_raised_in_its_turn() -> None:
    ahead = read_ahead(lambda item: 1 // item, [2, 1, 0, 1])
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(ahead)
