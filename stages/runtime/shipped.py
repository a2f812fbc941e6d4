"""The demo and the recipes, which come with the package: from a checkout, or inside an installed wheel."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from stages.runtime.errors import UserError

_IN_WHEEL = Path(__file__).resolve().parents[1] / "shipped"  # setup.py copies them there
ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).resolve().parents[2]

SUFFIXES = {".yaml", ".yml"}  # of configurations
DATA = {".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst"}


def configurations() -> dict[str, Path]:
    """Configurations by name: `demo`, and each recipe by its file's."""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    named = {path.stem: path for path in recipes if not path.stem.startswith("accelerate")}
    return {"demo": ROOT / "pipeline.yaml", **named}


def is_configuration(name: str) -> bool:
    """Whether `name` can only mean a configuration: a file, YAML by its suffix, or one of the package."""
    return Path(name).is_file() or Path(name).suffix.lower() in SUFFIXES or name in configurations()


def found_file(name: str) -> Path:
    """The configuration file called `name`, here or, if it is not here, in the package."""
    path, shipped = Path(name), configurations()
    if path.is_file():
        if path.suffix in DATA:
            raise UserError(f"{path} holds data, not a configuration; give it as --dataset {path}.")
        return path
    if path.is_dir():
        own = path / "config.yaml"
        hint = f"the configuration of its run is {own}" if own.is_file() else "name a YAML file in it"
        raise UserError(f"config file {path} is a folder; {hint}.")
    by_path = {str(each.relative_to(ROOT)): each for each in shipped.values()}
    if name in shipped or name in by_path:
        return shipped.get(name) or by_path[name]
    where = path.absolute().parent
    found = [str(each.relative_to(where)) for each in where.glob("*") if each.suffix.lower() in SUFFIXES]
    near = difflib.get_close_matches(path.name, sorted([*found, *shipped]), 3, 0.6)
    mean = f" did you mean {' or '.join(near)}?" if near else f" the package has {', '.join(shipped)}."
    raise UserError(f"config file {path} does not exist (looked in {where});{mean}")


def with_shipped_paths(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """`values` of the file at `path`; a shipped file's `examples/...` are the package's if absent here."""
    if not path.resolve().is_relative_to(ROOT):
        return values
    return {leaf: _resolved(value) for leaf, value in values.items()}


def _resolved(value: Any) -> Any:
    is_example = isinstance(value, str) and value.startswith("examples/")
    return str(ROOT / value) if is_example and not Path(value.partition(":")[0]).exists() else value
