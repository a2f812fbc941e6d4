"""`dual_kl` against the GEMM floor, plain PyTorch and other projects' fused losses: time, memory, gradient
error.

    python bench/loss.py --quick                                 the headline rows, < 3 minutes on one H100
    python bench/loss.py --quick --device cpu                    ours and eager at a laptop's size, fp32
    python bench/loss.py --list                                  the names of all cells of the grid
    python bench/loss.py --only 'N8192-V151936-d2560/hidden/*'   some of them; calls add up
    python bench/loss.py --table                                 Markdown tables of bench/results/loss.json

A cell is SHAPE/TEACHER/HEAD/CONTENDER: one forward and backward of a loss, with gradients for the hidden
states alone (HEAD `frozen`) or for the head's weight too (`trained`).

The floor of a cell is the time of its matrix products alone, measured in the same process on the same data:
the student's head forward (bf16 results), its gradients by hidden states and, if trained, by the weight, and
the teacher's head for a teacher given by hidden states. Memory is the peak beyond the inputs and the bf16
`.grad`, which exists before the step. Errors are ||found - wanted|| / ||wanted|| against float64 on the same
bf16 inputs (512 positions of dX, 4,096 ids of dW). `bench/cells.py` describes resuming.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import cells
from bench.cells import Bench, Program
from bench.counted_memory import CountedMemory
from bench.loss_contenders import CONTENDERS, JOBS, Columns, Contender, LossFunction, NotInstalled, Settings
from bench.loss_problems import Problem, Reference, Shape, make_problem
from bench.measuring import (
    Found,
    Record,
    markdown,
    measure,
    message_of,
    number,
    release,
    synchronize,
    time_runs,
)

HEADLINE = Shape(8192, 151_936, 2560)
LAPTOP = Shape(1024, 32_000, 512, teacher_width=1024, dtype=torch.float32)
TINY = Shape(48, 503, 32, teacher_width=48, k=8)
SOME = ("dual_kl", "eager", "eager_compiled", "liger_chunked_jsd_compiled", "trl_reverse", "trl_jsd")
PEERS_QUICK = ("liger_fused_linear_jsd", "liger_chunked_jsd_compiled", "trl_reverse", "trl_jsd")
HEADS = ("frozen", "trained")


@dataclass(frozen=True)
class Case:
    """Who is measured, on what."""

    shape: Shape
    kind: str
    head: str
    contender: Contender

    @property
    def name(self) -> str:
        return f"{self.shape.name}/{self.kind}/{self.head}/{self.contender.name}"


# --- which cells ---


def cases_of(shape: Shape, kinds: Iterable[str], names: Iterable[str] | None = None) -> list[Case]:
    """All heads and contenders (or those named) that take these teachers."""
    chosen = [c for c in CONTENDERS if names is None or c.name in names]
    return [Case(shape, kind, head, c) for kind in kinds for head in HEADS for c in chosen if kind in c.kinds]


def full_grid() -> list[Case]:
    """Everybody at the headline shape; the main contenders at other sizes, one size changed at a time."""
    cases = cases_of(HEADLINE, ("hidden", "topk", "full"))
    for num_rows in (2048, 32_768):
        cases += cases_of(Shape(num_rows, HEADLINE.num_ids, HEADLINE.width), ("hidden", "topk"), SOME)
    for width in (1024, 4096):
        cases += cases_of(Shape(8192, HEADLINE.num_ids, width), ("hidden", "topk"), SOME)
    return cases + cases_of(Shape(8192, 32_000, HEADLINE.width), ("hidden", "topk", "full"), SOME)


def quick_cases(device: str) -> list[Case]:
    """Ours at the headline shape with hidden and top-k teachers, and the fast peers on hidden; on a CPU
    against eager.
    """
    if device == "cpu":
        return cases_of(LAPTOP, ("hidden", "topk", "full"), ["dual_kl", "eager"])
    return cases_of(HEADLINE, ("hidden", "topk"), ["dual_kl"]) + cases_of(HEADLINE, ["hidden"], PEERS_QUICK)


def select(options: argparse.Namespace) -> list[Case]:
    if options.quick:
        cases = quick_cases(options.device)
    else:
        cases = cases_of(TINY, ("hidden", "topk", "full")) if options.tiny else full_grid()
    if options.chunk_rows:
        cases = [variant for case in cases for variant in chunk_variants(case, options.chunk_rows)]
    return cases


def as_cells(options: argparse.Namespace) -> list[cells.Cell]:
    """The selected cases for the harness."""
    return [as_cell(case, options.quick or options.tiny) for case in select(options)]


def as_cell(case: Case, quick: bool) -> cells.Cell:
    ours = case.contender.name.startswith("dual_kl")
    sources = (
        "bench/cells.py",
        "bench/loss*.py",
        "bench/measuring.py",
        *(["dualkl/**/*.py"] if ours else []),
    )
    labels = {"job": case.contender.job, "peer": case.contender.version()}
    return cells.Cell(case.name, partial(measure_case, case, quick), sources, (), labels)


def chunk_variants(case: Case, chunk_rows: list[int]) -> list[Case]:
    """`dual_kl@ROWS` in place of `dual_kl`."""
    if case.contender.name != "dual_kl":
        return [case]
    variants = [
        replace(case.contender, name=f"dual_kl@{rows}", settings=({"chunk_rows": rows},))
        for rows in chunk_rows
    ]
    return [replace(case, contender=variant) for variant in variants]


# --- measuring ---


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
    """Milliseconds of every matrix product of the losses."""
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
    return found


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
    case: Case, problem: Problem, step: Step, settings: tuple[Settings, ...], device: str
) -> tuple[Settings, Record]:
    """Build the fastest of several settings into `step`; also returns the time or error of each."""
    if len(settings) == 1:
        step.function = case.contender.build(problem, case.kind, settings[0])
        return settings[0], {}
    tried: Record = {}
    times: dict[int, float] = {}
    failure: Exception | None = None
    for index, setting in enumerate(settings):
        try:
            step.function = case.contender.build(problem, case.kind, setting)
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
    step.function = case.contender.build(problem, case.kind, settings[best])
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


@dataclass(frozen=True)
class Prepared:
    """A problem and the milliseconds of its matrix products."""

    problem: Problem
    floors: Record


def prepare(shape: Shape, bench: Bench) -> Prepared:
    problem = make_problem(shape, bench.device)
    floors = measure_floors(problem, bench.device, bench.seconds / 2)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": cells.triton_version()}
    bench.put(f"{shape.name}/floor", {"status": "ok", **floors, **bench.ceilings, **versions})
    return Prepared(problem, floors)


def measure_case(case: Case, quick: bool, bench: Bench) -> Record:
    """Time, memory and errors of one case; raises what the contender raises."""
    if bench.device not in case.contender.devices:
        raise NotInstalled(f"does not run on {bench.device}")
    prepared: Prepared = bench.make(case.shape.name, lambda: prepare(case.shape, bench))
    problem, step = prepared.problem, Step(prepared.problem, case.head)
    settings = settings_for(case, bench.record(case.name), quick)
    chosen, tried = choose_settings(case, problem, step, settings, bench.device)
    timing = measure(step, bench.device, bench.seconds)
    peak = peak_bytes(step, bench.device)
    floor = floor_ms(case.kind, case.head, prepared.floors)
    found: Record = {
        "settings": chosen,
        "tried": tried,
        "ms": timing.median,
        "ms_least": timing.least,
        "repeats": timing.repeats,
        "extra_gib": peak / 2**30,
        "floor_ms": floor,
        "ratio": timing.median / floor if floor else None,
    }
    try:
        loss, columns = step()
        found["errors"] = errors_of(loss, columns, step, problem.reference(case.kind, case.contender.job))
    except Exception as error:
        found["errors"] = {}
        found["message"] = f"no reference: {message_of(error)}"
    return found


def settings_for(case: Case, before: Record | None, quick: bool) -> tuple[Settings, ...]:
    """All settings; in a quick run the fastest of an earlier one, or the first."""
    if not quick:
        return case.contender.settings
    known = [s for s in case.contender.settings if before is not None and s == before.get("settings")]
    return tuple(known or case.contender.settings[:1])


def line(name: str, record: Record) -> str:
    """One cell's figures on one line."""
    if record["status"] != "ok":
        return f"{name:<66} {record['status']}: {record.get('message', '')[:160]}"
    errors = " ".join(f"{key} {value:.1e}" for key, value in record["errors"].items())
    return (
        f"{name:<66} {JOBS[record['job']]:<22} {record['ms']:>9.3f} ms  {number(record['ratio'], 2):>6} x"
        f" floor  {number(record['extra_gib'], 2):>6} GiB  {errors}  {show_settings(record['settings'])}"
    )


# --- tables ---


def scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def show_settings(settings: Settings) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "default"


def tables(found: Found) -> str:
    """Markdown of everything in the results file, device by device."""
    return "\n\n".join(text for device, records in found.items() for text in device_tables(device, records))


def device_tables(device: str, records: dict[str, Record]) -> list[str]:
    floors = {name.removesuffix("/floor"): r for name, r in records.items() if name.endswith("/floor")}
    measured = {name: r for name, r in records.items() if "/" in name and not name.endswith("/floor")}
    ours = {name: record for name, record in measured.items() if name.endswith("/dual_kl")}
    versions = {f"torch {r['torch']}, triton {r['triton']}, CUDA {r['cuda']}" for r in measured.values()}
    sources = sorted({r["sources"] for r in measured.values()})
    return [
        f"## {device}\n\n{'; '.join(sorted(versions))}; sources {', '.join(sources)}.",
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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the headline rows, one setting each")
    parser.add_argument(
        "--chunk-rows", type=int, nargs="+", help="dual_kl@ROWS: chunks of this many positions"
    )


PROGRAM = Program(__doc__ or "", "loss.json", as_cells, tables, 9.0, line, add_options)

if __name__ == "__main__":
    PROGRAM.main()
