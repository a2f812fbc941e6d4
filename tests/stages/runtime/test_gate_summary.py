"""The report's part on the gate: what is pooled over steps, and what the page shows of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import report
from stages.runtime.gate_summary import gate_summary
from tests.support.helpers import records_of
from tests.support.tiny_runs import train_from
from tests.support.viewing import data_of


def gate(step: int, tau: float | None, histogram: list[int], **tables: Any) -> dict[str, Any]:
    known = {} if tau is None else {"tau": tau}
    return {
        "kind": "gate",
        "step": step,
        **known,
        "gate_histogram": histogram,
        "divergence_histogram": histogram[::-1],
        "histogram_from": 1e-6,
        "histogram_bins_per_decade": 4,
        "by_position": {},
        "by_age": {},
        **tables,
    }


def row(tokens: int, value: float, **extra: float) -> dict[str, float]:
    return {"tokens": tokens, "gate": value, "rkl": 2 * value, "fkl": 3 * value, **extra}


def test_the_first_and_the_last_quarter_are_pooled_by_tokens() -> None:
    ages = {"64+": row(10, 0.1), "other runs": row(10, 0.2), "4-15": row(20, 0.3)}
    records = [gate(step, 0.1 * step, [step, 1], by_age=ages) for step in range(1, 9)]
    records[0]["by_position"] = {"0-15": row(30, 0.5, share_forward=0.2)}
    records[1]["by_position"] = {
        "0-15": row(10, 0.9, share_forward=0.6),
        "256+": row(40, 0.7, share_forward=0.1),
    }
    records += [
        {"kind": "step", "step": 1, "tokens": 10, "student_support_mass": 0.5},
        {"kind": "step", "step": 2, "tokens": 30, "student_support_mass": 0.9},
        {"kind": "step", "step": 8, "tokens": 30, "student_support_mass": None},
    ]
    found = gate_summary(records)
    first, last = found["first"], found["last"]
    assert (first["steps"], last["steps"]) == ([1, 2], [7, 8])
    assert (first["tau"], last["tau"]) == (0.2, 0.8)
    assert (first["gate_histogram"], first["divergence_histogram"], last["gate_histogram"]) == (
        [3, 2],
        [2, 3],
        [15, 2],
    )
    near = first["by_position"]["0-15"]
    assert near == pytest.approx(
        {"tokens": 40, "share": 0.5, "gate": 0.6, "rkl": 1.2, "fkl": 1.8, "share_forward": 0.3}
    )
    assert list(first["by_age"]) == ["4-15", "64+", "other runs"]
    assert first["by_age"]["4-15"]["share_forward"] is None
    assert first["student_support_mass"] == pytest.approx(0.8)
    assert last["student_support_mass"] is None
    assert last["by_position"] == {}


def test_a_run_without_records_of_the_gate_has_no_summary() -> None:
    assert gate_summary([{"kind": "step", "step": 1}]) == {}


def page_of(run: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """report.json, and what report.html shows of the run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report.write_report(run.folder, run.config)
    assert json.loads((run.folder / "report.json").read_text()) == found
    return found, data_of((run.folder / "report.html").read_text())["runs"][0]


def test_the_report_shows_the_threshold_the_histograms_and_the_tables(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    values = {"tau": 0.5, "tau_share": 0.3, "max_steps": 4, "refresh_every": 0}
    run = train_from(tmp_path, caches(), **values)
    found, page = page_of(run)
    gates = records_of(run.folder, "gate")
    assert gates[-1]["tau"] < 0.5
    assert (found["gate"]["first"]["tau"], found["gate"]["last"]["tau"]) == (0.5, gates[-1]["tau"])
    assert found["gate"]["last"]["gate_histogram"] == gates[-1]["gate_histogram"]
    shown = page["gate"]
    assert shown["lambda_vs_d"]["tau"] == gates[-1]["tau"]
    assert len(shown["lambda_vs_d"]["edges"]) == len(shown["lambda_vs_d"]["counts"]) + 1
    assert sum(shown["lambda_vs_d"]["counts"]) == sum(
        step["tokens"] for step in records_of(run.folder, "step")
    )
    assert shown["histogram_over_time"]["counts"] == [gate["gate_histogram"] for gate in gates]
    assert shown["by_position"] == found["gate"]["last"]["by_position"]
    titles = [curve["title"] for curve in page["curves"]]
    assert {"Gate threshold", "Reverse KL on each side of τ"} <= {*titles}


def test_the_report_of_a_fixed_gate_has_no_threshold(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = train_from(tmp_path, caches(), gating="fixed", max_steps=2, refresh_every=0)
    found, page = page_of(run)
    assert found["gate"]["last"]["tau"] is None
    assert "Gate threshold" not in [curve["title"] for curve in page["curves"]]
    assert page["gate"]["lambda_vs_d"]["tau"] is None


def test_a_side_without_tokens_leaves_a_gap_in_its_curve(tmp_path: Path, caches: Callable[..., str]) -> None:
    run = train_from(tmp_path, caches(), tau=100.0, max_steps=1, refresh_every=0)
    assert records_of(run.folder, "step")[0]["rkl_above"] is None
    page = page_of(run)[1]
    assert "rkl_above" not in page["steps"]
    assert page["steps"]["rkl_below"][0] is not None
