"""Tables of the results, with 95 % intervals, as docs/results.md has them; plots.

`~` marks a difference whose interval contains 0, or that has no interval: noise, as far as is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.bakeoff import race
from bench.bakeoff.arms import ARMS
from bench.bakeoff.intervals import bootstrap, over_seeds
from bench.bakeoff.measures import pass_at
from bench.bakeoff.tasks import DEFAULT_SIGNAL, TASKS, Cell, Results, Start, mean_kl
from bench.measuring import Record, markdown

BASELINES = ("reverse", "mix-mean")
KLS: dict[str, Callable[[Record], float]] = {
    "own text F": lambda r: r["after"]["on_student"]["forward_kl"],
    "own text R": lambda r: r["after"]["on_student"]["reverse_kl"],
    "teacher text F": lambda r: r["after"]["on_teacher"]["forward_kl"],
    "teacher text R": lambda r: r["after"]["on_teacher"]["reverse_kl"],
}
STYLE: dict[str, Callable[[Record], float | None]] = {
    "JSD, own": lambda r: r["after"]["on_student"]["jsd"],
    "top-1, own": lambda r: r["after"]["on_student"]["top1_agreement"],
    "tokens": lambda r: r["after"]["style"]["completion_tokens"],
    "cut": lambda r: r["after"]["style"]["cut_share"],
    "distinct-4": lambda r: r["after"]["style"]["distinct_4grams"],
    "outside, nats": lambda r: r["after"].get("outside_nll"),
    "mean λ": lambda r: r["mean_gate"],
}
DIGITS, COARSE = 4, 3
Seeds = dict[int, Record]
Groups = dict[Cell, Seeds]
BLOCK = re.compile(r"(<!-- bake-off -->\n).*?(<!-- /bake-off -->)", re.DOTALL)


def groups(results: Results) -> Groups:
    """Records by cell and seed."""
    found: Groups = {}
    for name in results.all:
        record = results.get(name)
        if record is not None and "after" in record and "contender" not in record["cell"]:
            cell = Cell(**record["cell"])
            found.setdefault(cell.group, {})[cell.seed] = record
    return found


def table(results: Results) -> str:
    """Markdown: for each pair of models its tables, as far as there are cells for them."""
    found = groups(results)
    texts = []
    pairs = dict.fromkeys([(cell.task, cell.student) for cell in found] + race.pairs(results))
    for task, student in pairs:
        cells = {cell: seeds for cell, seeds in found.items() if (cell.task, cell.student) == (task, student)}
        parts = {
            "Objectives and settings": _means(cells),
            "Differences, paired by seed": _differences(cells),
            "Answers": _answers(cells),
            "Two stages against online": _refreshes(results, cells),
            "Signals": _signals(results, cells),
            "Horizon": _horizons(cells),
            "Against TRL, by seconds": race.table(results, task, student),
        }
        texts.append(f"### {task}, student {student}")
        texts += [f"**{title}**\n\n{text}" for title, text in parts.items() if text]
    return "\n\n".join(texts)


def write(results: Results, page: Path) -> None:
    """Put the tables into the page, between its marks."""
    text = page.read_text()
    if not BLOCK.search(text):
        raise SystemExit(
            f"{page} has no lines <!-- bake-off --> and <!-- /bake-off --> to put tables between."
        )
    page.write_text(BLOCK.sub(lambda marks: f"{marks[1]}{table(results)}\n{marks[2]}", text))


def _label(cell: Cell) -> str:
    return cell.name.removeprefix(f"{cell.task}.{cell.student}.").removesuffix(".s-1")


def _rows(header: list[str], rows: list[list[str]]) -> str:
    return markdown(header, rows) if rows else ""


def _seconds(record: Record) -> float:
    return float(record["seconds"]["train"] + record["seconds"]["refresh"])


def _over(seeds: Seeds, figure: Callable[[Record], float | None], digits: int = DIGITS) -> str:
    values = [value for value in map(figure, seeds.values()) if value is not None]
    return over_seeds(values).text(digits) if values else "–"


def _means(cells: Groups) -> str:
    rows = [
        [
            _label(cell),
            ARMS[cell.arm].what,
            str(len(seeds)),
            *(_over(seeds, figure) for figure in KLS.values()),
            *(_over(seeds, figure, COARSE) for figure in STYLE.values()),
            _over(seeds, _seconds, 0),
        ]
        for cell, seeds in cells.items()
    ]
    return _rows(["cell", "objective", "seeds", *KLS, *STYLE, "seconds"], rows)


def _compared(cells: Groups) -> Iterable[tuple[Cell, str, Seeds, Seeds, list[int]]]:
    """Cells with a baseline of equal rate, refresh, signal and horizon, and the seeds that both have."""
    for cell, seeds in cells.items():
        for arm in BASELINES:
            other = cells.get(replace(cell, arm=arm), {})
            common = sorted(seeds.keys() & other.keys())
            if arm != cell.arm and common:
                yield cell, arm, seeds, other, common


def _differences(cells: Groups) -> str:
    rows = []
    for cell, arm, seeds, other, common in _compared(cells):
        if len(common) < 2:  # no interval: nothing can be said
            continue
        gaps = [
            over_seeds([figure(seeds[s]) - figure(other[s]) for s in common]).difference()
            for figure in (*KLS.values(), lambda r: mean_kl(r["after"]))
        ]
        rows.append([_label(cell), arm, str(len(common)), *gaps])
    return _rows(["cell", "minus", "seeds", *KLS, "mean of the four"], rows)


# --- answers ---


def solved_SP(records: list[Record], k: int) -> np.ndarray:
    """pass@k of each seed and problem; k = 1 is avg@k."""
    return np.stack([pass_at(np.array(r["after"]["solved"]), r["after"]["samples"], k) for r in records])


def _answers(cells: Groups) -> str:
    """avg@k and pass@k, and their differences to the baselines, with bootstrap intervals."""
    solved = {cell: seeds for cell, seeds in cells.items() if "solved" in next(iter(seeds.values()))["after"]}
    if not solved:
        return ""
    samples = min(record["after"]["samples"] for seeds in solved.values() for record in seeds.values())
    ks = [k for k in (1, 2, 4, 8, 16) if k <= samples]
    names = {k: f"avg@{samples}" if k == 1 else f"pass@{k}" for k in ks}
    gaps: dict[tuple[Cell, str, int], str] = {}
    for cell, arm, seeds, other, common in _compared(solved):
        for k in (1, ks[-1]):
            pair = [solved_SP([side[s] for s in common], k) for side in (seeds, other)]
            gaps[cell, arm, k] = bootstrap(pair[0] - pair[1]).difference(COARSE)
    compared = [(arm, k) for arm in BASELINES for k in (1, ks[-1])]
    rows = []
    for cell, seeds in solved.items():
        passed = [bootstrap(solved_SP(list(seeds.values()), k)).text(COARSE) for k in ks]
        shown = [gaps.get((cell, arm, k), "–") for arm, k in compared]
        rows.append([_label(cell), str(len(seeds)), *passed, *shown])
    header = ["cell", "seeds", *names.values(), *(f"{names[k]} − {arm}" for arm, k in compared)]
    return _rows(header, rows)


# --- refreshes, signals, horizon ---


def _is_plain(cell: Cell, **but: object) -> bool:
    """Whether the cell is its arm's at the shared rate, but for these settings."""
    plain = Cell(cell.task, cell.student, cell.arm, TASKS[cell.task].lr, -1)
    return replace(cell, **but) == replace(plain, **but)


def _refreshes(results: Results, cells: Groups) -> str:
    """Quality and time, as shares of what a refresh at every step gains over the start and takes."""
    rows = []
    for cell, seeds in cells.items():
        online = cells.get(replace(cell, refresh="1"), {})
        common = sorted(seeds.keys() & online.keys())
        starts = {s: results.get(Start(cell.task, cell.student, s)) for s in common}
        if not _is_plain(cell, refresh="") or not common or None in starts.values():
            continue
        kept = []
        for s in common:
            before = mean_kl((starts[s] or {})["before"])
            gained, of = before - mean_kl(seeds[s]["after"]), before - mean_kl(online[s]["after"])
            kept.append(gained / of)
        times = [_seconds(seeds[s]) / _seconds(online[s]) for s in common]
        rows.append(
            [
                cell.arm,
                cell.refresh or "the task's",
                str(len(common)),
                _over(seeds, lambda r: r["refreshes"], 0),
                _over(seeds, lambda r: mean_kl(r["after"])),
                over_seeds(kept).text(COARSE),
                _over(seeds, _seconds, 0),
                over_seeds(times).text(2),
            ]
        )
    header = ["objective", "steps between", "seeds", "refreshes", "mean of the four KLs"]
    return _rows([*header, "share of online's gain", "seconds", "share of online's time"], rows)


def _signals(results: Results, cells: Groups) -> str:
    """Arms with more than one signal; each arm's renormalised loss counts as an arm."""
    own = {cell: seeds for cell, seeds in cells.items() if _is_plain(cell, signal=DEFAULT_SIGNAL)}
    arms = {cell.arm for cell in own if cell.signal != DEFAULT_SIGNAL}
    rows = []
    for cell, seeds in own.items():
        if cell.arm in arms:
            start = results.get(Start(cell.task, cell.student, min(seeds), cell.signal))
            size = f"{start['bytes_per_token']:.0f}" if start else "–"
            quality = [_over(seeds, figure) for figure in KLS.values()]
            rows.append([cell.arm, cell.signal, size, str(len(seeds)), *quality])
    return _rows(["objective", "signal", "bytes a token", "seeds", *KLS], rows)


def _horizons(cells: Groups) -> str:
    """Growing limits, in as many steps and in as many tokens, against the full one."""
    arms = {cell.arm for cell in cells if cell.horizon < 1}
    rows = []
    for cell, seeds in cells.items():
        if cell.arm not in arms or not _is_plain(cell, horizon=1.0, longer=1.0):
            continue
        limit = "full" if cell.horizon == 1 else f"{cell.horizon:.0%} → 100 %"
        figures = [_over(seeds, figure) for figure in KLS.values()]
        style = [_over(seeds, STYLE[name], COARSE) for name in ("tokens", "cut")]
        tokens = _over(seeds, lambda r: r["trained_tokens"] / 1e3, 0)
        rows.append(
            [
                cell.arm,
                limit,
                f"{cell.longer:g}",
                str(len(seeds)),
                tokens,
                _over(seeds, _seconds, 0),
                *figures,
                *style,
            ]
        )
    header = ["objective", "limit", "× steps", "seeds", "thousand tokens", "seconds"]
    return _rows([*header, *KLS, "tokens an answer", "cut"], rows)


# --- plots ---


def plots(results: Results, folder: Path) -> None:
    """TASK-STUDENT.svg: KLs on the teacher's text over seconds, seed 0, each arm at the shared rate."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("the plots were left out: they need matplotlib (pip install matplotlib).") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bake-off"  # the same file from the same records
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
    race.plots(results, folder)
