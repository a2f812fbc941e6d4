"""Offloading on a GPU that cannot hold student and teacher."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import cache
from stages.models import offload
from stages.models.offload import Offloader
from stages.models.teacher import Teacher, TeacherLoader, load_plain_model, plain_teacher, resident_bytes
from tests.support.helpers import make_run
from tests.support.tiny_runs import TINY, student_of, write_rollouts


class Moving(nn.Module):
    """Notes where it is sent."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def to(self, device: Any) -> Any:  # type: ignore[override]
        self.log.append((self.name, str(device)))
        return self


def crowd(monkeypatch: pytest.MonkeyPatch, crowded: bool = True) -> None:
    monkeypatch.setattr(offload, "_is_crowded", lambda *_: crowded)


def moves(tmp_path: Path, sharded: bool = False) -> list[tuple[str, str]]:
    """What a first load and two rounds move."""
    run = make_run(tmp_path)
    log: list[tuple[str, str]] = []
    object.__setattr__(run.world, "device", torch.device("meta"))
    student, model = Moving("student", log), Moving("teacher", log)
    teacher = Teacher(model, None, run.world.device, engine=object() if sharded else None)
    offloader = Offloader(run, student)
    offloader.to_teacher(lambda: teacher)
    offloader.to_student()
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


def test_models_are_offloaded_where_their_weights_crowd_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, teacher_ds_zero3="false")
    student = student_of(run).model
    assert not offload._is_crowded(run, student), "a CPU has one memory"
    weights = sum(p.numel() * p.element_size() for p in student.parameters())
    weights += 8 * sum(p.numel() for p in student.parameters() if p.requires_grad)
    teacher = resident_bytes(run.config, 1)
    assert teacher == sum(p.numel() * 4 for p in load_plain_model(run.config, run.world).parameters())
    object.__setattr__(run.world, "device", torch.device("cuda"))
    for share, expected in ((0.81, True), (0.79, False)):
        card = SimpleNamespace(total_memory=int((weights + teacher) / share))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, card=card: card)
        assert offload._is_crowded(run, student) is expected
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1))
    assert offload._is_crowded(run, student)
    assert not offload._is_crowded(run, student.requires_grad_(False)), "a teacher that writes its own text"


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
    assert not offload._is_crowded(run, student)


def test_rows_are_the_same_with_the_idle_model_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        offloader = Offloader(run, student)
        teacher = offloader.to_teacher(loader.get)
        assert {p.device.type for p in student.parameters()} == {"cpu"}
        assert teacher.head.weight.is_cuda
        offloader.to_student()
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
