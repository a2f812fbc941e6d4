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


def test_kernels_are_told_apart_by_name_and_products_by_time() -> None:
    events = [
        parts.Event(name, start, seconds)
        for name, start, seconds in [
            ("nvjet_tst_256x128_64x4_bz_coopA_NTN", 0.0, 0.5),
            ("nvjet_tst_64x8_64x16_bz_TNT", 0.5, 0.01),
            ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", 0.51, 0.1),
            ("triton_red_fused__to_copy_mul_0", 0.61, 0.1),
            (
                "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>",
                0.6,
                0.2,
            ),
            ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor>", 0.9, 0.05),
            ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 1.0, 0.02),
            ("sparse_kernel", 1.02, 0.03),
        ]
    ]
    found = parts.Profile(events, least_weights=100, num_forwards=2).parts(50, 1.2, 50_000)
    found.pop("kernels")
    assert found == pytest.approx(
        {
            "long_products": 0.5,
            "short_products": 0.01,
            "attention": 0.1,
            "fused": 0.1,
            "copies": 0.2,
            "elementwise": 0.05,
            "optimizer": 0.02,
            "loss": 0.03,
            "idle": 0.3,
        }
    )


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


def test_what_was_measured_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = bench(folder, "--only", "padded")
    assert "0 cells to measure, 1 kept" in capsys.readouterr().out
    assert bench(folder, "--only", "padded", "--again")["padded"] != before["padded"]


def test_the_table_has_a_line_for_each_cell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(folder, "--table")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cpu")]
    assert [line.split("|")[2].strip() for line in lines] == ["packed", "padded", "trl_sft"]
