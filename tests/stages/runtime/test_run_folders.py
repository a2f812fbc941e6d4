"""Runs are found by path or by name; a missing one names those that are there."""

from pathlib import Path

import pytest

from stages.runtime.errors import UserError
from stages.runtime.run_folders import MOST_NAMED, find_run, run_folder


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*folders: str) -> None:
    for folder in folders:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.yaml").touch()


def test_a_run_is_found_by_its_path_and_by_its_name() -> None:
    make("runs/a", "elsewhere/b")
    assert run_folder("runs/a") == run_folder("a") == Path("runs/a")
    assert run_folder("elsewhere/b") == Path("elsewhere/b")
    assert find_run("b") is None
    assert find_run("") is None


@pytest.mark.parametrize("name", ["nope", "runs/nope", "runs/nope/deeper"])
def test_a_missing_run_names_the_others(name: str) -> None:
    make("runs/a", "runs/b")
    with pytest.raises(UserError) as caught:
        run_folder(name)
    assert str(caught.value) == f"there is no run at {name}; there are runs/a, runs/b."


def test_runs_elsewhere_are_named_too() -> None:
    make("other/a")
    with pytest.raises(UserError, match=r"there is no run at other/nope; there is other/a\."):
        run_folder("other/nope")


def test_a_folder_of_runs_is_not_a_run() -> None:
    make("runs/a")
    with pytest.raises(UserError, match=r"runs is not the folder of a run .*; there is runs/a\."):
        run_folder("runs")


def test_many_runs_are_counted() -> None:
    make(*(f"runs/r{number}" for number in range(MOST_NAMED + 3)))
    with pytest.raises(UserError, match=r"runs/r0, .* and 3 more\."):
        run_folder("nope")


def test_where_there_are_none_the_command_that_makes_one_is_named() -> None:
    with pytest.raises(UserError, match=r"there are no runs here either; `dualkl run FILE` makes one"):
        run_folder("nope")
