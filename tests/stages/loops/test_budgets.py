"""What `auto` stands for: fixed on a CPU, on a GPU the largest size that fits, the same on every rank."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.counted_memory import CountedMemory
from stages.loops import budgets, collect, feed, schedule, steps
from stages.loops.budgets import Caps, largest
from stages.models.teacher import TeacherLoader
from stages.runtime import gpu_memory
from stages.runtime.checkpoint import Position
from stages.runtime.run import Run, open_run
from tests.support.helpers import Forker, make_run, records_of, small
from tests.support.tiny_runs import TINY, policy_of, student_of, write_rollouts

MIB = 2**20


def counted(device: torch.device, work: Callable[[], object], *, collective: bool = False) -> float:
    """`gpu_memory.peak_bytes` for a CPU."""
    with CountedMemory() as count:
        work()
    return float(count.peak)


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The run uses the CPU and counts its memory, but is told that so many bytes of a card are free."""
    monkeypatch.setattr(gpu_memory, "peak_bytes", counted)
    monkeypatch.setattr(budgets, "_peaks", {})
    return lambda free: monkeypatch.setattr(budgets, "free_bytes", lambda world: free)


# The search

TOKENS = range(2048, 32_769, 1024)
SLOTS = range(1, 513)


def linear(size: int) -> float:
    return 100.0 * size


def with_a_fixed_part(size: int) -> float:
    return 1e6 + 100.0 * size


def with_a_part_that_is_full_early(size: int) -> float:
    return max(100.0 * size, 60.0 * size + min(200.0 * size, 1e6))


@pytest.mark.parametrize("peak_of", [linear, with_a_fixed_part, with_a_part_that_is_full_early])
@pytest.mark.parametrize(("sizes", "base", "first"), [(TOKENS, 0, 2048), (SLOTS, 1, 8)])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 1.5])
def test_the_largest_size_that_fits_is_found_in_a_few_trials(
    peak_of: Callable[[int], float], sizes: range, base: int, first: int, share: float
) -> None:
    room, peaks = share * peak_of(sizes[-1]), {base: peak_of(base) if base else 0.0}
    tried: list[int] = []
    found = largest(peaks, lambda size: tried.append(size) or peak_of(size), room, sizes, first)
    best = max((size for size in sizes if peak_of(size) <= room), default=sizes[0])
    assert found in sizes
    assert best / 1.25 <= found <= best
    assert len(tried) == len(set(tried)) <= 7
    assert all(peak_of(size) <= room for size in tried if size != first)  # a promise is kept
    assert largest(peaks, lambda size: pytest.fail(f"{size} is tried again"), room, sizes, first) == found


def test_a_size_that_takes_more_than_promised_is_not_used() -> None:
    """Out of memory is an infinite peak; the search goes on below."""
    peaks = {0: 0.0}
    found = largest(peaks, lambda size: linear(size) if size < 9000 else math.inf, 2e6, TOKENS, 2048)
    assert 8000 / 1.1 <= found < 9000
    assert largest({0: 0.0}, lambda size: math.inf, 2e6, TOKENS, 2048) == 2048
    assert largest({1: math.inf}, lambda size: math.inf, 2e6, SLOTS, 8) == 1
    assert largest({1: 1.0}, lambda size: size if size <= 5 else math.inf, 2e6, SLOTS, 8) == 5


def test_sizes_of_an_earlier_search_are_used_within_new_bounds() -> None:
    peaks = {0: 0.0, 20_480: linear(20_480)}
    assert largest(peaks, pytest.fail, 2.1e6, TOKENS, 2048) == 20_480
    assert largest({1: 1.0, 512: 512.0}, pytest.fail, 1e6, range(1, 65), 8) == 64


# A run


def test_on_a_cpu_nothing_depends_on_the_machine(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, gen_micro_batch="auto", teacher_ds_zero3="false"
    )  # ZeRO-3 would change the other tests of this process
    student = student_of(run)
    assert collect.slots_for(run, policy_of(run, student), scores_too=True) == 128
    assert steps.prepare(run, student).caps == Caps(64, None)
    with TeacherLoader(run.config, run.world) as teacher:
        assert budgets.score_tokens_of_run(run, teacher.get(), 230, pytest.fail) == 16_384


@pytest.mark.parametrize(
    ("given", "on_cpu", "on_gpu"),
    [
        ({}, Caps(64, None), Caps(None, 2048)),
        ({"lp_micro_batch": 8}, Caps(8, None), Caps(8, 2048)),
        ({"micro_batch_tokens": 4096}, Caps(64, 4096), Caps(None, 4096)),
    ],
)
def test_numbers_that_are_given_are_taken(
    tmp_path: Path, on_a_card: Callable[[float], None], given: dict[str, int], on_cpu: Caps, on_gpu: Caps
) -> None:
    run = make_run(tmp_path, **(TINY | given))
    student = student_of(run)
    assert steps.prepare(run, student).caps == on_cpu
    on_a_card(1.0)
    assert steps.prepare(run, student).caps == on_gpu
    run = make_run(tmp_path, **TINY, gen_micro_batch=5, micro_batch_tokens=123)
    assert collect.slots_for(run, policy_of(run, student), scores_too=True) == 5
    anything: Any = None
    assert budgets.score_tokens_of_run(run, anything, 230, pytest.fail) == 123


def test_slots_fill_the_memory_beside_what_scoring_needs(
    tmp_path: Path, on_a_card: Callable[[float], None]
) -> None:
    run = make_run(
        tmp_path, **(TINY | {"gen_micro_batch": "auto", "rollouts_per_unit": 512, "max_prompt_tokens": 32})
    )
    student = student_of(run)
    policy = policy_of(run, student)

    def slots(free: float, *, scores_too: bool = False) -> int:
        on_a_card(free)
        return collect.slots_for(run, policy, scores_too=scores_too)

    free = 32 * MIB
    found = slots(free)
    assert found % 8 == 0
    used = counted(run.world.device, lambda: budgets._generate(policy, 48, found))
    policy.engine.close()
    assert 0.6 * free <= used <= free
    assert 8 <= slots(free, scores_too=True) < found
    assert slots(1.0) == 1
    assert slots(2**40) == 512


def test_a_scoring_and_a_training_forward_fill_the_memory(
    tmp_path: Path, on_a_card: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    asked: list[int] = []
    ask = budgets._most_tokens
    monkeypatch.setattr(budgets, "_most_tokens", lambda *args: asked.append(ask(*args)) or asked[-1])
    free = 250 * MIB
    on_a_card(free)
    training = steps.prepare(run, student)
    write_rollouts(run, student)
    trained, scored, again = asked
    assert training.caps == Caps(None, trained)
    assert scored == again  # once a unit
    for tokens in (trained, scored):
        assert 2048 < tokens < 32_768
        assert tokens % 1024 == 0
    batch = budgets._dummy_batch(trained, 112, student.vocab_size, run.world.device, packed=student.packs)
    used = counted(
        run.world.device, lambda: budgets._train(run.config, student, training.module, batch, None)
    )
    assert 0.6 * free <= used <= free


@pytest.mark.parametrize(("tokens", "size"), [(2048, 4), (4096, 4), (5000, 16)])
def test_a_trial_of_groups_has_so_many_tokens_and_shares_prompts(
    tmp_path: Path, tokens: int, size: int
) -> None:
    """At most so many, and a group's rows short of it; rows are no longer than allowed."""
    group = budgets.Group(size, 300)
    batch = budgets._dummy_batch(tokens, 500, 230, torch.device("cpu"), packed=True, group=group)
    assert tokens - 2 * size * -(-tokens // 500) <= batch.input_ids.numel() == len(batch.targets) <= tokens
    assert batch.packing is not None
    assert batch.packing.shared is not None
    assert batch.packing.shared.longest <= 500


@pytest.mark.parametrize("signal", ["topk", "nucleus", "hidden", "full"])
def test_a_trial_step_reads_a_teacher_of_the_signal_and_leaves_no_trace(
    tmp_path: Path, caches: Callable[..., str], signal: str
) -> None:
    run = make_run(tmp_path, **TINY, signal=signal, lora_dropout=0.3)
    student = student_of(run)
    training = steps.prepare(run, student)
    training.module.register_buffer("statistics", torch.zeros(3))
    student.model.eval()
    before = {name: value.clone() for name, value in training.module.state_dict().items()}
    random, head = torch.get_rng_state(), student.head if signal == "hidden" else None
    batch = budgets._dummy_batch(64, 20, student.vocab_size, run.world.device, packed=student.packs)
    assert len(batch.targets) == 60  # of 4 rows of 16
    budgets._train(run.config, student, training.module, batch, head)
    assert torch.equal(torch.get_rng_state(), random)
    assert not student.model.training
    assert all(p.grad is None for p in student.trainable.values())
    after = training.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    (sum(p.sum() for p in student.trainable.values())).backward()
    assert all(p.grad is not None for p in student.trainable.values())  # the hooks are gone


def test_a_failed_trial_step_leaves_no_trace_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    training = steps.prepare(run, student)
    student.model.eval()

    def refuse(batch: object) -> None:
        torch.rand(3)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training.module, "forward", refuse)
    random = torch.get_rng_state()
    batch = budgets._dummy_batch(64, 20, student.vocab_size, run.world.device, packed=student.packs)
    with pytest.raises(torch.OutOfMemoryError):
        budgets._train(run.config, student, training.module, batch, None)
    assert torch.equal(torch.get_rng_state(), random)
    assert not student.model.training


def test_forwards_of_a_step_are_cut_by_the_tokens_that_fit(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    write_rollouts(run, student)
    training = steps.prepare(run, student)
    pool, snapshot = schedule.open_pool(run, Position(0, 0))

    def forwards(caps: Caps) -> list[int]:
        (step,) = feed.global_batches(run, training.student, snapshot, pool, [0], caps)
        return [len(forward.row_ids) for forward in step.forwards]

    assert forwards(Caps(None, None)) == [8]
    longest = max(sum(lengths) for lengths in pool.lengths.values())
    few = forwards(Caps(None, 2 * longest))
    assert sum(few) == 8
    assert 2 <= max(few) < 8
    assert forwards(Caps(3, None)) == [3, 3, 2]


class _FakeWorld:
    """A rank beside others that told how much they have free."""

    device = torch.device("cuda", 1)

    def __init__(self, others: list[int]) -> None:
        self.others = others

    def gather(self, value: int) -> list[int]:
        return [*self.others, value]


def test_free_memory_is_that_of_the_fullest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "free_bytes", lambda device: 1000)
    for others, expected in (([5000], 1000), ([900], 900)):
        world: Any = _FakeWorld(others)
        assert budgets.free_bytes(world) == expected


def _both_stages_with_unequal_memory(arguments: list[str]) -> None:
    """In each of two processes: the second has so little free memory that its forwards would be shorter."""
    run: Run = open_run("", arguments)
    gpu_memory.free_bytes = lambda device: [2**36, 10 * MIB][run.world.rank]
    gpu_memory.peak_bytes = counted
    student = student_of(run)
    write_rollouts(run, student)
    training = steps.prepare(run, student)
    print("caps", training.caps.tokens, flush=True)
    schedule.fit(run, training, lambda *_: None)


@pytest.mark.thorough
def test_ranks_with_unequal_memory_make_equally_many_forwards(tmp_path: Path, forked: Forker) -> None:
    """To the end of both stages: every collective finds its partners."""
    values = TINY | {
        "teacher_ds_zero3": "true",
        "max_steps": 2,
        "refresh_every": 0,
        "gen_micro_batch": "auto",
    }
    done = forked.call(
        _both_stages_with_unequal_memory, small(tmp_path, **values), processes=2
    ).expect_success()
    assert done.out.count("caps 2048") == 2
    assert len(records_of(tmp_path / "demo", "step")) == 2
