"""`bench/stage_one.py` at a tiny shape on the CPU: its cells give their figures, and what was measured is
kept.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import cells, stage_one, stage_one_decode


def bench(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    stage_one.PROGRAM.main(
        ["--device", "cpu", "--tiny", "--out", str(folder), "--seconds", "0.01", *arguments]
    )
    return json.loads((folder / "stage_one.json").read_text())["cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench")
    bench(path, "--only", "decode/*", "selection/*", "scoring")
    return path


def test_every_cell_in_this_process_gives_its_figures(folder: Path) -> None:
    """All but the last, which sets its process up for DeepSpeed (tests/bench/test_stage_one_teacher.py)."""
    found = json.loads((folder / "stage_one.json").read_text())["cpu"]
    *names, last = (cell.name for cell in stage_one.all_cells(tiny=True))
    assert last == "zero3"
    assert set(found) == {"ceilings", *names}
    assert {name: record.get("message") for name, record in found.items() if record["status"] != "ok"} == {}
    for name, record in found.items():
        if name.startswith("decode/") and "/parts/" not in name:
            assert record["tokens_per_second"] > 0
    whole = found["decode/whole/4"]
    assert whole["share_of_floor"] == pytest.approx(
        whole["tokens_per_second"] / whole["floor_tokens_per_second"]
    )


def test_what_was_measured_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((folder / "stage_one.json").read_text())["cpu"]["decode/steps/4"]
    assert bench(folder, "--only", "decode/steps/*")["decode/steps/4"] == before
    assert "0 cells to measure, 1 kept" in capsys.readouterr().out
    assert bench(folder, "--only", "decode/steps/*", "--again")["decode/steps/4"] != before


def test_a_failure_is_recorded_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_one_decode, "method_of", lambda *_: 1 / 0)
    found = bench(tmp_path, "--only", "decode/steps/*", "decode/whole/*")
    assert found["decode/steps/4"]["status"] == "error"
    assert "ZeroDivisionError" in found["decode/steps/4"]["message"]
    assert found["decode/whole/4"]["status"] == "ok"
    monkeypatch.undo()
    assert bench(tmp_path, "--only", "decode/steps/*")["decode/steps/4"]["status"] == "ok"  # tried again


def test_a_peak_is_of_its_own_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(stage_one_decode, "reset_peak", lambda device: calls.append("reset"))
    monkeypatch.setattr(stage_one_decode, "peak_gib", lambda device: calls.append("read") or 1.0)
    context = cells.Bench("cpu", 0.01, {"copy_tb_per_second": 1.0, "product_tflops": 1.0})
    for cell in stage_one_decode.cells(tiny=True)[:3]:
        cell.measure(context)
    assert calls == ["reset", "reset", "read", "reset", "read"]


def test_figures_of_tiny_shapes_do_not_pass_for_others(folder: Path) -> None:
    record = json.loads((folder / "stage_one.json").read_text())["cpu"]["scoring"]
    (scoring,) = (cell for cell in stage_one.all_cells(tiny=False) if cell.name == "scoring")
    assert cells.is_done(record, scoring, tiny=True)
    assert not cells.is_done(record, scoring, tiny=False)


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no cell matches decoding/\*; --list names them all\."):
        bench(tmp_path, "--only", "decoding/*")


def test_what_cannot_be_had_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"stage_one\.json does not exist; measure first"):
        stage_one.PROGRAM.main(["--table", "--out", str(tmp_path)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        stage_one.PROGRAM.main(["--device", "cuda", "--out", str(tmp_path)])


def test_only_the_newest_of_the_things_made_is_kept() -> None:
    context = cells.Bench("cpu", 0.0, {})
    first = context.make("student", object)
    assert context.make("student", object) is first
    context.make("teacher", object)
    assert list(context.made) == ["teacher"]


def test_the_table_names_every_cell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage_one.PROGRAM.main(["--table", "--out", str(folder)])
    text = capsys.readouterr().out
    assert "| decode/spread/4 | ok | tokens_per_second" in text


def test_the_floor_is_that_of_the_design() -> None:
    """Qwen3-4B's 4.02e9 weights at 4.3 TB/s and 793 TFLOP/s: 4.85 ms a step at batch 256, 52,800 tokens/s."""

    class Weights:
        def named_parameters(self) -> list[tuple[str, Any]]:
            return [("weight", self)]

        def numel(self) -> int:
            return 4_022_468_096

    rates = {"copy_tb_per_second": 4.3, "product_tflops": 793.0}
    context = cells.Bench("cuda", 1.0, rates)
    assert stage_one_decode.floor_ms(context, Weights(), stage_one_decode.STUDENT, 256) == pytest.approx(
        4.85, abs=0.01
    )
