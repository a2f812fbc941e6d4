"""What `auto` stands for: fixed on a CPU, on a GPU what the free memory holds, the same for run, plan and
every rank.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from bench.counted_memory import CountedMemory
from stages.engine.decoder import Decoder
from stages.engine.protocol import Sampling
from stages.engine.requests import Method, Request
from stages.loops import budgets, collect, feed, planning, schedule, steps
from stages.loops.budgets import Caps, total
from stages.loops.planning import Machine
from stages.models import memory, speed
from stages.models.memory import GIB
from stages.models.teacher import TeacherLoader
from stages.runtime.checkpoint import Position
from stages.runtime.config import parse_arguments
from stages.runtime.errors import UserError
from stages.runtime.run import Run, open_run
from tests.support.helpers import Forker, make_run, records_of, small
from tests.support.tiny_runs import TINY, policy_of, student_of, write_rollouts

CONFIG = parse_arguments([], "")
CARD = 80 * GIB


def qwen3(width: int, mlp: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=width < 4096,
    )


STUDENT = memory.shape_of(qwen3(2560, 9728, 36, 32))
TEACHER = memory.shape_of(qwen3(5120, 25_600, 64, 64))


def on_a_card(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """The run computes on the CPU, but is told that so much of an 80 GiB card is free."""
    monkeypatch.setattr(budgets, "free_bytes", lambda world: gib * GIB)
    monkeypatch.setattr(budgets, "card_bytes", lambda world: CARD)


# The arithmetic


def test_slots_follow_the_memory_and_leave_room_to_score() -> None:
    rows = [budgets.gen_rows(CONFIG, STUDENT, 2, gib * GIB) for gib in (1, 10, 30, 60, 500)]
    assert rows == sorted(rows)
    assert rows[0] == 1
    assert rows[-1] == budgets.MOST_GEN_ROWS
    assert all(count % 8 == 0 for count in rows[1:])
    beside = budgets.beside_slots(parse_arguments(["--score_tokens", "32768"], ""), TEACHER, 0.0, CARD)
    fewer = budgets.gen_rows(CONFIG, STUDENT, 2, 30 * GIB, beside)
    assert 8 <= fewer < rows[2]
    kept = total(budgets.slot_parts(CONFIG, STUDENT, 2, fewer))
    tokens = budgets.score_tokens(CONFIG, TEACHER, 0.0, 30 * GIB - kept, CARD)
    assert tokens >= budgets.TOKENS_BESIDE_SLOTS
    assert kept + beside < 30 * GIB
    half = budgets.gen_rows(
        CONFIG, STUDENT, 2, 10 * GIB, beside
    )  # where scoring would take all, slots keep half
    assert 8 <= half <= rows[1]


def test_a_prefill_is_within_15_percent_of_the_one_counted() -> None:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
    }
    config = Qwen3Config(**sizes, intermediate_size=192, num_hidden_layers=12, max_position_embeddings=128)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    method = Method(Sampling(2), 96, (), 0)
    decoder = Decoder(model, method, 16, 66, 2, None)
    requests = [Request(i, np.random.default_rng(i).integers(1, 96, 64), i, 2) for i in range(16)]
    with torch.no_grad():
        decoder.fill(list(enumerate(requests)))  # makes the slots
        with CountedMemory() as count:
            decoder.fill(list(enumerate(requests)))
    planned = budgets.prefill_bytes(
        parse_arguments(["--max_prompt_tokens", "64"], ""), memory.shape_of(config), 2, 16
    )
    assert planned == pytest.approx(count.peak, rel=0.15)


def test_a_prompt_longer_than_a_prefills_part_is_planned_whole() -> None:
    short, long = (parse_arguments(["--max_prompt_tokens", str(tokens)], "") for tokens in (16_384, 40_000))
    prefill = [budgets.prefill_bytes(config, STUDENT, 2, 8) for config in (short, long)]
    assert prefill[1] / prefill[0] == pytest.approx(40_000 / 16_384)


@pytest.mark.parametrize("which", ["score", "train"])
def test_tokens_of_a_forward_fit_and_stay_within_bounds(which: str) -> None:
    def tokens(gib: float) -> int:
        if which == "score":
            return budgets.score_tokens(CONFIG, TEACHER, GIB, gib * GIB, CARD)
        return budgets.train_tokens(CONFIG, STUDENT, gib * GIB, CARD)

    def taken(count: int) -> float:
        if which == "score":
            return total(budgets.scoring_parts(CONFIG, TEACHER, GIB, count, CARD))
        return total(budgets.step_parts(CONFIG, STUDENT, count, count, CARD))

    found = {gib: tokens(gib) for gib in (-3, 1, 8, 10, 12, 60, 500)}
    assert list(found.values()) == sorted(found.values())
    assert found[-3] == found[1] == budgets.LEAST_TOKENS == 2048
    assert found[500] == budgets.MOST_TOKENS == 32_768
    between = {gib: count for gib, count in found.items() if 2048 < count < 32_768}
    assert between
    for gib, count in between.items():
        assert count % 1024 == 0
        assert taken(count) <= budgets.MARGIN * gib * GIB < taken(count + 1024)


@pytest.mark.parametrize(
    ("given", "fitting", "caps"),
    [
        ({}, None, Caps(64, None)),
        ({}, 9216, Caps(None, 9216)),
        ({"lp_micro_batch": 8}, 9216, Caps(8, 9216)),
        ({"micro_batch_tokens": 4096}, 9216, Caps(None, 4096)),
        ({"micro_batch_tokens": 4096}, None, Caps(64, 4096)),
        ({"lp_micro_batch": 8}, None, Caps(8, None)),
    ],
)
def test_a_training_forward_has_what_was_given_or_what_fits(
    given: dict[str, int], fitting: int | None, caps: Caps
) -> None:
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    assert budgets.train_caps(parse_arguments(flags, ""), fitting) == caps


# Plan and run


def test_the_plan_is_what_the_run_would_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Told that what the plan has left is free, the run comes to the plan's numbers, for both halves and the
    training.
    """
    for name, shape in (("student", qwen3(2560, 9728, 36, 32)), ("teacher", qwen3(5120, 25_600, 64, 64))):
        shape.save_pretrained(tmp_path / name)
    run = make_run(
        tmp_path,
        student_model=tmp_path / "student",
        teacher_model=tmp_path / "teacher",
        teacher_ds_zero3="false",
        max_prompt_tokens=1024,
        max_new_tokens=512,
        gen_micro_batch="auto",
        dtype="bf16",
        teacher_dtype="bf16",
        rollouts_per_unit=1024,
        batch_size=256,
        gradient_checkpointing="true",
    )
    config, machine = run.config, Machine(speed.GPUS["h200"], 1, 139.8)
    sizes = planning._Sizes(config, machine, STUDENT, TEACHER, budgets.trained_parameters(config, STUDENT))
    writing = planning._writing(sizes, {})
    models = total(planning._student_parts(sizes) | planning._teacher_parts(sizes))
    monkeypatch.setattr(budgets, "card_bytes", lambda world: machine.gib * GIB)

    def told(used: float) -> None:
        monkeypatch.setattr(budgets, "free_bytes", lambda world: machine.usable - used)

    told(models)
    student = qwen3(2560, 9728, 36, 32)
    slots = budgets.slots_of_run(config, run.world, student, is_teacher=False, scores_too=True)
    assert slots == writing.slots
    assert budgets.slots_of_run(config, run.world, student, is_teacher=False, scores_too=False) > slots
    kept = budgets.copied_bytes(config, STUDENT) + total(budgets.slot_parts(config, STUDENT, 2, slots))
    told(models + kept)
    assert budgets.score_tokens_of_run(config, run.world, _Loaded(tmp_path)) == writing.score_tokens
    told(total(planning._student_parts(sizes)))
    rows, tokens = budgets.train_caps_of_run(config, run.world, student)
    assert rows is None
    assert tokens is not None
    assert planning._step_tokens(sizes) == max(tokens, sizes.longest)


class _Loaded:
    """As much of a teacher as its budget looks at."""

    is_collective = False

    def __init__(self, folder: Path) -> None:
        self.config = Qwen3Config.from_pretrained(folder / "teacher")


def test_on_a_cpu_nothing_depends_on_the_machine(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, gen_micro_batch="auto", teacher_ds_zero3="false"
    )  # ZeRO-3 would change the other tests of this process
    student = student_of(run)
    assert collect.slots_for(run, policy_of(run, student), scores_too=True) == 128
    assert steps.prepare(run, student).caps == Caps(64, None)
    with TeacherLoader(run.config, run.world) as teacher:
        assert budgets.score_tokens_of_run(run.config, run.world, teacher.get()) == 16_384
    assert budgets.score_tokens_of_run(make_run(tmp_path, score_tokens=123).config, run.world, None) == 123


def test_a_run_on_a_card_takes_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, **(TINY | {"gen_micro_batch": "auto"}))
    student = student_of(run)
    policy = policy_of(run, student)
    found = []
    for gib in (0.01, 0.03, 80):
        on_a_card(monkeypatch, gib)
        found.append(collect.slots_for(run, policy, scores_too=True))
    assert found[0] < found[1] <= found[2] == run.config.rollout.rollouts_per_unit
    asked: list[int] = []
    fixed = budgets.score_tokens
    monkeypatch.setattr(budgets, "score_tokens", lambda *args: asked.append(fixed(*args)) or asked[-1])
    write_rollouts(run, student)
    assert asked == [32_768] * 2  # once a unit
    on_a_card(monkeypatch, 0.05)
    training = steps.prepare(run, student)
    assert training.caps.rows is None
    assert training.caps.tokens == budgets.LEAST_TOKENS


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


def test_a_model_that_cannot_be_planned_asks_for_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> None:
        raise UserError("a model of type odd cannot be planned: its layers are no list.")

    monkeypatch.setattr(memory, "shape_of", refuse)
    with pytest.raises(
        UserError, match=r"score_tokens: auto .* its layers are no list; give score_tokens a number\."
    ):
        budgets._shape(Qwen3Config(hidden_size=96), "score_tokens")


class _FakeWorld:
    """A rank on a card beside others that told how much they have free."""

    device = torch.device("cuda", 1)

    def __init__(self, others: list[int]) -> None:
        self.others = others

    def gather(self, value: int) -> list[int]:
        return [*self.others, value]


def test_free_memory_is_that_of_the_fullest_rank_and_of_what_everybody_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch tells it: reserve of the default pool counts, that of a captured graph and of other cards does
    not.
    """
    segments = [
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 100, "active_size": 30},
        {"device": 1, "segment_pool_id": (0, 7), "total_size": 100, "active_size": 0},
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 100, "active_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    world: Any = _FakeWorld([5000])
    assert budgets.free_bytes(world) == 1070
    world = _FakeWorld([900])
    assert budgets.free_bytes(world) == 900


@pytest.mark.gpu
def test_free_memory_counts_what_torch_holds_in_reserve(tmp_path: Path) -> None:
    run: Run = make_run(tmp_path, device="cuda")
    before = budgets.free_bytes(run.world)
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    during = budgets.free_bytes(run.world)
    del held
    after = budgets.free_bytes(run.world)
    assert before is not None
    assert during == pytest.approx(before - 2**28, abs=2**25)
    assert after == pytest.approx(before, abs=2**25)


def _both_stages_with_unequal_memory(arguments: list[str]) -> None:
    """In each of two processes: the second has so little free memory that its forwards would be shorter."""
    run = open_run("", arguments)
    own = [80 * GIB, GIB // 100][run.world.rank]
    budgets._own_free_bytes = lambda device: own
    budgets.card_bytes = lambda world: CARD
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
