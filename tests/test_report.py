"""The report: fixed keys, figures, honest verdicts, and a page that stands alone."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages import report
from stages.runtime.config import Config
from tests.helpers import make_config

STEP = {
    "kind": "step", "loss": 0.2, "rkl": 0.5, "fkl": 0.2, "gate": 0.9, "share_forward": 0.12, "grad_norm": 0.3,
    "tokens": 100,
}  # fmt: skip
CLOCK = {"kind": "clock", "load": 1.0, "rollout": 2.0, "score": 3.0, "train": 4.0, "evaluate": 5.0, "total": 20.0}


def evaluation(accuracy: float | None, kl: float) -> dict[str, Any]:
    sample = {"prompt": "How many?", "completion": "<script>alert(1)</script>", "solved": True}
    texts = {"forward_kl": kl, "reverse_kl": 2 * kl, "top1_agreement": 0.5, "tokens": 10}
    return {**texts, "accuracy": accuracy, "on_student": texts, "samples": [sample]}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


@pytest.fixture
def folder(config: Config) -> Path:
    """A finished run with known figures, resumed once, whose cache is not there."""
    (config.run_folder / "eval").mkdir(parents=True)
    for label, found in (
        ("before", evaluation(0.3, 0.2)),
        ("after", evaluation(0.8, 0.05)),
        ("teacher", {"accuracy": 0.95, "samples": []}),
    ):
        (config.run_folder / "eval" / f"{label}.json").write_text(json.dumps(found))
    records = [
        CLOCK | {"start": 1, "total": 10.0}, CLOCK | {"start": 1}, STEP | {"step": 1}, {"kind": "refresh", "step": 1, "refresh_index": 1},
        STEP | {"step": 2, "gate": 0.95}, CLOCK | {"start": 2},
    ]  # fmt: skip
    (config.run_folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return config.run_folder


def test_the_figures_are_those_of_the_files(folder: Path, config: Config) -> None:
    found = report.write_report(folder, config)
    assert json.loads((folder / "report.json").read_text()) == found
    assert found["before"] == {
        "forward_kl": 0.2, "reverse_kl": 0.4, "top1_agreement": 0.5, "accuracy": 0.3,
        "on_student": {"forward_kl": 0.2, "reverse_kl": 0.4, "top1_agreement": 0.5},
    }  # fmt: skip
    assert found["after"]["accuracy"] == 0.8
    assert found["teacher"] == {"accuracy": 0.95}
    assert found["ratios"]["on_student"] == {"forward_kl": 0.25, "reverse_kl": 0.25}
    assert found["run"]["refreshes"] == 1
    assert found["run"]["first_step_share_forward"] == 0.12
    assert found["cache"] == dict.fromkeys(("rows", "scored_tokens", "bytes_per_token", "signal_bytes_per_token"))


def test_the_clocks_of_a_resumed_run_add_up(folder: Path, config: Config) -> None:
    seconds = report.collect(folder, config)["seconds"]
    assert seconds == {"load": 2, "rollout": 4, "score": 6, "train": 8, "evaluate": 10, "total": 40}


def changed(found: dict[str, Any], label: str, **values: Any) -> dict[str, Any]:
    other = copy.deepcopy(found)
    other[label] |= values
    other["ratios"] = report._ratios(other["before"], other["after"])
    return other


def test_the_verdict_says_what_the_numbers_say(folder: Path, config: Config) -> None:
    found = report.collect(folder, config)
    assert "improved by 50.0 points, from 30.0% to 80.0%" in found["verdict"]
    assert "forward KL fell to 0.25 ×" in found["verdict"]
    assert "got worse by 20.0 points" in report.verdict(changed(found, "after", accuracy=0.1))
    assert "did not improve" in report.verdict(changed(found, "after", accuracy=0.305))
    assert "no answers were checked" in report.verdict(changed(found, "after", accuracy=None))
    worse = {"forward_kl": 0.4, "reverse_kl": 0.9, "top1_agreement": 0.4}
    assert "forward KL rose to 2.00 ×" in report.verdict(changed(found, "after", on_student=worse))


def test_an_unfinished_run_is_called_unfinished(folder: Path, config: Config) -> None:
    (folder / "eval" / "after.json").unlink()
    found = report.write_report(folder, config)
    assert found["verdict"].startswith("Unfinished: 2 of")
    assert found["after"]["accuracy"] is None
    assert "–" in report.summary(found, folder, config)


def test_a_run_that_has_done_nothing_has_a_report_too(config: Config) -> None:
    config.run_folder.mkdir(parents=True)
    found = report.write_report(config.run_folder, config)
    assert found["verdict"] == "Not trained yet."
    assert "none noted" in report.summary(found, config.run_folder, config)


def test_the_page_stands_alone_and_escapes_what_models_write(folder: Path, config: Config) -> None:
    report.write_report(folder, config)
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 4
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert "improved by 50.0 points" in html


def test_the_summary_shows_before_after_and_teacher(folder: Path, config: Config) -> None:
    text = report.summary(report.collect(folder, config), folder, config)
    assert re.search(r"held-out problems solved\s+30.0%\s+80.0%\s+95.0%", text)
    assert "12.0% of tokens had λ < 0.5" in text
    assert "time    40 s: load 2 s (5%)" in text
