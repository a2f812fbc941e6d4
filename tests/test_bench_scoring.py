"""`bench/stage_one_scoring.py` at a tiny shape on the CPU."""

import pytest

from bench import stage_one_scoring


def test_every_cell_has_its_times_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    found = stage_one_scoring.main(["--tiny", "--device", "cpu", "--repeats", "1"])
    assert set(found) == set(stage_one_scoring.CELLS)
    for record in found.values():
        assert all(value > 0 for value in record.values())
        assert record["selection_over_topk"] == record["selection_ms"] / record["topk_ms"]
    assert capsys.readouterr().out.count('"cell"') == len(found)


def test_cells_are_chosen_by_pattern_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--device", "cpu", "--repeats", "1", "--only"]
    assert set(stage_one_scoring.main([*arguments, "*/nucleus"])) == {"selection/nucleus"}
    with pytest.raises(SystemExit):
        stage_one_scoring.main([*arguments, "decode/*"])
    assert "no cell matches decode/*" in capsys.readouterr().err
