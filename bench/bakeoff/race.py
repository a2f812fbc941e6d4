"""This project's run and TRL's by seconds: the table, the curves, and the seconds to TRL's final quality."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from bench.bakeoff.intervals import over_seeds
from bench.bakeoff.tasks import CONTENDERS, Results, Rival, Start, mean_kl
from bench.measuring import Record, markdown

TARGETS = ("trl", "trl-vllm")
Curve = list[tuple[float, float]]
"""Seconds, and a figure of the student then."""
Runs = dict[Rival, dict[int, Record]]


def runs(results: Results) -> Runs:
    """Records by contender's run and seed."""
    found: Runs = {}
    for name in results.all:
        record = results.get(name)
        if record is not None and "contender" in record.get("cell", {}):
            rival = Rival(**record["cell"])
            found.setdefault(rival.group, {})[rival.seed] = record
    return found


def pairs(results: Results) -> list[tuple[str, str]]:
    return [(rival.task, rival.student) for rival in runs(results)]


def curve(record: Record, before: Record, on: str = "") -> Curve:
    """The mean of the KLs on `on` ("on_student", "on_teacher"; "": of all four) from the start on."""
    sides = (on,) if on else ("on_student", "on_teacher")

    def figure(measured: Record) -> float:
        return sum(measured[side][kl] for side in sides for kl in ("forward_kl", "reverse_kl")) / (
            2 * len(sides)
        )

    return [(0.0, figure(before)), *((point["seconds"], figure(point)) for point in record["points"])]


def accuracy(record: Record, before: Record) -> Curve:
    """avg@k from the start on; empty for a task without answers."""
    if before.get("avg") is None:
        return []
    return [(0.0, before["avg"]), *((point["seconds"], point["avg"]) for point in record["points"])]


def seconds_to(line: Curve, target: float) -> float | None:
    """When the figure first is at or below the target, linearly between points; None if it never is."""
    if line[0][1] <= target:
        return line[0][0]
    for (before, high), (after, low) in pairwise(line):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def table(results: Results, task: str, student: str) -> str:
    """A row a contender. Ratios to TRL are of runs of the same seed, rate and time."""
    found = {r: seeds for r, seeds in runs(results).items() if (r.task, r.student) == (task, student)}
    rows = []
    for rival, seeds in found.items():
        columns = zip(*map(_figures, seeds.values()), strict=True)
        over = [over_seeds(list(c)).text(n) for c, n in zip(columns, (0, 1, 1, 4, 4), strict=True)]
        reached = [_reached(results, rival, seeds, found, target) for target in TARGETS]
        parts = _parts(next(iter(seeds.values()))["phases"])
        solved = [record["after"].get("avg") for record in seeds.values()]
        avg = "–" if None in solved else over_seeds(solved).text(3)
        name = f"{CONTENDERS[rival.contender].what}, lr {rival.lr:g}"
        rows.append([name, str(len(seeds)), *over, avg, *reached, parts])
    header = ["contender", "seeds", "steps", "seconds", "rollouts/s", "own text", "teacher text", "avg@k"]
    header += [f"seconds to {target}'s end" for target in TARGETS]
    return markdown([*header, "seconds by part"], rows) if rows else ""


def _figures(record: Record) -> tuple[float, ...]:
    last, after = record["points"][-1], record["after"]
    rate = record["rows_per_step"] * last["step"] / last["seconds"]
    own, their = (
        (after[on]["forward_kl"] + after[on]["reverse_kl"]) / 2 for on in ("on_student", "on_teacher")
    )
    return last["step"], last["seconds"], rate, own, their


def _reached(results: Results, rival: Rival, seeds: dict[int, Record], found: Runs, target: str) -> str:
    """Seconds until the mean of the four KLs is TRL's at its end, and how many times sooner that is."""
    peer = found.get(replace(rival, contender=target), {})
    times, ratios = [], []
    for seed in seeds.keys() & peer.keys():
        start = results.get(Start(rival.task, rival.student, seed))
        assert start is not None
        reached = seconds_to(curve(seeds[seed], start["before"]), mean_kl(peer[seed]["after"]))
        if reached is None:
            return "not reached"
        if reached == 0:
            return "no better than the start"
        times.append(reached)
        ratios.append(peer[seed]["points"][-1]["seconds"] / reached)
    return f"{over_seeds(times).text(1)} ({over_seeds(ratios).text(1)} ×)" if times else "–"


def _parts(phases: Record) -> str:
    shown = {name: seconds for name, seconds in phases.items() if name != "total" and seconds >= 0.05}
    rest = phases["total"] - sum(shown.values())
    text = ", ".join(f"{name} {seconds:.1f}" for name, seconds in shown.items())
    return text + (f", rest {rest:.1f}" if rest >= 0.05 else "")


def plots(results: Results, folder: Path) -> None:
    """rivals-TASK-STUDENT.svg: the KLs on both texts over seconds, and answers where there are any; seed 0."""
    from matplotlib import pyplot

    found = runs(results)
    for task, student in dict.fromkeys((rival.task, rival.student) for rival in found):
        start = results.get(Start(task, student, 0))
        own = {r: s[0] for r, s in found.items() if (r.task, r.student) == (task, student) and 0 in s}
        if start is None or not own:
            continue
        panels = {
            "mean of forward and reverse KL on own text, nats": lambda r, b: curve(r, b, "on_student"),
            "mean of forward and reverse KL on teacher text, nats": lambda r, b: curve(r, b, "on_teacher"),
            "share of answers that are right": accuracy,
        }
        count = 2 + (start["before"].get("avg") is not None)
        figure, axes = pyplot.subplots(1, count, figsize=(5.5 * count, 4.5), layout="constrained")
        for axis, (text, line_of) in zip(axes, panels.items()):
            for rival, record in own.items():
                label = f"{CONTENDERS[rival.contender].what}, lr {rival.lr:g}"
                axis.plot(*zip(*line_of(record, start["before"]), strict=True), marker=".", label=label)
            axis.set(xlabel="seconds on the card, evaluation left out", ylabel=text)
        axes[-1].legend(fontsize=7)
        figure.savefig(folder / f"rivals-{task}-{student}.svg", metadata={"Date": None})
        pyplot.close(figure)
