"""`dual_kl` against the GEMM floor, plain PyTorch and other projects' fused losses: time, memory, gradient
error.

    python bench/loss.py --quick                                 the headline rows, < 3 minutes on one H100 or
    H200; on a CPU
                                                                 ours and eager at a laptop's size, in fp32
    python bench/loss.py --list                                  the names of all cells of the grid
    python bench/loss.py --only 'N8192-V151936-d2560/hidden/*'   some of them; calls add up
    python bench/loss.py --table                                 Markdown tables of bench/results/loss.json

A cell is SHAPE/TEACHER/HEAD/CONTENDER: one forward and backward of a loss, by hidden states alone (HEAD
`frozen`) or by the head's weight too (`trained`). Results are written after every cell. A cell that is there
already for the same device, versions and sources (`dualkl/` and `bench/loss*.py` for ours, the peer's version
and `bench/loss*.py` for others) is kept; --again measures it anew. No new cell is begun after --minutes.
Cells that do not fit in memory say OOM.

The floor of a cell is the sum of its matrix products alone, measured by the same process on the same data:
the student's head forward (bf16 results), by hidden states, by the weight if it is trained, and the teacher's
head for a teacher given by hidden states. Memory is the peak beyond the inputs and the bf16 `.grad`, which is
there before the step. Errors are ||found - wanted|| / ||wanted|| against float64 on the same bf16 inputs (512
positions of dX, 4,096 ids of dW).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.counted_memory import CountedMemory
from bench.loss_contenders import CONTENDERS, JOBS, Columns, Contender, LossFunction, NotInstalled, Settings
from bench.loss_problems import Problem, Reference, Shape, make_problem
from bench.measuring import (
    ROOT,
    Record,
    Results,
    ceilings,
    markdown,
    measure,
    message_of,
    number,
    release,
    sources_digest,
    synchronize,
    time_runs,
    triton_version,
)

HEADLINE = Shape(8192, 151_936, 2560)
LAPTOP = Shape(1024, 32_000, 512, teacher_width=1024, dtype=torch.float32)
TINY = Shape(48, 503, 32, teacher_width=48, k=8)
SOME = ("dual_kl", "eager", "eager_compiled", "liger_chunked_jsd_compiled", "trl_reverse", "trl_jsd")
PEERS_QUICK = ("liger_fused_linear_jsd", "liger_chunked_jsd_compiled", "trl_reverse", "trl_jsd")
HEADS = ("frozen", "trained")


@dataclass(frozen=True)
class Cell:
    """One measurement: who, on what."""

    shape: Shape
    kind: str
    head: str
    contender: Contender

    @property
    def case(self) -> str:
        return f"{self.shape.name}/{self.kind}/{self.head}"

    @property
    def name(self) -> str:
        return f"{self.case}/{self.contender.name}"


# --- which cells
# -------------------------------------------------------------------------------------------------


def cells_of(shape: Shape, kinds: Iterable[str], names: Iterable[str] | None = None) -> list[Cell]:
    """All heads and contenders (or those named) that take these teachers."""
    chosen = [c for c in CONTENDERS if names is None or c.name in names]
    return [Cell(shape, kind, head, c) for kind in kinds for head in HEADS for c in chosen if kind in c.kinds]


def full_grid() -> list[Cell]:
    """Everybody at the headline shape; the main contenders at other sizes, one size changed at a time."""
    cells = cells_of(HEADLINE, ("hidden", "topk", "full"))
    for num_rows in (2048, 32_768):
        cells += cells_of(Shape(num_rows, HEADLINE.num_ids, HEADLINE.width), ("hidden", "topk"), SOME)
    for width in (1024, 4096):
        cells += cells_of(Shape(8192, HEADLINE.num_ids, width), ("hidden", "topk"), SOME)
    return cells + cells_of(Shape(8192, 32_000, HEADLINE.width), ("hidden", "topk", "full"), SOME)


def quick_cells(device: str) -> list[Cell]:
    """Ours at the headline shape with hidden and top-k teachers, and the fast peers on hidden; on a CPU
    against eager.
    """
    if device == "cpu":
        return cells_of(LAPTOP, ("hidden", "topk", "full"), ["dual_kl", "eager"])
    return cells_of(HEADLINE, ("hidden", "topk"), ["dual_kl"]) + cells_of(HEADLINE, ["hidden"], PEERS_QUICK)


def select(options: argparse.Namespace) -> list[Cell]:
    cells = cells_of(TINY, ("hidden", "topk", "full")) if options.tiny else full_grid()
    if options.quick:
        cells = quick_cells(options.device)
    if options.chunk_rows:
        cells = [variant for c in cells for variant in chunk_variants(c, options.chunk_rows)]
    if options.only:
        cells = [c for c in cells if any(fnmatch.fnmatch(c.name, pattern) for pattern in options.only)]
    return cells


def chunk_variants(cell: Cell, chunk_rows: list[int]) -> list[Cell]:
    """`dual_kl@ROWS` cells in place of `dual_kl`."""
    if cell.contender.name != "dual_kl":
        return [cell]
    variants = [
        replace(cell.contender, name=f"dual_kl@{rows}", settings=({"chunk_rows": rows},))
        for rows in chunk_rows
    ]
    return [replace(cell, contender=variant) for variant in variants]


# --- measuring
# ---------------------------------------------------------------------------------------------------


def peak_bytes(step: Step, device: str) -> int:
    """Peak memory of a step that adds to gradients which are there, beyond what was there before."""
    step()
    if device == "cpu":
        with CountedMemory() as memory:
            step.accumulate()
        return memory.peak
    release(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.accumulate()
    synchronize(device)
    return torch.cuda.max_memory_allocated() - before


def measure_floors(problem: Problem, device: str, seconds: float) -> Record:
    """Milliseconds of every matrix product of the losses, and the device's ceilings."""
    hidden, weight = problem.hidden_Nd, problem.weight_Vd
    teacher_hidden, teacher_weight = problem.teacher_hidden_ND, problem.teacher_weight_VD
    probabilities = [torch.softmax(hidden @ weight.T, 1)]  # gradients have the spread of probabilities
    steps: dict[str, Callable[[], Any]] = {
        "student_forward": lambda: hidden @ weight.T,
        "by_hidden": lambda: probabilities[0] @ weight,
        "by_weight": lambda: probabilities[0].T @ hidden,
        "teacher_forward": lambda: teacher_hidden @ teacher_weight.T,
    }
    if device == "cuda":
        steps["student_forward_fp32"] = lambda: torch.mm(hidden, weight.T, out_dtype=torch.float32)
        steps["teacher_forward_fp32"] = lambda: torch.mm(
            teacher_hidden, teacher_weight.T, out_dtype=torch.float32
        )
    found: Record = {"ms": {}}
    for name, step in steps.items():
        try:
            found["ms"][name] = measure(step, device, seconds).median
        except torch.OutOfMemoryError:
            release(device)
    probabilities.clear()
    release(device)
    return found | ceilings(device, seconds)


def floor_ms(kind: str, head: str, floors: Record) -> float | None:
    """The sum of the matrix products that a case cannot do without."""
    names = ["student_forward", "by_hidden"]
    names += ["by_weight"] * (head == "trained") + ["teacher_forward"] * (kind == "hidden")
    found = [floors["ms"].get(name) for name in names]
    return None if None in found else sum(found)


class Step:
    """One forward and backward of a loss, by leaves that share the problem's memory."""

    def __init__(self, problem: Problem, head: str) -> None:
        self.hidden = problem.hidden_Nd.detach().requires_grad_()
        self.weight = problem.weight_Vd.detach().requires_grad_(head == "trained")
        self.function: LossFunction | None = None

    def __call__(self) -> tuple[Tensor, Columns]:
        self.clear()
        return self.accumulate()

    def accumulate(self) -> tuple[Tensor, Columns]:
        """The same, onto the gradients of the call before."""
        assert self.function is not None
        loss, columns = self.function(self.hidden, self.weight)
        loss.backward()
        return loss.detach(), columns

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def choose_settings(
    cell: Cell, problem: Problem, step: Step, settings: tuple[Settings, ...], device: str
) -> tuple[Settings, Record]:
    """The fastest of several settings by a few runs each, built into `step`; what each of them took, or said."""
    if len(settings) == 1:
        step.function = cell.contender.build(problem, cell.kind, settings[0])
        return settings[0], {}
    tried: Record = {}
    times: dict[int, float] = {}
    failure: Exception | None = None
    for index, setting in enumerate(settings):
        try:
            step.function = cell.contender.build(problem, cell.kind, setting)
            step(), step()
            times[index] = min(time_runs(step, device, 3))
            tried[str(setting)] = round(times[index], 3)
        except NotInstalled:
            raise
        except Exception as error:
            failure, tried[str(setting)] = error.with_traceback(None), message_of(error)  # frames hold memory
            step.function = None
            step.clear()
            release(device)
    if not times:
        assert failure is not None
        raise failure
    best = min(times, key=lambda index: times[index])
    step.function = cell.contender.build(problem, cell.kind, settings[best])
    return settings[best], tried


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def errors_of(loss: Tensor, columns: Columns, step: Step, wanted: Reference) -> Record:
    """Relative errors of loss and gradients; of R, F and λ the largest (nats for R and F).

    `divergence_tolerances` is the largest error of R and F in units of 3e-6 nats + 1e-3 relative.
    """
    assert step.hidden.grad is not None
    found: Record = {
        "loss": abs(float(loss) - wanted.loss) / abs(wanted.loss),
        "dX": relative_error(
            step.hidden.grad[wanted.positions.to(step.hidden.device)], wanted.hidden_gradient
        ),
    }
    if step.weight.grad is not None:
        found["dW"] = relative_error(
            step.weight.grad[wanted.ids.to(step.weight.device)], wanted.weight_gradient
        )
    tolerances = []
    for name, column in columns.items():
        gap_N = (column.detach().double().cpu() - wanted.columns[name]).abs()
        found[name] = float(gap_N.max())
        if name != "gate":
            tolerances.append(float((gap_N / (3e-6 + 1e-3 * wanted.columns[name].abs())).max()))
    if tolerances:
        found["divergence_tolerances"] = max(tolerances)
    return found


def measure_cell(
    cell: Cell, problem: Problem, settings: tuple[Settings, ...], device: str, seconds: float
) -> Record:
    """Time, memory and errors of one cell; raises what the contender raises."""
    step = Step(problem, cell.head)
    chosen, tried = choose_settings(cell, problem, step, settings, device)
    timing = measure(step, device, seconds)
    peak = peak_bytes(step, device)
    found: Record = {
        "status": "ok",
        "settings": chosen,
        "tried": tried,
        "ms": timing.median,
        "ms_least": timing.least,
        "repeats": timing.repeats,
        "extra_gib": peak / 2**30,
    }
    try:
        loss, columns = step()
        found["errors"] = errors_of(loss, columns, step, problem.reference(cell.kind, cell.contender.job))
    except Exception as error:
        found["errors"] = {}
        found["message"] = f"no reference: {message_of(error)}"
    return found


def try_cell(
    cell: Cell, problem: Problem, settings: tuple[Settings, ...], device: str, seconds: float
) -> Record:
    """`measure_cell`, or what went wrong."""
    try:
        if device not in cell.contender.devices:
            raise NotInstalled(f"does not run on {device}")
        return measure_cell(cell, problem, settings, device, seconds)
    except NotInstalled as error:
        return {"status": "not installed", "message": str(error)}
    except torch.OutOfMemoryError as error:
        return {"status": "OOM", "message": message_of(error)}
    except Exception as error:
        text = message_of(error)
        return {"status": "OOM" if "out of memory" in text.lower() else "error", "message": text}


# --- the run
# -----------------------------------------------------------------------------------------------------


def identity(cell: Cell | None) -> Record:
    """Versions and sources that a result depends on; None for floors."""
    versions: Record = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton_version()}
    if cell is None:
        return versions
    ours = cell.contender.name.startswith("dual_kl")
    versions["sources"] = sources_digest(["bench/loss*.py", *(["dualkl/**/*.py"] if ours else [])])
    return versions | {"peer": cell.contender.version()}


def is_done(record: Record | None, cell: Cell) -> bool:
    """Whether a cell was measured, or failed, with the same versions and sources."""
    if record is None or record["status"] == "not installed":
        return False
    return all(record.get(key) == value for key, value in identity(cell).items())


def settings_for(cell: Cell, before: Record | None, options: argparse.Namespace) -> tuple[Settings, ...]:
    """All settings; in a quick run the best that was measured before, or the first."""
    if not options.quick and not options.tiny:
        return cell.contender.settings
    known = [s for s in cell.contender.settings if before is not None and s == before.get("settings")]
    return tuple(known or cell.contender.settings[:1])


def run(options: argparse.Namespace) -> None:
    """Measure what is missing, cell by cell, shapes one after the other."""
    device, started, results = (
        options.device,
        time.monotonic(),
        Results(options.out / "loss.json", options.device),
    )
    seconds = options.seconds or (1.0 if options.quick else 2.0)
    selected = select(options)
    todo = [c for c in selected if options.again or not is_done(results.here.get(c.name), c)]
    for cell in selected:
        if cell not in todo:
            print(f"  kept  {line(cell.name, results.here[cell.name])}", flush=True)
    print(f"{len(todo)} cells to measure, {len(selected) - len(todo)} kept", flush=True)
    problem: Problem | None = None
    floors: Record = {}
    for index, cell in enumerate(todo):
        elapsed = time.monotonic() - started
        if elapsed > 60 * options.minutes:
            print(f"stopped after {elapsed:.0f} s; left: {' '.join(c.name for c in todo[index:])}")
            break
        before = results.here.get(cell.name)
        try:
            if problem is None or problem.shape != cell.shape:
                problem = None
                release(device)
                problem = make_problem(cell.shape, device)
                floors = measure_floors(problem, device, seconds / 2)
                results.put(f"{cell.shape.name}/floor", {"status": "ok", **floors, **identity(None)})
            record = try_cell(cell, problem, settings_for(cell, before, options), device, seconds)
        except Exception as error:
            record = {"status": "error", "message": f"no problem or floor: {message_of(error)}"}
        floor = floor_ms(cell.kind, cell.head, floors) if floors else None
        ratio = record["ms"] / floor if floor and "ms" in record else None
        record |= {"job": cell.contender.job, "floor_ms": floor, "ratio": ratio, **identity(cell)}
        results.put(cell.name, record)
        print(f"{time.monotonic() - started:5.0f} s  {line(cell.name, record)}", flush=True)
        try:
            release(device)
        except Exception as error:
            sys.exit(
                f"the device is lost after {cell.name} ({message_of(error)}); run again: what was measured"
                " is kept"
            )


def line(name: str, record: Record) -> str:
    """One cell for people."""
    if record["status"] != "ok":
        return f"{name:<66} {record['status']}: {record.get('message', '')[:160]}"
    errors = " ".join(f"{key} {value:.1e}" for key, value in record["errors"].items())
    return (
        f"{name:<66} {JOBS[record['job']]:<22} {record['ms']:>9.3f} ms  {number(record['ratio'], 2):>6} x"
        f" floor  {number(record['extra_gib'], 2):>6} GiB  {errors}  {show_settings(record['settings'])}"
    )


# --- tables
# ------------------------------------------------------------------------------------------------------


def scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def show_settings(settings: Settings) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "default"


def tables(found: dict[str, dict[str, Record]]) -> str:
    """Markdown of everything in the results file, device by device."""
    return "\n\n".join(text for device, cells in found.items() for text in device_tables(device, cells))


def device_tables(device: str, cells: dict[str, Record]) -> list[str]:
    floors = {
        name.removesuffix("/floor"): record for name, record in cells.items() if name.endswith("/floor")
    }
    measured = {name: record for name, record in cells.items() if not name.endswith("/floor")}
    ours = {name: record for name, record in measured.items() if name.endswith("/dual_kl")}
    versions = sorted({f"torch {r['torch']}, triton {r['triton']}, CUDA {r['cuda']}" for r in cells.values()})
    sources = sorted({r["sources"] for r in cells.values() if "sources" in r})
    return [
        f"## {device}\n\n{'; '.join(versions)}; sources {', '.join(sources)}.",
        "### Floors\n\n" + floor_table(floors),
        "### DualKL\n\n" + cell_table(ours),
        "### All contenders\n\n" + cell_table(measured),
        "### Errors against float64\n\n" + error_table(measured),
    ]


def floor_table(floors: dict[str, Record]) -> str:
    names = ["student_forward", "by_hidden", "by_weight", "teacher_forward"]
    names += ["student_forward_fp32", "teacher_forward_fp32"]
    rows = [
        [
            shape,
            *(number(r["ms"].get(name), 2) for name in names),
            number(r["product_tflops"], 0),
            number(r["copy_tb_per_second"], 2),
        ]
        for shape, r in floors.items()
    ]
    return markdown(
        ["shape", *(f"{n.replace('_', ' ')}, ms" for n in names), "product, TFLOP/s", "copy, TB/s"], rows
    )


def cell_table(cells: dict[str, Record]) -> str:
    rows = []
    for name, record in cells.items():
        shape, kind, head, contender = name.split("/")
        case = f"{shape} {kind}, {head} head"
        peer = f" {record['peer']}" if record.get("peer") else ""
        row = [case, f"{contender}{peer}", JOBS[record["job"]]]
        if record["status"] == "ok":
            errors = record["errors"]
            row += [
                show_settings(record["settings"]),
                number(record["ms"], 1),
                number(record["ratio"], 2),
                number(record["extra_gib"], 2),
                scientific(errors.get("dX")),
                scientific(errors.get("dW")),
            ]
        else:
            row += ["", record["status"], "", "", "", ""]
        rows.append(row)
    return markdown(
        ["case", "contender", "job", "settings", "ms", "× floor", "extra GiB", "dX error", "dW error"], rows
    )


def error_table(cells: dict[str, Record]) -> str:
    names = ["loss", "dX", "dW", "rkl", "fkl", "gate", "divergence_tolerances"]
    rows = [
        [name, *(scientific(record["errors"].get(key)) for key in names)]
        for name, record in cells.items()
        if record["status"] == "ok" and record["errors"]
    ]
    header = ["cell", "loss", "dX", "dW", "R, nats", "F, nats", "λ", "R and F ÷ (3e-6 + 1e-3 relative)"]
    return markdown(header, rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the headline rows, one setting each")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="cells by name")
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--table", action="store_true", help="print Markdown tables of the results")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"]
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: does everything run?")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no cell after this time")
    parser.add_argument("--seconds", type=float, help="of timed runs a cell (default 2; 1 with --quick)")
    parser.add_argument(
        "--chunk-rows", type=int, nargs="+", help="dual_kl@ROWS: chunks of this many positions"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.list:
        print("\n".join(cell.name for cell in select(options)))
    elif options.table:
        print(tables(json.loads((options.out / "loss.json").read_text())))
    else:
        run(options)


if __name__ == "__main__":
    main()
