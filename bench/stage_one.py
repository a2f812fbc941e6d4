"""Stage one against the hardware's floors: how fast a student writes rollouts.

    python bench/stage_one.py --list                    the names of all cells
    python bench/stage_one.py --only 'decode/*'         some of them; calls add up
    python bench/stage_one.py --table                   a Markdown table of bench/results/stage_one.json

Results are written after every cell. A cell that is there already for the same device, versions and sources is kept;
--again measures it anew. No new cell is begun after --minutes. Every call that measures first measures the device's
ceilings: the rate of a large copy (bytes read and written) and of a large bf16 product.

Models have seeded random weights made on the device from their configuration. The cells of each part and what they
measure: `stage_one_decode.py`.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.loss import _message, _triton_version, ceilings, markdown, number, release, sources_digest

Record = dict[str, Any]


@dataclass
class Bench:
    """What the cells of one call share: the device, its ceilings, and things made once (`made`, by name)."""

    device: str
    seconds: float
    ceilings: Record
    made: dict[str, Any] = field(default_factory=dict)

    def make(self, name: str, function: Callable[[], Any]) -> Any:
        """`function()`, once; only the newest thing is kept, since models fill the device."""
        if name not in self.made:
            self.made.clear()
            release(self.device)
            self.made[name] = function()
        return self.made[name]


@dataclass(frozen=True)
class Cell:
    """One measurement. `sources`: the files whose change makes it out of date."""

    name: str
    measure: Callable[[Bench], Record]
    sources: tuple[str, ...]


def all_cells(tiny: bool) -> list[Cell]:
    """Every part's cells; a tiny run does the same at sizes for a CPU."""
    from bench import stage_one_decode

    return [*stage_one_decode.cells(tiny)]


def identity(cell: Cell) -> Record:
    """Versions and sources that a result depends on."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton_version()}
    return versions | {"transformers": transformers.__version__, "sources": sources_digest(cell.sources)}


def is_done(record: Record | None, cell: Cell) -> bool:
    return record is not None and all(record.get(key) == value for key, value in identity(cell).items())


class Results:
    """The file: device -> cell -> record. Records of other devices are kept."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path = folder / "stage_one.json"
        self.all: dict[str, dict[str, Record]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.here = self.all.setdefault(torch.cuda.get_device_name() if device == "cuda" else "cpu", {})

    def put(self, name: str, record: Record) -> None:
        self.here[name] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.all, indent=1) + "\n")
        partial.replace(self.path)


def select(options: argparse.Namespace) -> list[Cell]:
    patterns = options.only or ["*"]
    return [c for c in all_cells(options.tiny) if any(fnmatch.fnmatch(c.name, pattern) for pattern in patterns)]


def try_cell(cell: Cell, bench: Bench) -> Record:
    """The cell's figures, or what went wrong."""
    try:
        return {"status": "ok", **cell.measure(bench)}
    except torch.OutOfMemoryError as error:
        return {"status": "OOM", "message": _message(error)}
    except Exception as error:
        return {"status": "error", "message": _message(error)}


def run(options: argparse.Namespace) -> None:
    """Measures what is missing, cell by cell."""
    started, results = time.monotonic(), Results(options.out, options.device)
    selected = select(options)
    todo = [c for c in selected if options.again or not is_done(results.here.get(c.name), c)]
    print(f"{len(todo)} cells to measure, {len(selected) - len(todo)} kept", flush=True)
    if not todo:
        return
    bench = Bench(options.device, options.seconds, ceilings(options.device, options.seconds))
    results.put("ceilings", {"status": "ok", **bench.ceilings})
    print(line("ceilings", results.here["ceilings"]), flush=True)
    for index, cell in enumerate(todo):
        if time.monotonic() - started > 60 * options.minutes:
            print(f"stopped after {options.minutes} minutes; left: {' '.join(c.name for c in todo[index:])}")
            break
        record = try_cell(cell, bench) | {"ceilings": bench.ceilings} | identity(cell)
        results.put(cell.name, record)
        print(f"{time.monotonic() - started:5.0f} s  {line(cell.name, record)}", flush=True)
        release(options.device)


def figures(record: Record) -> dict[str, float]:
    """The numbers of a record that a person reads."""
    return {key: value for key, value in record.items() if isinstance(value, float)}


def line(name: str, record: Record) -> str:
    if record["status"] != "ok":
        return f"{name:<34} {record['status']}: {record['message'][:200]}"
    return f"{name:<34} " + "  ".join(f"{key} {value:,.4g}" for key, value in figures(record).items())


def table(found: dict[str, dict[str, Record]]) -> str:
    """A Markdown table of each device's cells."""
    texts = []
    for device, cells in found.items():
        rows = [
            [name, record["status"], "; ".join(f"{key} {number(value, 3)}" for key, value in figures(record).items())]
            for name, record in cells.items()
        ]
        texts.append(f"## {device}\n\n" + markdown(["cell", "status", "figures"], rows))
    return "\n\n".join(texts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="cells by name")
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--table", action="store_true", help="print a Markdown table of the results")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no cell after this time")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed runs of one small part")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.list:
        print("\n".join(cell.name for cell in select(options)))
    elif options.table:
        print(table(json.loads((options.out / "stage_one.json").read_text())))
    else:
        run(options)


if __name__ == "__main__":
    main()
