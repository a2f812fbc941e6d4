"""Finds the folder of a run that is named on a command line, and the runs that are there if it is missing."""

from __future__ import annotations

from pathlib import Path

from stages.runtime.errors import UserError

RECORDS = ("config.yaml", "metrics.jsonl")
DEFAULT = "runs"
MOST_NAMED = 8


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RECORDS)


def run_folder(name: str) -> Path:
    """The folder of a run, given as its path or as its name in `runs`; UserError names the runs there are."""
    found = find_run(name)
    if found is not None:
        return found
    path = Path(name)
    if path.is_file():
        raise UserError(f"{name} is a file; give the folder of a run, such as runs/demo.")
    if (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        raise UserError(f"{name} is a model's folder already; give the folder of the run, such as runs/demo.")
    what = f"{name} is not the folder of a run (it has no config.yaml)" if path.is_dir() else ""
    raise UserError(f"{what or f'there is no run at {name}'}; {runs_near(name)}.")


def find_run(name: str) -> Path | None:
    return next((folder for folder in (Path(name), Path(DEFAULT) / name) if name and is_run(folder)), None)


def runs_near(name: str) -> str:
    """A clause that names the runs in the folder of `name`, and in `runs`."""
    path = Path(name)
    near = path if path.is_dir() else next((each for each in path.parents if each.is_dir()), Path())
    found = {file.parent for where in (near, Path(DEFAULT)) for file in where.glob("*/config.yaml")}
    runs = sorted(str(folder) for folder in found)
    if not runs:
        return "there are no runs here either; `dualkl run FILE` makes one, in runs_dir"
    more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
    return f"there {'is' if len(runs) == 1 else 'are'} {', '.join(runs[:MOST_NAMED])}{more}"
