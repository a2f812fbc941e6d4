"""Weights & Biases: every record arrives under stable names, one run for all starts, and a site that fails
stops nothing.
"""

import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from stages.runtime import site
from stages.runtime.errors import UserError
from tests.support.helpers import make_run
from tests.support.tiny_runs import TINY

VALUES = TINY | {"wandb_project": "p"}


class Recorder:
    """Stands in for the module wandb: what it is told, with wandb's rule that a step below the counter is
    dropped.
    """

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, Any] = {}
        self.is_finished = False

    def module(self) -> Any:
        module: Any = types.ModuleType("wandb")
        module.__spec__ = types.SimpleNamespace()
        module.init = self.init
        module.Histogram = lambda **k: ("histogram", k)
        module.Table = lambda **k: ("table", k)
        return module

    def init(self, **options: Any) -> "Recorder":
        self.inits.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        self.rows.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder.module())
    return recorder


def test_every_step_arrives_whatever_is_logged_between_under_its_own_axis(
    tmp_path: Path, wandb: Recorder
) -> None:
    run = make_run(tmp_path, **VALUES)
    for step in range(1, 49):
        run.metrics.log("rollout_progress", rollouts=step)
        run.metrics.log("step", step=step, loss=1 / step)
        run.metrics.log("refresh", step=step, refresh_index=step)
    run.metrics.close()
    assert [row["step/loss"] for row in wandb.rows if "step/loss" in row] == [
        1 / step for step in range(1, 49)
    ]
    assert [row["step"] for row in wandb.rows if "refresh/refresh_index" in row] == list(range(1, 49))
    assert wandb.axes["step/*"] == wandb.axes["gate/*"] == "step"
    assert wandb.axes["rollout_progress/*"] == "time"
    assert wandb.is_finished


def test_the_site_gets_nested_tables_and_histograms(tmp_path: Path, wandb: Recorder) -> None:
    run = make_run(tmp_path, **VALUES)
    table = {"0-3": {"tokens": 7, "rkl": 0.5}, "other runs": {"tokens": 2, "rkl": None}}
    run.metrics.log("step", step=4, loss=0.5, tokens=9)
    run.metrics.log(
        "gate",
        step=4,
        tau=0.25,
        by_age=table,
        gate_histogram=[1, 2],
        divergence_histogram=[3, 4, 5],
        histogram_from=0.01,
        histogram_bins_per_decade=1,
        reason="none",
    )
    run.metrics.close()
    row = wandb.rows[-1]
    numbers = {"tau": 0.25, "by_age/0-3/tokens": 7, "by_age/0-3/rkl": 0.5, "by_age/other runs/tokens": 2}
    assert {f"gate/{name}": value for name, value in numbers.items()}.items() <= row.items()
    gate, divergence = (
        [part.tolist() for part in row[f"gate/{name}"][1]["np_histogram"]]
        for name in ("lambda", "log10_divergence")
    )
    assert gate == [[1, 2], [0, 0.5, 1]]
    assert divergence == [[3, 4, 5], [-3, -2, -1, 0]]


def test_evaluations_are_in_the_summary_and_in_tables_with_their_samples(
    tmp_path: Path, wandb: Recorder
) -> None:
    run = make_run(tmp_path, **VALUES)
    sample = {"prompt": "1+1?", "completion": "2", "solved": True}
    for label, step in (("before", 0), ("after", 6)):
        run.metrics.log(
            "evaluation",
            label=label,
            step=step,
            reverse_kl=0.5,
            accuracy=0.25,
            cut_share=0.125,
            on_student={"reverse_kl": 0.75},
            samples=[sample],
        )
    run.metrics.close()
    assert {
        "before/reverse_kl": 0.5,
        "after/accuracy": 0.25,
        "after/on_student/reverse_kl": 0.75,
    }.items() <= wandb.summary.items()
    assert wandb.summary["cut_share"] == wandb.summary["after/cut_share"] == 0.125
    table = wandb.rows[-1]["evaluations"][1]
    assert [row[0] for row in table["data"]] == ["before", "after"]
    assert wandb.rows[-1]["samples/after"][1]["data"] == [["1+1?", "2", True]]


def test_all_starts_of_a_run_are_one_run_on_the_site_and_other_folders_another(
    tmp_path: Path, wandb: Recorder
) -> None:
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        run = make_run(folder, **VALUES)
        run.metrics.log("step", step=1, loss=0.5)
        run.metrics.close()
    ids = [options["id"] for options in wandb.inits]
    assert ids[0] == ids[1] != ids[2]


def test_a_name_on_the_site_that_a_crash_cut_off_is_made_anew(tmp_path: Path, wandb: Recorder) -> None:
    run = make_run(tmp_path, **VALUES)
    (run.folder / "wandb_id").write_text("")
    run.metrics.log("step", step=1, loss=0.5)
    run.metrics.close()
    assert wandb.inits[0]["id"] == (run.folder / "wandb_id").read_text() != ""


def test_a_real_run_is_written_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = make_run(tmp_path, **VALUES)
    assert not list(run.folder.glob("**/*.wandb"))
    run.metrics.log("step", step=1, loss=0.5)
    run.metrics.close()
    (file,) = run.folder.glob("**/*.wandb")
    end = time.monotonic() + 30  # wandb's own process writes it
    while b"step/loss" not in file.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_site_that_fails_is_told_once_and_stops_nothing(
    tmp_path: Path, wandb: Recorder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(values: dict[str, Any]) -> None:
        raise RuntimeError("the site is on fire")

    monkeypatch.setattr(wandb, "log", fail)
    run = make_run(tmp_path, **VALUES)
    for step in (1, 2, 3):
        run.metrics.log("step", step=step, loss=0.5)
    run.metrics.close()
    assert capfd.readouterr().out.count("the site is on fire") == 1
    assert run.metrics.path.read_text().count('"kind": "step"') == 3


def test_without_a_network_records_are_kept_for_later(
    tmp_path: Path, wandb: Recorder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def init(mode: str = "", **options: Any) -> Recorder:
        if mode != "offline":
            raise OSError("no route to host")
        return wandb

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    run = make_run(tmp_path, **VALUES)
    run.metrics.log("step", step=1, loss=0.5)
    run.metrics.close()
    assert "no route to host" in capfd.readouterr().out
    assert wandb.rows[0]["step/loss"] == 0.5


def test_a_site_that_answers_nothing_costs_a_step_no_time_and_the_end_little(
    tmp_path: Path, wandb: Recorder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: time.sleep(60))
    monkeypatch.setattr(site, "PATIENCE", 0.2)
    monkeypatch.setattr(site.ending, "abandon", lambda: None)
    run, began = make_run(tmp_path, **VALUES), time.monotonic()
    run.metrics.log("step", step=1, loss=0.5)
    run.metrics.close()
    assert time.monotonic() - began < 5
    assert "metrics.jsonl has them" in capfd.readouterr().out


def test_a_project_on_the_site_without_its_package_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb cannot be imported here.*or leave wandb_project empty"):
        make_run(tmp_path, **(TINY | {"wandb_project": "p"}))
