"""`bench/loss.py` at a tiny shape on the CPU: its cells, its float64 references, and resuming."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import loss, loss_contenders
from bench.loss_problems import CONFIG, make_problem
from dualkl import HiddenTeacher, LogitsTeacher, TopKTeacher
from tests.support import reference

CASES = [
    f"{loss.TINY.name}/{kind}/{head}" for kind in ("hidden", "topk", "full") for head in ("frozen", "trained")
]


def bench(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run on the CPU at the tiny shape; the cells of the results file."""
    loss.PROGRAM.main(["--device", "cpu", "--tiny", "--seconds", "0.01", "--out", str(folder), *arguments])
    return json.loads((folder / "loss.json").read_text())["cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of ours and eager."""
    path = tmp_path_factory.mktemp("bench")
    bench(path, "--only", "*/dual_kl", "*/eager")
    return path


def test_every_case_has_its_figures_and_errors(folder: Path) -> None:
    cells = json.loads((folder / "loss.json").read_text())["cpu"]
    names = {f"{c}/{n}" for c in CASES for n in ("dual_kl", "eager")}
    assert set(cells) == {"ceilings", f"{loss.TINY.name}/floor"} | names
    for case in CASES:
        ours, eager = cells[f"{case}/dual_kl"], cells[f"{case}/eager"]
        assert ours["status"] == eager["status"] == "ok"
        assert 0 < ours["extra_gib"] < eager["extra_gib"]
        assert ours["ms"] == pytest.approx(ours["ratio"] * ours["floor_ms"])
        assert ("dW" in ours["errors"]) == case.endswith("trained")
        for name in {"dX", "dW"} & set(ours["errors"]):
            assert ours["errors"][name] < 2**-8 + 1e-3
            assert ours["errors"][name] < eager["errors"][name] < 0.1
        assert ours["errors"]["divergence_tolerances"] < 1
        assert ours["errors"]["gate"] < 1e-3
        assert eager["errors"]["loss"] < 0.05  # it rounds logits to bfloat16


def test_failures_are_recorded_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    def absent(*_: Any) -> Any:
        return loss_contenders._module("no_such_package")

    changed = {"eager": broken, "orda_entropy_gate": absent}
    contenders = [
        argparse.Namespace(**{**vars(c), "build": changed.get(c.name, c.build), "version": c.version})
        for c in loss.CONTENDERS
    ]
    monkeypatch.setattr(loss, "CONTENDERS", contenders)
    cells = bench(tmp_path, "--only", f"{CASES[0]}/eager", f"{CASES[0]}/orda*", f"{CASES[0]}/dual_kl")
    assert cells[f"{CASES[0]}/eager"]["status"] == "OOM"
    assert cells[f"{CASES[0]}/orda_entropy_gate"]["status"] == "not installed"
    assert cells[f"{CASES[0]}/dual_kl"]["status"] == "ok"


def test_the_tables_name_every_cell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss.PROGRAM.main(["--table", "--out", str(folder)])
    text = capsys.readouterr().out
    assert "| N48-V503-d32 topk, trained head | eager | F, R and gate on R | default |" in text
    assert f"| {CASES[0]}/dual_kl |" in text


def test_quick_and_full_runs_hold_the_headline_cells() -> None:
    quick = {cell.name for cell in loss.quick_cases("cuda")}
    names = [cell.name for cell in loss.full_grid()]
    assert len(names) == len(set(names))
    assert quick <= set(names)
    assert {f"N8192-V151936-d2560/{k}/{h}/dual_kl" for k in ("hidden", "topk") for h in loss.HEADS} <= quick


@pytest.mark.parametrize("kind", ["hidden", "topk", "full"])
def test_the_reference_is_the_oracle_of_the_tests(kind: str) -> None:
    problem = make_problem(loss.TINY, "cpu")
    found, teacher = problem.reference(kind, "gated"), problem.teacher(kind)
    if isinstance(teacher, HiddenTeacher):
        given: dict[str, Any] = {"hidden": teacher.hidden, "head": {"weight": teacher.lm_head}}
    elif isinstance(teacher, LogitsTeacher):
        given = {"logits": teacher.logits}
    else:
        assert isinstance(teacher, TopKTeacher)
        given = {"ids": teacher.ids, "logprobs": teacher.logprobs, "log_tail_mass": teacher.log_tail_mass}
    hidden = problem.hidden_Nd.double().requires_grad_()
    weight = problem.weight_Vd.double().requires_grad_()
    wanted = reference.dual_kl(hidden, {"weight": weight}, given, CONFIG)
    by_hidden, by_weight = torch.autograd.grad(wanted["loss"], (hidden, weight))
    assert found.loss == pytest.approx(float(wanted["loss"].detach()), rel=1e-9)
    for name in ("rkl", "fkl", "gate"):
        torch.testing.assert_close(found.columns[name], wanted[name], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.hidden_gradient, by_hidden[found.positions], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found.weight_gradient, by_weight[found.ids], rtol=1e-7, atol=1e-12)


def test_gates_spread_over_their_range() -> None:
    gates = make_problem(loss.TINY, "cpu").reference("hidden", "gated").columns["gate"]
    assert (gates > 0.9).float().mean() > 0.2
    assert (gates < 0.5).float().mean() > 0.02
