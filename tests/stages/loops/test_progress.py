"""What stage one says of itself: rates, shares, padding, and the model whose turn it is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from stages.loops import progress
from stages.loops.progress import Counts, Progress
from stages.models import turns
from stages.models.teacher import Teacher, TeacherLoader, load_plain_model, plain_teacher, resident_bytes
from stages.models.turns import Turns
from tests.support.helpers import Forker, make_run, records_of, small
from tests.support.tiny_runs import TINY, student_of, write_rollouts


def test_each_round_is_recorded_with_rates_shares_and_what_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    write_rollouts(run, student_of(run))
    records = records_of(run.folder, "rollout_progress")
    assert [(r["rollouts"], r["rollouts_left"]) for r in records] == [(8, 8), (16, 0)]
    assert len({r["began"] for r in records}) == 1
    with run.clock.phase("evaluate"), Progress(run, 1) as measuring:
        measuring.add(Counts(1))
    assert [r["evaluation"] for r in records_of(run.folder, "rollout_progress")] == [False, False, True]
    for record in records:
        assert record["start"] == run.clock.started
        for name in ("rollouts_per_second", "generated_tokens_per_second", "scored_tokens_per_second"):
            assert record[name] > 0
        assert record["eta_seconds"] == pytest.approx(record["rollouts_left"] / record["rollouts_per_second"])
        shares = {name: record[f"share_{name}"] for name in ("generate", "score", "write", "rows")}
        assert shares["generate"] > 0 < shares["score"]
        assert shares["rows"] == 0 <= shares["write"]
        assert 0.5 < sum(shares.values()) <= 1
        assert 0 <= record["padding_waste"] < 1


def test_counts_give_the_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    with Progress(run, 40) as shown:
        seconds = {"generate": 2.0, "score": 3.0, "write": 1.0, "rows": 0.0}
        monkeypatch.setattr(shown._clock, "seconds", seconds)
        monkeypatch.setattr(shown._clock, "total", lambda: 8.0)
        shown.add(Counts(10, cut_rollouts=6, generated_tokens=400, scored_tokens=800, padded_tokens=1000))
    (found,) = records_of(run.folder, "rollout_progress")
    assert (found["rollouts_per_second"], found["eta_seconds"]) == (10 / 8, 24)
    assert (found["generated_tokens_per_second"], found["scored_tokens_per_second"]) == (200, 200)
    assert found["padding_waste"] == pytest.approx(0.2)
    assert found["cut_share"] == 0.6
    assert (found["share_generate"], found["share_score"], found["share_write"]) == (2 / 8, 3 / 8, 1 / 8)
    line = progress.last_line(run)
    assert line == (
        "10 rollouts in 8 s, 1.2 a second: 200 tokens/s generated, 200 scored; 60 % of completions were cut"
        " at max_new_tokens; time: 25.0% generating, 37.5% scoring, 12.5% waiting for the writer; padding"
        " 20.0%"
    )


def test_a_start_that_had_nothing_to_do_says_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    write_rollouts(run, student_of(run))
    again = make_run(tmp_path, **TINY)
    object.__setattr__(again.clock, "started", run.clock.started + 1)
    assert progress.last_line(again) == ""


def test_rollout_tells_how_it_went(tmp_path: Path, forked: Forker) -> None:
    done = forked.stage(
        "stages.rollout", *small(tmp_path, rollouts_per_refresh=8, rollouts_per_unit=8), processes=2
    )
    out = done.expect_success().out
    assert "8 rollouts in" in out
    assert "waiting for the writer" in out
    assert len(records_of(tmp_path / "demo", "rollout_progress")) == 1


# The model whose turn it is


class Moving(nn.Module):
    """Notes where it is sent."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def to(self, device: Any) -> Any:  # type: ignore[override]
        self.log.append((self.name, str(device)))
        return self


def crowd(monkeypatch: pytest.MonkeyPatch, crowded: bool = True) -> None:
    monkeypatch.setattr(turns, "_is_crowded", lambda *_: crowded)


def moves(tmp_path: Path, sharded: bool = False) -> list[tuple[str, str]]:
    """What a first load and two rounds move."""
    run = make_run(tmp_path)
    log: list[tuple[str, str]] = []
    object.__setattr__(run.world, "device", torch.device("meta"))
    student, model = Moving("student", log), Moving("teacher", log)
    teacher = Teacher(model, None, run.world.device, engine=object() if sharded else None)
    order = Turns(run, student)
    order.to_student(order.to_teacher(lambda: teacher))
    return log


def test_the_idle_model_leaves_before_the_other_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd(monkeypatch)
    assert moves(tmp_path) == [
        ("student", "cpu"),
        ("teacher", "meta"),
        ("teacher", "cpu"),
        ("student", "meta"),
    ]


def test_a_sharded_teacher_stays_and_nothing_moves_where_both_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd(monkeypatch)
    assert moves(tmp_path, sharded=True) == [("student", "cpu"), ("student", "meta")]
    crowd(monkeypatch, False)
    assert moves(tmp_path) == []


def test_models_take_turns_where_their_weights_crowd_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, teacher_ds_zero3="false")
    student = student_of(run).model
    assert not turns._is_crowded(run, student), "a CPU has one memory"
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    weights += 8 * sum(p.numel() for p in student.parameters() if p.requires_grad)
    teacher = resident_bytes(run.config, 1)
    assert teacher == sum(p.numel() * 4 for p in load_plain_model(run.config, run.world).parameters())
    object.__setattr__(run.world, "device", torch.device("cuda"))
    for share, expected in ((0.81, True), (0.79, False)):
        card = SimpleNamespace(total_memory=int((weights + teacher) / share))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        assert turns._is_crowded(run, student) is expected
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1))
    assert turns._is_crowded(run, student)
    assert not turns._is_crowded(run, student.requires_grad_(False)), "a teacher that writes its own text"


def test_a_sharded_teacher_takes_its_share_of_a_gpu_and_the_whole_head(tmp_path: Path) -> None:
    run = make_run(tmp_path, teacher_ds_zero3="false")
    model = load_plain_model(run.config, run.world)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert resident_bytes(run.config, 4) == whole
    sharded = make_run(tmp_path / "sharded", teacher_ds_zero3="true").config
    assert resident_bytes(sharded, 4) == whole / 4 + model.get_output_embeddings().weight.nbytes


def test_a_student_whose_weights_deepspeed_holds_does_not_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    student = student_of(run).model
    object.__setattr__(run.world, "device", torch.device("cuda"))
    monkeypatch.setattr(type(run.world), "student_is_deepspeed", True)
    assert not turns._is_crowded(run, student)


def test_rows_are_the_same_with_the_idle_model_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cache

    roots = []
    for crowded in (False, True):
        crowd(monkeypatch, crowded)
        run = make_run(tmp_path / str(crowded), **TINY)
        write_rollouts(run, student_of(run))
        roots.append(cache.open(run.config.cache_root))
    assert roots[0].to_table().equals(roots[1].to_table())


@pytest.mark.gpu
def test_weights_come_back_bit_by_bit_in_the_same_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd(monkeypatch)
    run = make_run(tmp_path, device="cuda", teacher_ds_zero3="false")
    student = student_of(run).model
    before = [(p, p.detach().clone()) for p in student.parameters()]
    allocated = torch.cuda.memory_allocated()
    with TeacherLoader(run.config, run.world) as loader:
        order = Turns(run, student)
        teacher = order.to_teacher(loader.get)
        assert {p.device.type for p in student.parameters()} == {"cpu"}
        assert teacher.head.weight.is_cuda
        order.to_student(teacher)
        assert not teacher.head.weight.is_cuda
        assert torch.cuda.memory_allocated() == pytest.approx(allocated, rel=0.05)
        assert all(
            p is q and torch.equal(p, kept) for p, (q, kept) in zip(student.parameters(), before, strict=True)
        )


def test_the_head_moves_with_a_plain_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    teacher = plain_teacher(load_plain_model(run.config, run.world), run.world, "auto")
    teacher.move(torch.device("cpu"))
    assert teacher.head.weight is teacher.forward.model.get_output_embeddings().weight
