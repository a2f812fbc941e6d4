"""`bench/early_updates.py` at a tiny shape on the CPU: of an update what it should find there."""

import json
from pathlib import Path

import pytest

from bench import early_updates


def test_sums_and_students_are_compared(tmp_path: Path) -> None:
    early_updates.main(
        ["--device", "cpu", "--tiny", "--steps", "2", "--seconds", "0.01", "--out", str(tmp_path)]
    )
    found = json.loads((tmp_path / "early_updates.json").read_text())
    sums = found["sums"]["512 x 256 x 256"]
    assert sums["low / x W'"] == pytest.approx(2**-12, rel=0.1)
    assert sums["sum"]["share"] < 0.5
    assert sums["one product"]["share"] == pytest.approx(1, abs=0.1)
    untrained, _, trained = found["student"]
    assert untrained["moved"]["mean"] == 0 < trained["moved"]["mean"]
    for pair in ("training_fp32", "probe_fp32", "generator_fp32", "generator_probe"):
        assert 0 < trained[pair]["mean"] < 5e-3
