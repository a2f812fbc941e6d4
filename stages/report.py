"""The verdict on a run, from the files that it left: report.json, report.html, and a summary on the terminal.

    python -m stages.report --config pipeline.yaml

Loads no model. What a run has not measured (yet) is null in report.json and a dash on the page.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository's root is importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import sys
from pathlib import Path
from typing import Any

import cache
from stages.runtime import config as configuration
from stages.runtime import metrics, page
from stages.runtime.config import Config
from stages.runtime.errors import UserError, command
from stages.runtime.files import replace_text

Report = dict[str, Any]
MEASURES = ("forward_kl", "reverse_kl", "top1_agreement")
NOTICEABLE_POINTS = 1.0  # a smaller change of accuracy is called none


def write_report(folder: Path, config: Config) -> Report:
    """Writes report.json and report.html into the run's `folder` and returns what report.json holds."""
    report = collect(folder, config)
    replace_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False))
    replace_text(folder / "report.html", page.render(report, folder, config))
    return report


def collect(folder: Path, config: Config) -> Report:
    """The figures of a run; the keys before, after, teacher, cache and seconds are fixed, the others may grow."""
    evaluations = {label: _evaluation(folder, label) for label in ("before", "after", "teacher")}
    records = metrics.read(folder / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    report: Report = {
        "before": _measures(evaluations["before"]),
        "after": _measures(evaluations["after"]),
        "teacher": {"accuracy": evaluations["teacher"].get("accuracy")},
        "cache": _cache(config.cache_root),
        "seconds": _seconds(records),
        "run": {
            "name": config.run.run_name,
            "steps": len(steps),
            "max_steps": config.train.max_steps,
            "refreshes": sum(record["kind"] == "refresh" for record in records),
            "trained_tokens": sum(step["tokens"] for step in steps),
            "first_step_share_forward": steps[0]["share_forward"] if steps else None,
            "first_step_gate": steps[0]["gate"] if steps else None,
            "last_step_gate": steps[-1]["gate"] if steps else None,
        },
    }
    report["ratios"] = _ratios(report["before"], report["after"])
    report["verdict"] = verdict(report)
    return report


def verdict(report: Report) -> str:
    """One sentence that the numbers bear out."""
    before, after, ratios = report["before"], report["after"], report["ratios"]
    if not report["run"]["steps"]:
        return "Not trained yet."
    if after["forward_kl"] is None and after["accuracy"] is None and after["on_student"]["forward_kl"] is None:
        return f"Unfinished: {report['run']['steps']} of {report['run']['max_steps']} steps, and nothing measured after them."
    divergence = _divergence_clause(ratios)
    if before["accuracy"] is None or after["accuracy"] is None:
        return f"{divergence[0].upper()}{divergence[1:]}; no answers were checked."
    points = 100 * (after["accuracy"] - before["accuracy"])
    solved = f"from {before['accuracy']:.1%} to {after['accuracy']:.1%} of held-out problems"
    if points >= NOTICEABLE_POINTS:
        return f"The student improved by {points:.1f} points, {solved}; {divergence}."
    if points <= -NOTICEABLE_POINTS:
        return f"The student got worse by {-points:.1f} points, {solved}; {divergence}."
    return f"The student did not improve on the answers ({solved}); {divergence}."


def summary(report: Report, folder: Path, config: Config) -> str:
    """What the demo prints last: the verdict, the table, where the time went, and what to do next."""
    before, after, run = report["before"], report["after"], report["run"]
    rows = [
        ("held-out problems solved", before["accuracy"], after["accuracy"], report["teacher"]["accuracy"], "{:.1%}"),
        ("forward KL on its own text, nats/token", before["on_student"]["forward_kl"], after["on_student"]["forward_kl"], None, "{:.4f}"),
        ("reverse KL on its own text", before["on_student"]["reverse_kl"], after["on_student"]["reverse_kl"], None, "{:.4f}"),
        ("forward KL on teacher text", before["forward_kl"], after["forward_kl"], None, "{:.4f}"),
        ("reverse KL on teacher text", before["reverse_kl"], after["reverse_kl"], None, "{:.4f}"),
        ("same most likely token, teacher text", before["top1_agreement"], after["top1_agreement"], None, "{:.1%}"),
    ]  # fmt: skip
    lines = ["", report["verdict"], "", f"{'':<40}{'before':>10}{'after':>10}{'teacher':>10}"]
    lines += [f"{name:<40}" + "".join(f"{_show(value, form):>10}" for value in values) for name, *values, form in rows]
    lines += ["", _time_line(report["seconds"])]
    if run["first_step_share_forward"] is not None:
        lines.append(
            f"gate    at the first step {run['first_step_share_forward']:.1%} of tokens had λ < 0.5 (mostly forward KL);"
            f" mean λ {run['first_step_gate']:.3f}, at the end {run['last_step_gate']:.3f}"
        )
    stored = report["cache"]
    if stored["rows"]:
        lines.append(
            f"cache   {stored['rows']:,} rollouts, {stored['scored_tokens']:,} scored tokens,"
            f" {stored['bytes_per_token']:.1f} bytes a token ({stored['signal_bytes_per_token']:.1f} of them teacher signal)"
        )
    lines += [
        "",
        f"look    {folder / 'report.html'}",
        f"        python -m cache show {config.cache_root} --index 0",
        "try     another gate:  python -m stages.pipeline --config pipeline.yaml --run_name tau-1 --tau 1.0",
        "        real models:   recipes/qwen3-4b.yaml (README, “Qwen3 on two 80 GB cards”)",
    ]
    return "\n".join(lines)


def _evaluation(folder: Path, label: str) -> dict[str, Any]:
    path = folder / "eval" / f"{label}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _measures(found: dict[str, Any]) -> Report:
    own = found.get("on_student") or {}
    return {
        **{name: found.get(name) for name in MEASURES},
        "accuracy": found.get("accuracy"),
        "on_student": {name: own.get(name) for name in MEASURES},
    }


def _cache(root: str) -> Report:
    keys = ("rows", "scored_tokens", "bytes_per_token", "signal_bytes_per_token")
    if not (Path(root) / "fingerprint.json").exists():
        return dict.fromkeys(keys)
    found = cache.open(root).summary()
    return {key: found[key] for key in keys}


def _seconds(records: list[dict[str, Any]]) -> Report:
    """Sums over the processes of a resumed run: of each the last clock that it noted."""
    clocks = {record["start"]: record for record in records if record["kind"] == "clock"}
    return {phase: sum(clock[phase] for clock in clocks.values()) for phase in (*metrics.PHASES, "total")}


def _ratios(before: Report, after: Report) -> Report:
    """KLs after training as a share of those before it."""

    def ratio(old: float | None, new: float | None) -> float | None:
        return new / old if old and new is not None else None

    return {
        "on_student": {name: ratio(before["on_student"][name], after["on_student"][name]) for name in MEASURES[:2]},
        "teacher_text": {name: ratio(before[name], after[name]) for name in MEASURES[:2]},
    }


def _divergence_clause(ratios: Report) -> str:
    where, found = "its own text", ratios["on_student"]
    if found["forward_kl"] is None or found["reverse_kl"] is None:
        where, found = "teacher text", ratios["teacher_text"]
    if found["forward_kl"] is None or found["reverse_kl"] is None:
        return "divergences were not measured both before and after"
    forward, reverse = found["forward_kl"], found["reverse_kl"]
    word = "fell" if max(forward, reverse) < 1 else "rose" if min(forward, reverse) > 1 else "went"
    return f"on {where} forward KL {word} to {forward:.2f} × and reverse KL to {reverse:.2f} × of what they were"


def _time_line(seconds: Report) -> str:
    total = seconds["total"]
    if not total:
        return "time    none noted"
    parts = {phase: seconds[phase] for phase in metrics.PHASES}
    parts["other"] = max(0.0, total - sum(parts.values()))
    return f"time    {total:.0f} s: " + ", ".join(
        f"{name} {value:.0f} s ({value / total:.0%})" for name, value in parts.items()
    )


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def main() -> None:
    config = configuration.parse_arguments(sys.argv[1:], __doc__ or "")
    folder = config.run_folder
    if not folder.is_dir():
        raise UserError(
            f"there is no run at {folder}; run `python -m stages.pipeline` with the same configuration first."
        )
    print(summary(write_report(folder, config), folder, config))


if __name__ == "__main__":
    command(main)
