"""What a run logs: metrics.jsonl survives a truncated line, and an idle command writes nothing."""

from pathlib import Path

import pytest

from stages.runtime import ending
from stages.runtime import run as runs
from stages.runtime.metrics import PHASES
from stages.runtime.metrics import read as read_metrics
from tests.support.helpers import make_run
from tests.support.tiny_runs import TINY

GATE = {
    "gate_histogram": [1],
    "divergence_histogram": [1],
    "histogram_from": 1e-6,
    "histogram_bins_per_decade": 4,
    "by_position": {},
    "by_age": {},
}


def kinds(path: Path) -> list[str]:
    return [record["kind"] for record in read_metrics(path)]


def test_the_time_of_a_command_that_is_interrupted_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, **TINY)
    run.claim()
    ending.run_tasks()
    assert not run.metrics.path.exists(), "a command that did nothing leaves no files"
    run.claim()
    with run.clock.phase("rollout"):
        run.metrics.log("eval", step=0)
        assert kinds(run.metrics.path) == ["eval"]
        monkeypatch.setattr(runs, "NOTE_SECONDS", 0.0)  # as after half a minute
        run.metrics.log("eval", step=1)
        assert kinds(run.metrics.path) == ["eval", "eval", "clock"]
        ending.run_tasks(quick_only=True)  # as a signal does
    *_, before, last = read_metrics(run.metrics.path)
    assert last["kind"] == "clock"
    assert last["start"] == before["start"] == run.clock.started
    assert last["total"] > before["total"]
    assert last["total"] - sum(last[phase] for phase in PHASES) < 0.5


def test_a_metrics_line_cut_off_by_a_crash_does_not_swallow_the_next(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    run.metrics.log("step", step=1, loss=0.5)
    with run.metrics.path.open("a") as file:
        file.write('{"kind": "step", "st')
    make_run(tmp_path, **TINY).metrics.log("evaluation", step=2)
    assert kinds(run.metrics.path) == ["config", "step", "evaluation"]


def test_a_command_that_does_nothing_leaves_no_folder_and_its_records_come_with_the_first_work(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, **TINY)
    run.folder.rmdir()
    run.metrics.log("packing", packed=True)
    run.log_totals("train")
    assert list(tmp_path.iterdir()) == []
    run.metrics.log("step", step=1, loss=0.5)
    assert kinds(run.metrics.path) == ["packing", "clock", "memory", "config", "step"]
    assert (run.folder / "config.yaml").exists()


def test_going_back_to_a_step_drops_what_lies_beyond_it_with_the_first_record(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    for step in (1, 2, 3):
        run.metrics.log("step", step=step, loss=0.5)
        run.metrics.log("gate", step=step, **GATE)
    run.metrics.log("refresh", step=3, refresh_index=1)
    run.metrics.log("evaluation", label="after", step=3)
    again = make_run(tmp_path, **(TINY | {"lr": 0.25}))
    kept = run.metrics.path.read_bytes()
    again.metrics.rewind(1, 0)
    assert run.metrics.path.read_bytes() == kept
    again.metrics.log("step", step=2, loss=0.25)
    found = read_metrics(run.metrics.path)
    assert [(r["kind"], r.get("step") or r["from_step"]) for r in found] == [
        ("config", 1),
        ("step", 1),
        ("gate", 1),
        ("config", 2),
        ("step", 2),
    ]


def test_the_configuration_of_a_run_is_that_of_its_newest_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    run.metrics.log("step", step=1, loss=0.5)
    kept = (run.folder / "config.yaml").read_bytes()
    make_run(tmp_path, **(TINY | {"tau": 0.75})).metrics.log("evaluation", label="after", step=1)
    assert (run.folder / "config.yaml").read_bytes() == kept
    make_run(tmp_path, **(TINY | {"tau": 0.75})).metrics.log("step", step=2, loss=0.5)
    assert b"tau: 0.75" in (run.folder / "config.yaml").read_bytes()
