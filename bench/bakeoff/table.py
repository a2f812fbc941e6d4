"""Tables and plots of the results: means over seeds with 95 % t intervals, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.bakeoff.arms import ARMS
from bench.bakeoff.measures import pass_at
from bench.bakeoff.tasks import TASKS, Cell, Results
from bench.measuring import Record, markdown

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Quantiles of Student's t at 97.5 %, by degrees of freedom."""
BASELINES = ("reverse", "mix-mean")
FIGURES: dict[str, Callable[[Record], float | None]] = {
    "own text F": lambda r: r["after"]["on_student"]["forward_kl"],
    "own text R": lambda r: r["after"]["on_student"]["reverse_kl"],
    "teacher text F": lambda r: r["after"]["on_teacher"]["forward_kl"],
    "teacher text R": lambda r: r["after"]["on_teacher"]["reverse_kl"],
    "JSD, own": lambda r: r["after"]["on_student"]["jsd"],
    "top-1, own": lambda r: r["after"]["on_student"]["top1_agreement"],
    "length": lambda r: r["after"]["style"]["completion_tokens"],
    "cut": lambda r: r["after"]["style"]["cut_share"],
    "distinct-4": lambda r: r["after"]["style"]["distinct_4grams"],
    "outside, nats": lambda r: r["after"].get("outside_nll"),
    "avg@k": lambda r: r["after"].get("avg"),
    "pass@k": lambda r: _pass(r["after"]),
    "mean λ": lambda r: r["mean_gate"],
    "seconds": lambda r: r["seconds"]["train"] + r["seconds"]["refresh"],
}
PAIRED = ("own text F", "own text R", "teacher text F", "teacher text R", "avg@k")
Groups = dict[Cell, dict[int, Record]]


def _pass(after: Record) -> float | None:
    """pass@k with k as many as there are samples."""
    if "solved" not in after:
        return None
    return float(pass_at(np.array(after["solved"]), after["samples"], after["samples"]).mean())


def groups(results: Results) -> Groups:
    """Records by cell and seed."""
    found: Groups = {}
    for name in results.all:
        record = results.get(name)
        if record is not None and "after" in record:
            cell = Cell(**record["cell"])
            found.setdefault(cell.group, {})[cell.seed] = record
    return found


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % t interval over seeds; the value alone for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.4f}"
    half = T_95[len(values) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


def table(results: Results) -> str:
    """Markdown: for each pair of models a table of means and one of paired differences."""
    found = groups(results)
    texts = []
    for pair in dict.fromkeys((cell.task, cell.student) for cell in found):
        cells = {cell: seeds for cell, seeds in found.items() if (cell.task, cell.student) == pair}
        texts.append(f"## {pair[0]}, student {pair[1]}\n\n{_means(cells)}\n\n{_differences(cells)}")
    return "\n\n".join(texts)


def _label(cell: Cell) -> str:
    return cell.name.removeprefix(f"{cell.task}.{cell.student}.").removesuffix(".s-1")


def _means(cells: Groups) -> str:
    rows = []
    for cell, seeds in cells.items():
        columns = [[figure(record) for record in seeds.values()] for figure in FIGURES.values()]
        shown = [
            "–" if None in values else interval([v for v in values if v is not None]) for values in columns
        ]
        rows.append([_label(cell), ARMS[cell.arm].what, str(len(seeds)), *shown])
    return markdown(["cell", "objective", "seeds", *FIGURES], rows)


def _differences(cells: Groups) -> str:
    """To the baselines with equal rate, refresh, signal and horizon, over the seeds that both have."""
    rows = []
    for cell, seeds in cells.items():
        for arm in BASELINES:
            other = cells.get(replace(cell, arm=arm), {})
            common = sorted(seeds.keys() & other.keys())
            if arm == cell.arm or not common:
                continue
            row = [_label(cell), arm, str(len(common))]
            for name in PAIRED:
                pairs = [(FIGURES[name](seeds[s]), FIGURES[name](other[s])) for s in common]
                gaps = [a - b for a, b in pairs if a is not None and b is not None]
                row.append(interval(gaps) if gaps else "–")
            rows.append(row)
    return markdown(["cell", "minus", "seeds", *PAIRED], rows)


def plots(results: Results, folder: Path) -> None:
    """TASK-STUDENT.svg: KLs on the teacher's text over seconds, seed 0, each arm at the shared rate."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = groups(results)
    for task, student in dict.fromkeys((cell.task, cell.student) for cell in found):
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        for arm in ARMS:
            record = found.get(Cell(task, student, arm, TASKS[task].lr, -1), {}).get(0)
            for axis, kl in zip(axes, ("forward_kl", "reverse_kl"), strict=True):
                if record is not None and record["curve"]:
                    points = [(point["seconds"], point[kl]) for point in record["curve"]]
                    axis.plot(*zip(*points, strict=True), marker=".", label=arm)
                axis.set(xlabel="seconds of training and refreshes", ylabel=f"{kl} on teacher text, nats")
        if axes[1].lines:
            axes[1].legend(fontsize=7, ncols=2)
        figure.savefig(folder / f"{task}-{student}.svg", metadata={"Date": None})
        pyplot.close(figure)
