"""The bake-off's contenders: when their weights are copied, and both of them at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.bakeoff import __main__ as bakeoff
from bench.bakeoff.snapshots import Snapshots
from bench.bakeoff.tasks import TASKS, Cell
from bench.bakeoff.worker import GROUP, Lab, Place
from bench.trl_peer import environment
from stages.runtime.config import parse_arguments

NO_TRL = importlib.util.find_spec("trl") is None


def test_weights_are_copied_once_after_each_point_of_time_and_at_the_end(tmp_path: Path) -> None:
    now, weight = [0.0], torch.zeros(2)
    found = Snapshots(10.0, "cpu", lambda: now[0])
    now[0] = 100.0
    found.begin({"w": weight})
    for step, now[0] in enumerate((104.0, 111.0, 113.0, 135.0, 136.0, 139.0), 1):
        weight.fill_(step)
        found.look(step, is_last=step == 6)
    assert [(p["step"], p["seconds"]) for p in found.points] == [(2, 11.0), (4, 35.0), (6, 39.0)]
    found.save(tmp_path, phases={})
    assert load_file(tmp_path / "1.safetensors")["w"].tolist() == [4.0, 4.0]
    assert json.loads((tmp_path / "found.json").read_text())["setup_seconds"] == 100.0


def test_the_folder_of_vllm_comes_first_and_must_hold_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no site/vllm"):
        environment(tmp_path)
    (tmp_path / "site/vllm").mkdir(parents=True)
    assert environment(tmp_path)["PYTHONPATH"].startswith(f"{tmp_path}/site:{tmp_path}/stubs")


def test_rivals_refuse_more_workers_than_cards(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--workers 1"):
        bakeoff.main(["--rivals", "--tasks", "demo", "--workers", "2", "--out", str(tmp_path)])


def race(folder: Path, contender: str) -> dict:
    out, name = folder / "out", f"demo.demo.rival-{contender}.lr0.001.t2.s0"
    arguments = ["--rivals", "--tasks", "demo", "--device", "cpu", "--tiny", "--seconds", "2"]
    arguments += ["--work", str(folder / "work"), "--out", str(out), "--minutes", "2", "--only", name]
    bakeoff.main(arguments)
    assert (out / f"{name}.json").exists(), (folder / "work/logs/worker-0.log").read_text()[-3000:]
    return json.loads((out / f"{name}.json").read_text())


def test_the_own_run_writes_as_many_completions_of_a_prompt_as_the_cells_and_trl(tmp_path: Path) -> None:
    lab = object.__new__(Lab)  # without its models
    lab.place = Place(tmp_path, tmp_path, "cpu")
    lab.task, lab.sizes = TASKS["demo"], TASKS["demo"].sizes
    arguments = lab.arguments(Cell("demo", "demo", "reverse", 1e-3, 0), {"gating": 1.0}, "run")
    config = parse_arguments([text for text in arguments if text != "--quiet"], "")
    assert config.rollout.group_size == GROUP == 1


@pytest.mark.slow
def test_the_own_run_is_measured_at_its_end(tmp_path: Path) -> None:
    found = race(tmp_path, "ours-soft")
    last = found["points"][-1]
    assert last["step"] == 4
    assert last["on_student"]["reverse_kl"] == found["after"]["on_student"]["reverse_kl"] > 0
    assert found["phases"]["train"] > 0
    assert found["phases"]["rollout"] > 0
    assert found["trained_tokens"] > 0


@pytest.mark.slow
@pytest.mark.skipif(NO_TRL, reason="TRL is not installed here")
def test_trl_trains_for_its_seconds(tmp_path: Path) -> None:
    found = race(tmp_path, "trl")
    last = found["points"][-1]
    assert last["seconds"] >= 2
    assert len(found["points"]) > 1
    assert found["phases"]["generate"] + found["phases"]["teacher"] < found["phases"]["total"]
    assert found["trained_tokens"] >= last["tokens"] > 0
