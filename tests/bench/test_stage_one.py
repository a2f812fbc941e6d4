"""`bench/stage_one.py` at a tiny shape on the CPU: its cells give their figures."""

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


def test_every_cell_in_this_process_gives_its_figures(tmp_path: Path) -> None:
    """All but the last, which takes two processes of its own (tests/bench/test_stage_one_teacher.py)."""
    found = bench(tmp_path, "--only", "decode/*", "selection/*", "scoring", "sharing/*")
    vllm, *names, last = (cell.name for cell in stage_one.all_cells(tiny=True))
    assert (vllm, last) == ("vllm/4", "zero3")
    assert set(found) == {"ceilings", *names}
    assert {name: record.get("message") for name, record in found.items() if record["status"] != "ok"} == {}
    for name, record in found.items():
        if name.startswith("decode/") and "/parts/" not in name:
            assert record["tokens_per_second"] > 0
    whole = found["decode/whole/4"]
    assert whole["share_of_floor"] == pytest.approx(
        whole["tokens_per_second"] / whole["floor_tokens_per_second"]
    )


def test_a_peak_is_of_its_own_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(stage_one_decode, "reset_peak", lambda device: calls.append("reset"))
    monkeypatch.setattr(stage_one_decode, "peak_gib", lambda device: calls.append("read") or 1.0)
    context = cells.Bench("cpu", 0.01, {"copy_tb_per_second": 1.0, "product_tflops": 1.0})
    for cell in stage_one_decode.cells(tiny=True)[:3]:
        cell.measure(context)
    assert calls == ["reset", "reset", "read", "reset", "read"]


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
