"""`bench/stage_one.py` at a tiny shape on the CPU: every cell gives its figures, and what was measured is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import stage_one, stage_one_decode


def bench(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    stage_one.main(["--device", "cpu", "--tiny", "--out", str(folder), "--seconds", "0.01", *arguments])
    return json.loads((folder / "stage_one.json").read_text())["cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench")
    bench(path)
    return path


def test_every_cell_gives_its_figures(folder: Path) -> None:
    cells = json.loads((folder / "stage_one.json").read_text())["cpu"]
    assert set(cells) == {"ceilings", *(cell.name for cell in stage_one.all_cells(tiny=True))}
    assert {name: record.get("message") for name, record in cells.items() if record["status"] != "ok"} == {}
    for name, record in cells.items():
        if name.startswith("decode/") and "/parts/" not in name:
            assert record["tokens_per_second"] > 0
    whole = cells["decode/whole/4"]
    assert whole["share_of_floor"] == pytest.approx(whole["tokens_per_second"] / whole["floor_tokens_per_second"])


def test_what_was_measured_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((folder / "stage_one.json").read_text())["cpu"]["decode/steps/4"]
    assert bench(folder, "--only", "decode/steps/*")["decode/steps/4"] == before
    assert "0 cells to measure, 1 kept" in capsys.readouterr().out
    assert bench(folder, "--only", "decode/steps/*", "--again")["decode/steps/4"] != before


def test_a_failure_is_recorded_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_one_decode, "method_of", lambda *_: 1 / 0)
    cells = bench(tmp_path, "--only", "decode/steps/*", "decode/whole/*")
    assert cells["decode/steps/4"]["status"] == "error"
    assert "ZeroDivisionError" in cells["decode/steps/4"]["message"]
    assert cells["decode/whole/4"]["status"] == "ok"


def test_the_table_names_every_cell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage_one.main(["--table", "--out", str(folder)])
    text = capsys.readouterr().out
    assert "| decode/spread/4 | ok | tokens_per_second" in text


def test_the_floor_is_that_of_the_design() -> None:
    """Qwen3-4B's 4.02e9 weights at 4.3 TB/s and 793 TFLOP/s: 4.85 ms a step at batch 256, 52,800 tokens/s."""

    class Weights:
        def parameters(self) -> list[Any]:
            return [self]

        def numel(self) -> int:
            return 4_022_468_096

    rates = {"copy_tb_per_second": 4.3, "product_tflops": 793.0}
    context = stage_one.Bench("cuda", 1.0, rates)
    assert stage_one_decode.floor_ms(context, Weights(), stage_one_decode.STUDENT, 256) == pytest.approx(4.85, abs=0.01)
