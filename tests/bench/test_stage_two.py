"""`bench/stage_two.py` at a tiny shape on the CPU: its cells, its counting, and resuming."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from bench import parts, stage_two


def bench(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run on the CPU at the tiny shape; the cells of the results file."""
    stage_two.PROGRAM.main(["--device", "cpu", "--tiny", "--out", str(folder), *arguments])
    return json.loads((folder / "stage_two.json").read_text())["cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench")
    bench(path, "--only", "packed", "padded", "trl_sft")
    return path


def test_our_cells_have_their_figures(folder: Path) -> None:
    cells = json.loads((folder / "stage_two.json").read_text())["cpu"]
    assert cells["padded"]["note"] == "packing is off"
    for name in ("packed", "padded"):
        found = cells[name]
        assert found["status"] == "ok", found
        assert found["tokens_per_second"] == pytest.approx(
            found["tokens_per_step"] / found["seconds_per_step"]
        )
        assert 8 * (2 + 12) <= found["tokens_per_step"] <= 8 * (6 + 12)
        assert 0 < found["mfu"] < 1
        assert 0 <= found["wait_share"] < 1


def test_our_cells_say_where_a_step_goes(folder: Path) -> None:
    found = json.loads((folder / "stage_two.json").read_text())["cpu"]["packed"]
    kernels = found["parts"].pop("kernels")
    assert len(kernels) == parts.NUM_NAMES
    assert kernels == sorted(kernels, key=lambda kernel: -kernel[0])
    assert found["parts"]["long_products"] + found["parts"].get("short_products", 0) > 0
    assert found["parts"]["attention"] > 0


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed here")
def test_a_peer_that_is_not_installed_says_so(folder: Path) -> None:
    found = json.loads((folder / "stage_two.json").read_text())["cpu"]["trl_sft"]
    assert (found["status"], found["message"]) == ("not installed", "No module named 'trl'")


def test_the_work_of_a_step_is_that_of_frozen_weights_and_the_head() -> None:
    """By hand, for two layers of width 32."""
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 8
    layer = attention + 3 * 32 * 48 + 2 * 32
    head = 4 * 503 * 32 * (8 * 12)
    assert stage_two.flops_per_step(stage_two.TINY, 100) == 4 * (2 * layer + 32) * 100 + head


def test_the_table_has_a_line_for_each_cell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(folder, "--table")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cpu")]
    assert [line.split("|")[2].strip() for line in lines] == ["packed", "padded", "trl_sft"]
