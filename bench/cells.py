"""The harness of the benches that measure cells: their command line, their results file, and the loop.

Results are written after every cell. A cell is kept if it was measured on this device with the same versions
and sources, or did not fit into memory; a cell that failed is tried again. Every call that measures starts
with the device's ceilings: the rates of a large copy (bytes read and written) and of a large bf16 product.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.measuring import (
    ROOT,
    Found,
    Record,
    Results,
    ceilings,
    markdown,
    message_of,
    number,
    release,
    sources_digest,
    triton_version,
    version,
)


@dataclass
class Bench:
    """What the cells of one call share: the device, its ceilings, its results, and the newest thing made."""

    device: str
    seconds: float
    ceilings: Record
    results: Results | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def make(self, name: str, function: Callable[[], Any]) -> Any:
        """`function()`, once; only the newest thing is kept, since models fill the device."""
        if name not in self.made:
            self.clear()
            self.made[name] = function()
        return self.made[name]

    def clear(self) -> None:
        """Release what was made, and the device's memory."""
        self.made.clear()
        release(self.device)

    def record(self, name: str) -> Record | None:
        """The record of that name for this device, from this call or an earlier one."""
        return None if self.results is None else self.results.here.get(name)

    def put(self, name: str, record: Record) -> None:
        """Write a record that is not a cell's, such as a floor that several cells are compared with."""
        if self.results is not None:
            self.results.put(name, record)


@dataclass(frozen=True)
class Cell:
    """One measurement.

    It is out of date when one of its `sources`, `packages` (besides torch and triton) or `labels` changes.
    Labels are written into its record.
    """

    name: str
    measure: Callable[[Bench], Record]
    sources: tuple[str, ...]
    packages: tuple[str, ...] = ("transformers",)
    labels: Record = field(default_factory=dict)


def line(name: str, record: Record) -> str:
    """One cell's figures on one line."""
    if record["status"] != "ok":
        return f"{name:<34} {record['status']}: {record['message'][:200]}"
    return f"{name:<34} " + "  ".join(f"{key} {value:,.4g}" for key, value in figures(record).items())


def figures(record: Record) -> dict[str, float]:
    """The numbers of a record that a person reads."""
    return {key: value for key, value in record.items() if isinstance(value, float)}


@dataclass(frozen=True)
class Program:
    """A command: its help, its results file, its cells, its table of a results file, and its own options."""

    description: str
    file: str
    cells: Callable[[argparse.Namespace], list[Cell]]
    table: Callable[[Found], str]
    minutes: float
    line: Callable[[str, Record], str] = line
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None

    def main(self, arguments: list[str] | None = None) -> None:
        options = self.parse(arguments)
        if options.list:
            print("\n".join(cell.name for cell in self.select(options)))
        elif options.table:
            path = options.out / self.file
            if not path.is_file():
                raise SystemExit(
                    f"{path} does not exist; measure first, or give the folder of the results as --out."
                )
            print(self.table(json.loads(path.read_text())))
        else:
            if options.device == "cuda" and not torch.cuda.is_available():
                raise SystemExit(
                    "torch sees no GPU here; --device cpu --tiny only tries whether everything runs."
                )
            run(options, self.select(options), options.out / self.file, self.line)

    def select(self, options: argparse.Namespace) -> list[Cell]:
        cells = [c for c in self.cells(options) if any(fnmatch.fnmatch(c.name, p) for p in options.only)]
        if not cells:
            raise SystemExit(f"no cell matches {' '.join(options.only)}; --list names them all.")
        return cells

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--only", nargs="+", metavar="GLOB", default=["*"], help="cells by name")
        parser.add_argument("--again", action="store_true", help="measure cells that are there already")
        parser.add_argument("--list", action="store_true", help="print the names of the cells")
        parser.add_argument("--table", action="store_true", help="print a Markdown table of the results")
        parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
        parser.add_argument("--device", default=default, choices=["cuda", "cpu"])
        parser.add_argument("--tiny", action="store_true", help="tiny shapes: does everything run?")
        parser.add_argument(
            "--minutes", type=float, default=self.minutes, help="begin no cell after this time"
        )
        parser.add_argument("--seconds", type=float, default=1.0, help="of timed runs of one small part")
        self.add_options(parser)
        return parser.parse_args(arguments)


def identity(cell: Cell, tiny: bool) -> Record:
    """Versions, sources and sizes that a result depends on."""
    versions = {
        "tiny": tiny,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version(),
    }
    packages = {name: version(name) for name in cell.packages}
    return versions | packages | cell.labels | {"sources": sources_digest(cell.sources)}


def is_done(record: Record | None, cell: Cell, tiny: bool) -> bool:
    """Whether the cell was measured, or did not fit, with the same versions and sources."""
    if record is None or record["status"] not in ("ok", "OOM"):
        return False
    return all(record.get(key) == value for key, value in identity(cell, tiny).items())


def try_cell(cell: Cell, bench: Bench) -> Record:
    """The cell's figures, or what went wrong."""
    try:
        return {"status": "ok", **cell.measure(bench)}
    except torch.OutOfMemoryError as error:
        return {"status": "OOM", "message": message_of(error)}
    except ModuleNotFoundError as error:
        return {"status": "not installed", "message": str(error)}
    except Exception as error:
        text = message_of(error)
        return {"status": "OOM" if "out of memory" in text.lower() else "error", "message": text}


def run(
    options: argparse.Namespace, selected: list[Cell], path: Path, line: Callable[[str, Record], str] = line
) -> None:
    """Measure what is missing, cell by cell."""
    started, results = time.monotonic(), Results(path, options.device)
    todo = [c for c in selected if options.again or not is_done(results.here.get(c.name), c, options.tiny)]
    for cell in selected:
        if cell not in todo:
            print(f"  kept  {line(cell.name, results.here[cell.name])}")
    print(f"{len(todo)} cells to measure, {len(selected) - len(todo)} kept", flush=True)
    if not todo:
        return
    bench = Bench(options.device, options.seconds, ceilings(options.device, options.seconds), results)
    results.put("ceilings", {"status": "ok", **bench.ceilings})
    print(f"ceilings: {figures(bench.ceilings)}", flush=True)
    for index, cell in enumerate(todo):
        if time.monotonic() - started > 60 * options.minutes:
            print(f"stopped after {options.minutes} minutes; left: {' '.join(c.name for c in todo[index:])}")
            break
        print(f"{time.monotonic() - started:5.0f} s  {cell.name} begins", flush=True)
        record = try_cell(cell, bench) | {"ceilings": bench.ceilings} | identity(cell, options.tiny)
        results.put(cell.name, record)
        print(f"{time.monotonic() - started:5.0f} s  {line(cell.name, record)}", flush=True)
        try:
            release(options.device)
        except Exception as error:
            raise SystemExit(
                f"The device failed after {cell.name} ({message_of(error)}); run the command again,"
                " which keeps finished cells."
            ) from error


def table(found: Found) -> str:
    """A Markdown table of each device's cells."""
    texts = []
    for device, cells in found.items():
        rows = [
            [
                name,
                record["status"],
                "; ".join(f"{key} {number(value, 3)}" for key, value in figures(record).items()),
            ]
            for name, record in cells.items()
        ]
        texts.append(f"## {device}\n\n" + markdown(["cell", "status", "figures"], rows))
    return "\n\n".join(texts)
