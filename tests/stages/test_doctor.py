"""The doctor: what passes on the demo, and what each check says when something is wrong."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from stages import doctor
from stages.loops import checkup, machine
from stages.loops.checkup import Checkup
from stages.runtime import host_memory
from stages.runtime.errors import UserError
from tests.support.helpers import Forker, make_config, make_run
from tests.support.tiny_runs import TINY, student_of


def lines(out: str) -> dict[str, str]:
    """State of each check by name."""
    marked = [line.partition(": ")[0].split("  ", 1) for line in out.splitlines() if line[:4] in STATES]
    return {name: state for state, name in marked}


STATES = ("pass", "FAIL", "skip")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checkup:
    """A checkup whose models and files are read and whose student is loaded."""
    folder = tmp_path_factory.mktemp("doctor")
    found = Checkup(make_run(folder, **TINY), str(folder / "own"))
    for check in (checkup.check_models, checkup.check_files, checkup.check_student):
        check(found)
    return found


def test_the_demo_passes_and_leaves_nothing_behind(forked: Forker, tmp_path: Path) -> None:
    done = forked.stage("stages.doctor", "pipeline.yaml", "--runs_dir", str(tmp_path)).expect_success()
    found = lines(done.out)
    assert set(found) == set(doctor.CHECKS)
    assert {name for name, state in found.items() if state == "skip"} == {
        "processes",
        "wandb",
        "sharded = plain",
        "quantised = plain",
    }
    assert "no check failed, 4 were skipped" in done.out
    assert list(tmp_path.iterdir()) == []


def test_the_result_alone_is_printed_on_request(forked: Forker, tmp_path: Path) -> None:
    flags = ["pipeline.yaml", "--runs_dir", str(tmp_path), "--dataset", "nowhere.jsonl"]
    done = forked.stage("stages.doctor", *flags, "--json")
    assert done.code == 1
    states = {check["name"]: check["state"] for check in json.loads(done.out)["checks"]}
    assert states["files"] == "FAIL"
    assert list(states) == list(doctor.CHECKS)
    quiet = forked.stage("stages.doctor", *flags, "--quiet")
    assert quiet.code == 1
    assert "1 of 13 checks failed" in quiet.out


def test_two_processes_compare_the_sharded_teacher_with_the_plain_one(forked: Forker, tmp_path: Path) -> None:
    flags = ["--runs_dir", str(tmp_path), "--batch_size", "64"]
    done = forked.stage("stages.doctor", "pipeline.yaml", *flags, processes=2).expect_success()
    assert "pass  processes: 2 processes reach each other through gloo" in done.out
    assert lines(done.out)["sharded = plain"] == "pass"


def test_a_wrong_configuration_fails_with_sentences_and_code_1(forked: Forker, tmp_path: Path) -> None:
    flags = ["--runs_dir", str(tmp_path), "--dataset", "nowhere.jsonl", "--wandb_project", "p"]
    done = forked.stage("stages.doctor", "pipeline.yaml", *flags, WANDB_MODE="offline")
    assert done.code == 1
    assert "Traceback" not in done.err
    found = lines(done.out)
    assert [name for name, state in found.items() if state == "FAIL"] == ["files"]
    assert "FAIL  files: dataset nowhere.jsonl does not exist" in done.out
    assert "pass  wandb: WANDB_MODE=offline: nothing is sent" in done.out
    assert "skip  student: not run: there are no prompts" in done.out
    assert "1 of 13 checks failed" in done.out


@pytest.mark.parametrize(
    "values", [{}, {"signal": "hidden"}, {"objective": "jsd", "gating": "fixed"}], ids=str
)
def test_a_student_that_is_its_own_teacher_has_no_loss(tmp_path: Path, values: dict[str, Any]) -> None:
    subject = Checkup(make_run(tmp_path, **(TINY | values)), str(tmp_path / "own"))
    for check in (checkup.check_models, checkup.check_files, checkup.check_student):
        check(subject)
    assert float(checkup.check_loss(subject).split()[0]) < 1e-5


def test_a_loss_that_is_not_zero_fails(checked: Checkup, monkeypatch: pytest.MonkeyPatch) -> None:
    own = checkup.at_scored

    def wrong(hidden: torch.Tensor, aligned: Any) -> torch.Tensor:
        return own(hidden, aligned).roll(1, 0)  # a position off

    monkeypatch.setattr(checkup, "at_scored", wrong)
    with pytest.raises(UserError, match=r"own teacher has a loss of .* where rounding explains 0\.0001"):
        checkup.check_loss(checked)


def test_an_engine_without_the_adapter_fails(checked: Checkup, monkeypatch: pytest.MonkeyPatch) -> None:
    checkup.check_loss(checked)
    assert "nats a token apart" in checkup.check_engine(checked)
    own = checkup.open_engine

    def bare(model: Any) -> Any:
        engine = own(model)
        generate = engine.generate

        def without(*arguments: Any, **keywords: Any) -> Any:
            with model.disable_adapter():
                return generate(*arguments, **keywords)

        engine.generate = without  # type: ignore[method-assign]
        return engine

    monkeypatch.setattr(checkup, "open_engine", bare)
    with pytest.raises(UserError, match="student"):
        checkup.check_engine(checked)
    assert not any(p.any() for n, p in checked.student.trainable.items() if "lora_B" in n)


def test_the_adapter_is_restored(tmp_path: Path) -> None:
    student = student_of(make_run(tmp_path, **TINY))
    before = {name: p.detach().clone() for name, p in student.trainable.items()}
    with checkup.adapter_set(student, 0.1):
        assert all(p.any() for n, p in student.trainable.items() if "lora_B" in n)
    assert all(torch.equal(p, before[name]) for name, p in student.trainable.items())


# The machine


class Usage(NamedTuple):
    free: int


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    assert "runs_dir up to" in machine.disk(config, None)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(1000))
    with pytest.raises(
        UserError, match=r"has 0\.0 GB free, but the run needs up to .*choose another runs_dir"
    ):
        machine.disk(config, None)


def test_too_little_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    assert "GiB free" in machine.memory(run.config, run.world, None)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"weights of both models take .*close other programs"):
        machine.memory(run.config, run.world, None)


def test_wandb_that_cannot_be_reached_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    config = make_config(tmp_path, wandb_project="p")
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(machine.urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"cannot be reached \(no route\); set WANDB_MODE=offline"):
        machine.wandb(config)
    assert machine.wandb(make_config(tmp_path)) == "off: wandb_project is empty"
