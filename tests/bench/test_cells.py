"""The harness of the benches: which cells are measured, kept and tried again, and what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cells
from bench.cells import Bench, Cell, Program


class Benched:
    """A program of two cells, and the names of those that were measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.labels: dict[str, Any] = {}
        self.program = Program("help", "some.json", self.cells, cells.table, minutes=1.0)

    def cells(self, options: Any) -> list[Cell]:
        return [Cell(name, self.measuring(name), (), (), self.labels) for name in ("a/1", "b/1")]

    def measuring(self, name: str) -> Any:
        def measure(bench: Bench) -> dict[str, Any]:
            self.calls.append(name)
            if name in self.failures:
                raise self.failures[name]
            return {"seconds": 0.5}

        return measure

    def __call__(self, *arguments: str) -> dict[str, dict[str, Any]]:
        """The records after a call with these arguments; `calls` holds the cells that it measured."""
        self.calls.clear()
        common = ["--device", "cpu", "--tiny", "--seconds", "0.001", "--out", str(self.folder)]
        self.program.main([*common, *arguments])
        return json.loads((self.folder / "some.json").read_text())["cpu"]


@pytest.fixture
def bench(tmp_path: Path) -> Benched:
    return Benched(tmp_path)


def test_every_cell_is_written_with_what_it_depends_on(bench: Benched) -> None:
    bench.labels = {"job": "sum"}
    found = bench()
    assert list(found) == ["ceilings", "a/1", "b/1"]
    assert found["ceilings"]["copy_tb_per_second"] > 0
    for name in ("a/1", "b/1"):
        record = found[name]
        assert (record["status"], record["seconds"], record["job"]) == ("ok", 0.5, "sum")
        assert (record["torch"], record["tiny"]) == (torch.__version__, True)


def test_what_was_measured_is_kept(bench: Benched, capsys: pytest.CaptureFixture[str]) -> None:
    bench("--only", "a/*")
    bench()
    assert bench.calls == ["b/1"]
    bench()
    assert bench.calls == []
    assert "0 cells to measure, 2 kept" in capsys.readouterr().out
    bench("--again", "--only", "a/*")
    assert bench.calls == ["a/1"]


def test_other_labels_sources_and_sizes_are_measured_anew(
    bench: Benched, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, (cell, _) = bench()["a/1"], bench.cells(None)
    assert cells.is_done(record, cell, tiny=True)
    assert not cells.is_done(record, cell, tiny=False)
    bench.labels = {"peer": "1.1"}
    assert not cells.is_done(record, bench.cells(None)[0], tiny=True)
    monkeypatch.setattr(cells, "sources_digest", lambda patterns: "other")
    assert not cells.is_done(record, cell, tiny=True)


@pytest.mark.parametrize(
    ("error", "status", "measured_again"),
    [
        (ZeroDivisionError("1 / 0"), "error", True),
        (ModuleNotFoundError("No module named 'trl'"), "not installed", True),
        (torch.OutOfMemoryError("no"), "OOM", False),
        (RuntimeError("CUDA out of memory"), "OOM", False),
    ],
)
def test_a_failure_is_recorded_and_the_run_goes_on(
    bench: Benched, error: Exception, status: str, measured_again: bool
) -> None:
    bench.failures["a/1"] = error
    found = bench()
    assert (found["a/1"]["status"], found["b/1"]["status"]) == (status, "ok")
    assert str(error) in found["a/1"]["message"]
    bench()
    assert bench.calls == ["a/1"] * measured_again


def test_no_cell_begins_after_the_last_minute(bench: Benched, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bench("--minutes", "0")) == ["ceilings"]
    assert "left: a/1 b/1" in capsys.readouterr().out


def test_wrong_calls_are_one_sentence(bench: Benched, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no cell matches c/\*; --list names them all\."):
        bench("--only", "c/*")
    with pytest.raises(SystemExit, match=r"some\.json does not exist; measure first"):
        bench("--table")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        bench("--device", "cuda")


def test_the_table_names_every_cell(bench: Benched, capsys: pytest.CaptureFixture[str]) -> None:
    bench.failures["b/1"] = ZeroDivisionError("1 / 0")
    bench()
    bench("--table")
    lines = capsys.readouterr().out.splitlines()
    assert "| a/1 | ok | seconds 0.500 |" in lines
    assert "| b/1 | error |  |" in lines


def test_only_the_newest_of_the_things_made_is_kept() -> None:
    shared = Bench("cpu", 0.0, {})
    first = shared.make("student", object)
    assert shared.make("student", object) is first
    shared.make("teacher", object)
    assert list(shared.made) == ["teacher"]
