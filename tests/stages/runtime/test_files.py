"""A run's own files: whole, durable, inside its folder, and checked where they are read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.loops import measure, setup, versions
from stages.models import student as students
from stages.models.student import policy_hash
from stages.runtime import checkpoint, files, locks, metrics, schema
from stages.runtime.checkpoint import Position, Refresh
from stages.runtime.errors import UserError
from stages.runtime.run import FOLDERS
from tests.support.helpers import make_run, records_of
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY, policy_of, student_of, train_from

STEP = {"kind": "step", "step": 1, "tokens": 8, "loss": 0.5}
ONCE: dict[str, Any] = {"max_steps": 1, "refresh_every": 0}


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("precious")
    return path


def make_link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def make_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def make_folder(path: Path, _: Path) -> None:
    path.mkdir()


ODD_FILES = pytest.mark.parametrize("make", [make_link, make_pipe, make_folder])


# Links, pipes, moved folders


def test_a_text_replaces_links_and_follows_none(tmp_path: Path, precious: Path) -> None:
    path = tmp_path / "report.json"
    path.symlink_to(precious)
    (tmp_path / "report.json.partial").symlink_to(precious)
    files.replace_text(path, "new \udcff")
    assert not path.is_symlink()
    assert path.read_text() == "new \\udcff"
    assert precious.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "report.json"]


def test_a_text_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = tmp_path / "a", []
    monkeypatch.setattr(files.os, "fsync", lambda _: told.append((tmp_path / "a.partial").read_text()))
    files.replace_text(path, "text")
    assert told == ["text"]


@ODD_FILES
def test_a_lock_and_metrics_that_are_no_files_are_a_sentence(
    tmp_path: Path, precious: Path, make: Callable[[Path, Path], None]
) -> None:
    run = make_run(tmp_path, **TINY)
    for path in (run.folder / "run.lock", run.metrics.path):
        make(path, precious)
        with pytest.raises(UserError, match=rf"{path} is a link, a folder, a pipe or a device.*Remove it"):
            locks.take(path, "the run") if path.suffix == ".lock" else run.metrics.log("step", step=1)
    with pytest.raises(UserError, match="a run keeps a regular file there"):
        metrics.read(run.metrics.path)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_whose_own_folder_is_a_link_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    run = make_run(tmp_path, **TINY)
    (tmp_path / "mine").mkdir()
    (run.folder / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=rf"{name} is a link; .*Remove the link"):
        run.claim()
    assert [path.name for path in run.folder.iterdir()] == [name]


def test_the_folder_of_a_run_that_was_moved_is_not_made_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    run.metrics.log("step", step=1, loss=0.5)
    run.folder.rename(tmp_path / "elsewhere")
    for write in (
        lambda: files.replace_text(run.folder / "probe.json", "{}"),
        lambda: run.metrics.log("step", step=2, loss=0.5),
        lambda: files.new_folder(run.folder / "checkpoints/step-000001"),
    ):
        with pytest.raises(FileNotFoundError):
            write()
    assert not run.folder.exists()


# The exported student


def test_an_exported_student_is_replaced_as_a_whole(
    tmp_path: Path, caches: Callable[..., str], precious: Path
) -> None:
    run = train_from(tmp_path, caches(), **ONCE)
    folder = run.folder / "student"
    (folder / "of another student").write_text("")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(precious)
    train_from(tmp_path, caches(), **(ONCE | {"max_steps": 2}))
    assert not (folder / "of another student").exists()
    assert "weights of step 2" in (folder / "README.md").read_text()
    assert precious.read_text() == "precious"
    assert [path.name for path in run.folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "error",
    leading(1, [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")]),
    ids=repr,
)
def test_a_full_disk_at_the_export_is_a_sentence_and_the_student_before_it_stays(
    tmp_path: Path, caches: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = train_from(tmp_path, caches(), **ONCE)
    kept = (run.folder / "student/README.md").read_bytes()

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(students, "replace_text", full)  # the last file
    with pytest.raises(
        UserError, match=r"student could not be written to .*No space left.*run the same command again"
    ):
        train_from(tmp_path, caches(), **(ONCE | {"max_steps": 2}))
    assert (run.folder / "student/README.md").read_bytes() == kept
    assert not (run.folder / ".partial-student").exists()
    monkeypatch.undo()
    train_from(tmp_path, caches(), **(ONCE | {"max_steps": 2}))
    assert records_of(run.folder, "export")[-1]["step"] == 2


def test_only_folders_named_as_versions_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.students, "export", lambda _, folder, __: folder.mkdir(parents=True))
    run = make_run(tmp_path)
    folder = run.folder
    kept = ("000001-mine", "000-notes", ".git", "elsewhere")
    for name in kept:
        (folder / "versions" / name).mkdir(parents=True)
    (folder / "versions/elsewhere/precious").write_text("")
    (folder / "versions/000000-00000000").symlink_to(folder / "versions/elsewhere")
    for index in range(1, 6):
        versions.publish(run, None, versions.Version(index, index, f"{index:016x}", 4))
    left = sorted(path.name for path in (folder / "versions").iterdir())
    assert left == sorted((*kept, "newest.json", *(f"{index:06d}-00000000" for index in (3, 4, 5))))
    assert (folder / "versions/elsewhere/precious").exists()


# Checkpoints


def saved(tmp_path: Path, step: int, keep: int = 9) -> tuple[Path, dict[str, torch.nn.Parameter], Any]:
    weights = {"w": torch.nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(weights.values())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    world = make_run(tmp_path, **TINY).world
    position = Position(step, 1, {1: Refresh(2, "f" * 16, "every")})
    saver, folder = checkpoint.Saver(), tmp_path / "checkpoints"
    path = saver.begin(folder, position, weights, optimizer, scheduler, world, keep)
    saver.settle(world)
    return path, weights, (optimizer, scheduler, world)


def test_a_checkpoint_that_is_a_link_is_removed_without_what_it_points_to(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path, 1)
    moved = path.rename(tmp_path / "elsewhere")
    path.symlink_to(moved)
    saved(tmp_path, 2, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert (moved / "state.json").exists()
    path.symlink_to(moved)
    checkpoint.discard_after(tmp_path / "checkpoints", 0)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert (moved / "state.json").exists()


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a word as step": lambda s: s["position"].update(step="x"),
    "a step below 0": lambda s: s["position"].update(step=-5),
    "another step": lambda s: s["position"].update(step=3),
    "a negative beginning": lambda s: s["position"].update(opened_at=-1),
    "words as refresh": lambda s: s["position"].update(refreshes={"1": "x"}),
    "a word as its step": lambda s: s["position"]["refreshes"]["1"].update(step="\x1b]0;"),
    "words as drift": lambda s: s["position"].update(recent=["a"]),
    "an unknown key": lambda s: s["position"].update(new=1),
    "no position": lambda s: s.pop("position"),
    "a digest that is none": lambda s: s["files"].update({"state.pt": 5}),
    "no digests": lambda s: s.update(files={}),
    "no digest of the weights": lambda s: s["files"].pop("student.safetensors"),
    "no digest of the optimizer": lambda s: s["files"].pop("optimizer.pt"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_sealed_state_of_wrong_types_or_without_digests_is_damage(tmp_path: Path, name: str) -> None:
    path, weights, rest = saved(tmp_path, 2)
    assert checkpoint.load(path, weights, *rest) == Position(2, 1, {1: Refresh(2, "f" * 16, "every")})
    state = json.loads((path / "state.json").read_text())
    state.pop("sha256")
    CHANGES[name](state)
    (path / "state.json").write_text(json.dumps(state | {"sha256": checkpoint._digest(state)}))
    with pytest.raises(UserError, match=r"is damaged \(.*\)\. Delete that folder") as caught:
        checkpoint.load(path, weights, *rest)
    assert str(caught.value).isprintable()


# Records and evaluations


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "step"},
        STEP | {"step": "x"},
        STEP | {"loss": "0.5"},
        STEP | {"loss": 10**400},
        {"kind": 5},
        {"kind": "clock"},
        {"kind": "config"},
        {"kind": "config", "from_step": 1, "config": {"a": 5}},
        {"kind": "gate"},
        {"kind": "refresh"},
        {"kind": "warning"},
        {"kind": "eval", "step": [], "forward_kl": 1.0},
        {"kind": "export", "step": 1},
        {"kind": "rollout_progress", "evaluation": False},
        [STEP],
        {"kind": "x", "deep": json.loads("[" * 60 + "]" * 60)},
    ],
    ids=lambda record: str(record)[:50],
)
def test_a_record_without_what_its_kind_must_hold_is_skipped(tmp_path: Path, record: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (STEP, record, STEP)))
    assert metrics.read(path) == [STEP, STEP]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        "\0" * 500,
        '{"samples": 5}',
        '{"samples": [{"prompt": 1}]}',
        '{"accuracy": "x"}',
        '{"on_student": 5}',
        '{"of": []}',
        '{"text_rows": [1]}',
    ],
    ids=lambda text: text[:30].replace("\0", "0"),
)
def test_an_evaluation_that_cannot_be_read_counts_as_none_and_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "after.json").write_text(text)
    said: list[str] = []
    assert schema.evaluation(tmp_path / "after.json", said.append) == {}
    (line,) = said
    assert line.endswith("it counts as not measured")
    assert line.isprintable()


def test_an_evaluation_that_a_power_cut_emptied_is_measured_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, **(TINY | {"eval_prompts": 4}))
    evaluation = measure.open_evaluation(run, setup.shared_vocabulary(run.config))
    student = student_of(run)
    policy = policy_of(run, student)
    first = measure.measure(evaluation, student, policy, "before", None)
    assert records_of(run.folder, "evaluation")[0]["policy_hash"] == policy_hash(student)
    (run.folder / "eval/before.json").write_text("")
    assert measure.measure(evaluation, student, policy, "before", None) == first
    assert measure.measure(evaluation, student, policy, "before", None) == first
    assert len(records_of(run.folder, "evaluation")) == 2


def test_a_published_folder_is_on_disk_with_the_names_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash after the rename could otherwise leave a folder without some of its files."""
    inner = tmp_path / "partial" / "deepspeed"
    inner.mkdir(parents=True)
    (inner / "weights").write_text("w")
    synced = []

    def noted(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "final").exists()))

    monkeypatch.setattr(files.os, "fsync", noted)
    files.publish_folder(tmp_path / "partial", tmp_path / "final")
    final = tmp_path / "final"
    before = {path.stat().st_ino for path in (final, final / "deepspeed", final / "deepspeed" / "weights")}
    assert {node for node, is_published in synced if not is_published} == before
    assert (tmp_path.stat().st_ino, True) in synced


def test_an_unneeded_folder_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder that was replaced, for example, while another process holds a file of it on NFS."""
    for name in ("partial", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)

    def busy(path: Path) -> None:
        if path.exists():
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(files, "remove", busy)
    files.publish_folder(tmp_path / "partial", tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["partial"]
    assert "warning: " in (told := capfd.readouterr().err)
    assert ".old-final could not be removed (Device or resource busy)" in told
    monkeypatch.undo()
    files.discard_unneeded(tmp_path.glob(".old-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
