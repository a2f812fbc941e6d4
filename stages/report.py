"""Report on a run from its files: report.json, report.html, a summary.

    dualkl report runs/demo     or the run's configuration: dualkl report FILE

Loads no model. The configuration is the run's own; --runs_dir, --run_name and
--cache_dir locate it. Values that are not measured (yet), or not finite, are
null in report.json and a dash on the page.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "report")

import json
import sys
from collections.abc import Callable
from math import hypot
from pathlib import Path
from typing import Any

import cache
from cache.plain import plain
from stages.runtime import config as configuration
from stages.runtime import history, metrics, rounds, schema
from stages.runtime.config import Config
from stages.runtime.cuts import cut_sentence, cut_share
from stages.runtime.errors import UserError, command
from stages.runtime.files import replace_text
from stages.runtime.gate_summary import gate_summary
from stages.runtime.run_folders import run_folder
from stages.runtime.schema import finite
from stages.runtime.shares import NORMAL, sign_test
from stages.runtime.shipped import is_configuration
from stages.runtime.terminal import take_style
from stages.viewer import page
from stages.viewer.gather import Source, page_data
from stages.viewer.intervals import interval

Report = dict[str, Any]
MEASURES = ("forward_kl", "reverse_kl", "top1_agreement")
NOTICEABLE_POINTS = 1.0  # smaller changes of accuracy are reported as none
CHANCE = 0.05  # p from which a change of the answers is called chance
MOST_CUT = 0.5
CUT_REMEDY = (
    ", so most lack their end and the figures are of beginnings: raise max_new_tokens and train again"
)
DIVERGENCES = {"forward KL": "forward_kl", "reverse KL": "reverse_kl"}
NOTICEABLE_CUT = 0.05  # smaller shares of cut completions appear only in the table


def write_report(folder: Path, config: Config, say: Callable[[str], None] = print) -> Report:
    """Write report.json and report.html into the run's `folder`; returns the content of report.json.

    `say` is told what the page leaves out because it is missing or damaged.
    """
    records, evaluations = _read(folder)
    report = _figures(records, evaluations, config)
    replace_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False))
    run = Source(config.run.run_name, config.cache_root, folder, config, report, records, evaluations)
    data = page_data([run])
    replace_text(folder / "report.html", page.render(data))
    for note in data["runs"][0]["notes"]:
        say(plain(note))
    return report


def source(folder: Path) -> Source:
    """The run in `folder` with its figures, for the page."""
    given = configuration.parse_arguments(_located([str(folder)]), "")
    config = own_config(folder, given)
    records, evaluations = _read(folder)
    report = _figures(records, evaluations, config)
    return Source(config.run.run_name, config.cache_root, folder, config, report, records, evaluations)


def collect(folder: Path, config: Config) -> Report:
    """Figures of a run; the keys before, after, teacher, cache and seconds are stable, others may change."""
    return _figures(*_read(folder), config)


def _read(folder: Path) -> tuple[list[Report], dict[str, Report]]:
    """A run's records and evaluations; `after` is omitted if it measured an older student than the newest."""
    records = finite(metrics.read(folder / "metrics.jsonl"))
    labels = ("before", "after", "teacher")
    evaluations = {label: schema.evaluation(folder / "eval" / f"{label}.json") for label in labels}
    newest = _newest_student(records)
    if not newest or evaluations["after"].get("of", {}).get("policy_hash") != newest["policy_hash"]:
        evaluations["after"] = {}
    return records, evaluations


def _newest_student(records: list[Report]) -> Report:
    """Newest record of an exported or measured student; {} without one. A resume drops later records."""
    found = (r for r in reversed(records) if r["kind"] == "export" or r.get("label") == "after")
    return next((record for record in found if record.get("policy_hash")), {})


def _figures(records: list[Report], evaluations: dict[str, Report], config: Config) -> Report:
    newest = _newest_student(records)
    report: Report = {
        "before": _measures(evaluations["before"]),
        "after": _measures(evaluations["after"]),
        "teacher": {name: evaluations["teacher"].get(name) for name in ("accuracy", "cut_share")},
        "cache": _cache(config.cache_root),
        "seconds": _seconds(records),
        "stage_one": rounds.summary(rounds.rounds_of(records)),
        "run": _run(records, config)
        | {"measured_step": newest.get("step") if evaluations["after"] else None}
        | {"measured_apart": _measured_apart(evaluations), "answers_changed": _answers_changed(evaluations)}
        | {"unclear": _unclear(evaluations)},
        "gate": gate_summary(records),
        "config": _spelled(config.model_dump()),
    }
    report["ratios"] = _ratios(report["before"], report["after"])
    report = finite(report)  # sums and ratios of extreme values may overflow
    report["verdict"] = verdict(report)
    report["headline"] = headline(report)
    return report


def _answers_changed(evaluations: dict[str, Report]) -> Report | None:
    """How many held-out prompts were solved more often after training, or less; None if not known of all."""
    asked, solved = (
        [(evaluations[label].get("by_prompt") or {}).get(name) or [] for label in ("before", "after")]
        for name in ("prompt_ids", "solved")
    )
    if not asked[0] or asked[0] != asked[1] or any(share is None for shares in solved for share in shares):
        return None
    pairs = [*zip(*solved, strict=True)]
    return {"gained": sum(new > old for old, new in pairs), "lost": sum(new < old for old, new in pairs)}


def _unclear(evaluations: dict[str, Report]) -> dict[str, list[str]]:
    """Divergences whose change is within the 95 % error over held-out prompts, on each text."""
    before, after = evaluations["before"], evaluations["after"]
    own = [found.get("on_student") or {} for found in (before, after)]
    return {
        "on_student": [kind for kind, name in DIVERGENCES.items() if _is_within_error(own[0], own[1], name)],
        "teacher_text": [kind for kind, name in DIVERGENCES.items() if _is_paired_zero(before, after, name)],
    }


def _is_within_error(old: Report, new: Report, name: str) -> bool:
    """For texts that differ: the change is below 1.96 standard errors."""
    known = [found.get(key) for key in (name, f"{name}_error") for found in (old, new)]
    if None in known:
        return False
    before, after, *errors = (float(value) for value in known if value is not None)
    return abs(after - before) <= NORMAL * hypot(*errors)


def _is_paired_zero(old: Report, new: Report, name: str) -> bool:
    """For the same text: the interval of the rows' mean difference includes 0."""
    rows = [found.get("by_row") or {} for found in (old, new)]
    if any(name not in part or part.get("tokens") != rows[0].get("tokens") for part in rows):
        return False
    changes = [b - a for a, b in zip(rows[0][name], rows[1][name], strict=True)]
    bounds = interval(changes, rows[0]["tokens"])
    return bounds is not None and bounds[0] <= 0 <= bounds[1]


def headline(report: Report) -> str:
    """What came of the run, in a few words."""
    before, after, run = report["before"], report["after"], report["run"]
    if run["steps"] < run["max_steps"]:
        return (
            f"Unfinished: {run['steps']} of {run['max_steps']} steps" if run["steps"] else "Not trained yet"
        )
    if before["accuracy"] is not None and after["accuracy"] is not None:
        return _headline_of_answers(before["accuracy"], after["accuracy"], run["answers_changed"])
    for where, old, new in (
        ("on its own text", before["on_student"], after["on_student"]),
        ("on teacher text", before, after),
    ):
        if old["reverse_kl"] and new["reverse_kl"] is not None:
            return _headline_of_divergence(where, old["reverse_kl"], new["reverse_kl"])
    return f"Trained for {run['steps']} steps; nothing to compare"


def _headline_of_answers(before: float, after: float, changed: Report | None) -> str:
    if changed is None:
        return f"Solves {after:.1%} of held-out problems, {before:.1%} before training"
    if changed["gained"] == changed["lost"]:
        return f"Solves {after:.1%} of held-out problems, as many as before training"
    if sign_test(**changed) >= CHANCE:
        return f"Solves {after:.1%} of held-out problems, {before:.1%} before training: within chance"
    return f"Solves {after:.1%} of held-out problems, {'up' if after > before else 'down'} from {before:.1%}"


def _headline_of_divergence(where: str, before: float, after: float) -> str:
    ratio = round(after / before, 2)
    way = "Nearer to" if ratio < 1 else "Farther from" if ratio > 1 else "As far from"
    return f"{way} the teacher: reverse KL {before:.4f} → {after:.4f} nats a token {where}"


def _measured_apart(evaluations: dict[str, Report]) -> dict[str, list[Any]]:
    """Settings that differed between the measurements before and after: [before, after] by name."""
    old, new = (evaluations[label].get("of", {}) for label in ("before", "after"))
    compared = sorted((old.keys() & new.keys()) - {"policy_hash", "with_teacher"})
    return {name: [old[name], new[name]] for name in compared if old[name] != new[name]}


def verdict(report: Report) -> str:
    """One-line conclusion from the figures."""
    after, run = report["after"], report["run"]
    if not run["steps"]:
        return "Not trained yet."
    done = f"{run['steps']} of {run['max_steps']} steps"
    if (
        after["forward_kl"] is None
        and after["accuracy"] is None
        and after["on_student"]["forward_kl"] is None
    ):
        state = "Finished" if run["steps"] >= run["max_steps"] else "Unfinished"
        return f"{state}: {done}, and nothing measured after them."
    found = _answers_and_divergence(report) + _cut_clause(report) + _apart_clause(run)
    if run["steps"] < run["max_steps"]:
        return f"Unfinished, {done}; as last measured at step {run['measured_step']}: {found}"
    return found[0].upper() + found[1:]


def _answers_and_divergence(report: Report) -> str:
    """The change of accuracy, if measured before and after, and the change of the divergences."""
    before, after = report["before"]["accuracy"], report["after"]["accuracy"]
    divergence = _divergence_clause(report["ratios"], report["run"].get("unclear") or {})
    if before is None and after is None:
        return f"{divergence}; no answers were checked."
    if before is None or after is None:
        when, share = ("after", after) if before is None else ("before", before)
        solved = f"{share:.1%} of held-out problems solved {when} training"
        return f"{solved}, nothing to compare it with; {divergence}."
    points, changed = 100 * (after - before), report["run"].get("answers_changed")
    solved = f"from {before:.1%} to {after:.1%} of held-out problems"
    if changed and abs(points) >= NOTICEABLE_POINTS and sign_test(**changed) >= CHANCE:
        return (
            f"no clear change of the answers: {solved} ({changed['gained']} gained, {changed['lost']} lost),"
            f" which chance explains, and more eval_prompts would tell; {divergence}."
        )
    if points >= NOTICEABLE_POINTS:
        return f"the student improved by {points:.1f} points, {solved}; {divergence}."
    if points <= -NOTICEABLE_POINTS:
        return f"the student got worse by {-points:.1f} points, {solved}; {divergence}."
    return f"the student did not improve on the answers ({solved}); {divergence}."


def _apart_clause(run: Report) -> str:
    apart = run.get("measured_apart") or {}
    pairs = ", ".join(f"{name} {old} and {new}" for name, (old, new) in apart.items())
    return (
        f" Before and after were measured with different settings ({pairs}); do not compare them."
        if pairs
        else ""
    )


def _cut_clause(report: Report) -> str:
    """Shares of training completions and held-out answers that were cut, if large."""
    shares = {"completions": report["cache"]["cut_share"], "held-out answers": report["after"]["cut_share"]}
    much = [cut_sentence(share, what) for what, share in shares.items() if (share or 0) >= NOTICEABLE_CUT]
    if not much:
        return ""
    are_most = max(share or 0 for share in shares.values()) >= MOST_CUT
    return f" {'; '.join(much)}{CUT_REMEDY if are_most else ''}."


def _mix_line(run: Report, config: Config) -> str:
    """How the two KLs were mixed."""
    loss = config.loss
    if loss.objective == "jsd":
        return f"loss    Jensen-Shannon divergence with β {loss.gating:g}"
    if not loss.has_threshold:
        return f"mix     constant: λ, the weight of the reverse KL, is {loss.gating:g} for every token"
    return (
        f"gate    at the first step {run['first_step_share_forward']:.1%} of tokens had λ < 0.5 (mostly forward"
        f" KL); mean λ {_show(run['first_step_gate'], '{:.3f}')}, at the end"
        f" {_show(run['last_step_gate'], '{:.3f}')}"
    )


def summary(report: Report, folder: Path, config: Config) -> str:
    """Final terminal output: the verdict, the table, time by phase, and next steps."""
    run, stored = report["run"], report["cache"]
    lines = ["", report["verdict"], "", *_measured(report), _time_line(report["seconds"])]
    if run["first_step_share_forward"] is not None:
        lines.append(_mix_line(run, config))
    spans = run["configurations"]
    if len(spans) > 1:
        lines += [f"keys    {_span(span)}" for span in spans[1:]]
    if stored["rows"]:
        lines.append(
            f"cache   {stored['rows']:,} rollouts, {stored['scored_tokens']:,} scored tokens,"
            f" {stored['bytes_per_token']:.1f} bytes a token ({stored['signal_bytes_per_token']:.1f} of them"
            f" teacher signal); {cut_sentence(stored['cut_share'])}"
        )
    if (folder / "student").is_dir():
        lines.append(f"student {folder / 'student'}")
    lines += [
        "",
        f"look    {folder / 'report.html'}",
        f"        dualkl cache show {config.cache_root} --index 0",
    ]
    if run["steps"] >= run["max_steps"]:
        lines.append(f"next    dualkl export {folder} --merge")
    else:
        lines.append("next    the same command again: it goes on where this one stopped")
    return "\n".join(lines)


def _measured(report: Report) -> list[str]:
    """The table and a blank line; without evaluations, the last step's divergences."""
    if any(value is not None for label in ("before", "after") for value in _numbers(report[label])):
        return [*table(report), ""]
    run = report["run"]
    if run["last_step_reverse_kl"] is None:
        return []
    return [
        f"train   reverse KL {run['last_step_reverse_kl']:.4f} and forward KL"
        f" {_show(run['last_step_forward_kl'], '{:.4f}')} nats a token at the last step"
    ]


def _numbers(measures: Report) -> list[float | None]:
    return [
        *(value for value in measures.values() if not isinstance(value, dict)),
        *measures["on_student"].values(),
    ]


def _span(span: Report) -> str:
    changed = ", ".join(f"{name} {new} (was {old})" for name, (old, new) in span["changed"].items())
    how = changed or "the same keys, elsewhere or by other versions"
    return f"steps {span['steps'][0]} to {span['steps'][1]} with {how}"


def table(report: Report) -> list[str]:
    """Aligned table of before, after and teacher."""
    before, after = report["before"], report["after"]
    own_before, own_after = before["on_student"], after["on_student"]
    rows = [
        ("held-out problems solved", before["accuracy"], after["accuracy"], "{:.1%}"),
        ("held-out answers cut at max_new_tokens", before["cut_share"], after["cut_share"], "{:.1%}"),
        (
            "forward KL on its own text, nats/token",
            own_before["forward_kl"],
            own_after["forward_kl"],
            "{:.4f}",
        ),
        ("reverse KL on its own text", own_before["reverse_kl"], own_after["reverse_kl"], "{:.4f}"),
        (
            "same most likely token, its own text",
            own_before["top1_agreement"],
            own_after["top1_agreement"],
            "{:.1%}",
        ),
        ("forward KL on teacher text", before["forward_kl"], after["forward_kl"], "{:.4f}"),
        ("reverse KL on teacher text", before["reverse_kl"], after["reverse_kl"], "{:.4f}"),
        ("same most likely token, teacher text", before["top1_agreement"], after["top1_agreement"], "{:.1%}"),
    ]
    teacher = [report["teacher"]["accuracy"], report["teacher"]["cut_share"], *[None] * (len(rows) - 2)]
    return [f"{'':<40}{'before':>10}{'after':>10}{'teacher':>10}"] + [
        f"{name:<40}" + "".join(f"{_show(value, form):>10}" for value in (old, new, best))
        for (name, old, new, form), best in zip(rows, teacher, strict=True)
    ]


def _run(records: list[dict[str, Any]], config: Config) -> Report:
    """Steps, refreshes and tokens so far; tokens per second count optimizer steps only."""
    steps = [record for record in records if record["kind"] == "step"]
    tokens = sum(step.get("tokens", 0) for step in steps)
    seconds = sum(step.get("seconds") or 0.0 for step in steps)
    first, last = (steps[0], steps[-1]) if steps else ({}, {})
    return {
        "name": config.run.run_name,
        "steps": len(steps),
        "max_steps": config.train.max_steps,
        "refreshes": sum(record["kind"] == "refresh" for record in records),
        "refresh_reasons": [
            {"step": record["step"], "reason": record["reason"]}
            for record in records
            if record["kind"] == "refresh" and "reason" in record
        ],
        "trained_tokens": tokens,
        "trained_tokens_per_second": tokens / seconds if seconds else None,
        "first_step_share_forward": first.get("share_forward"),
        "first_step_gate": first.get("gate"),
        "last_step_gate": last.get("gate"),
        "last_step_reverse_kl": last.get("rkl"),
        "last_step_forward_kl": last.get("fkl"),
        "configurations": _spelled(history.spans(records)),
        "warnings": [record["text"] for record in records if record["kind"] == "warning"],
    }


def _spelled(values: Any) -> Any:
    """The same plain values with infinities as text, so that infinite settings do not become null."""
    return json.loads(json.dumps(values), parse_constant=str)


def _measures(found: dict[str, Any]) -> Report:
    own = found.get("on_student") or {}
    return {
        **{name: found.get(name) for name in MEASURES},
        "accuracy": found.get("accuracy"),
        "cut_share": found.get("cut_share"),
        "on_student": {name: own.get(name) for name in (*MEASURES, "cut_share")},
    }


def _cache(root: str) -> Report:
    """Figures of the cache; None without one, or if it is damaged, which the page says (`gather.one`)."""
    keys = ("rows", "scored_tokens", "bytes_per_token", "signal_bytes_per_token")
    try:
        found = cache.open(root).summary() if cache.exists(root) else None
    except cache.CacheError:
        found = None
    if found is None:
        return dict.fromkeys((*keys, "cut_share"))
    return {key: found[key] for key in keys} | {"cut_share": cut_share(found["finish_reasons"])}


def _seconds(records: list[dict[str, Any]]) -> Report:
    """Seconds summed over the processes of a resumed run, from each one's last clock record."""
    clocks = {record["start"]: record for record in records if record["kind"] == "clock"}
    phases = (*metrics.PHASES, "total")
    return {phase: sum(clock.get(phase, 0.0) for clock in clocks.values()) for phase in phases}


def _ratios(before: Report, after: Report) -> Report:
    """KLs after training divided by those before."""

    def ratio(old: float | None, new: float | None) -> float | None:
        return new / old if old and new is not None else None

    return {
        "on_student": {
            name: ratio(before["on_student"][name], after["on_student"][name]) for name in MEASURES[:2]
        },
        "teacher_text": {name: ratio(before[name], after[name]) for name in MEASURES[:2]},
    }


def _divergence_clause(ratios: Report, unclear: dict[str, list[str]]) -> str:
    """The change of both KLs, on the student's own text if measured there. `unclear`: those within their error."""
    where, found, doubtful = "its own text", ratios["on_student"], unclear.get("on_student")
    if found["forward_kl"] is None or found["reverse_kl"] is None:
        where, found, doubtful = "teacher text", ratios["teacher_text"], unclear.get("teacher_text")
    if found["forward_kl"] is None or found["reverse_kl"] is None:
        return "divergences were not measured both before and after"
    forward, reverse = round(found["forward_kl"], 2), round(found["reverse_kl"], 2)  # as printed
    word = "fell" if max(forward, reverse) < 1 else "rose" if min(forward, reverse) > 1 else "went"
    doubt = (
        f" (the change of {' and '.join(doubtful)} is within the error over so few held-out prompts)"
        if doubtful
        else ""
    )
    return (
        f"on {where} forward KL {word} to {forward:.2f} × and reverse KL to {reverse:.2f} × of what they were"
        + doubt
    )


def _time_line(seconds: Report) -> str:
    total = seconds["total"]
    if not total:
        return "time    none noted"
    parts = {phase: seconds[phase] for phase in metrics.PHASES}
    parts["other"] = max(0.0, total - sum(parts.values()))
    return f"time    {total:.0f} s: " + ", ".join(
        f"{name} {value:.0f} s ({value / total:.0%})" for name, value in parts.items() if value >= total / 200
    )


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def own_config(folder: Path, given: Config) -> Config:
    """Configuration of the run's newest steps, with the location of the run taken from `given`."""
    path = folder / "config.yaml"
    if not path.is_file():
        return given
    own = configuration.parse_arguments(["--config", str(path)], "")
    place = {
        "run_name": given.run.run_name,
        "runs_dir": given.run.runs_dir,
        "cache_dir": given.run.cache_dir or own.run.cache_dir,
    }
    return own.model_copy(update={"run": own.run.model_copy(update=place)})


def main() -> None:
    style, arguments = take_style(sys.argv[1:])
    given = configuration.parse_arguments(_located(arguments), __doc__ or "")
    folder = given.run_folder
    if not folder.is_dir():
        raise UserError(f"there is no run at {folder}; `dualkl run` with the same configuration makes it.")
    config = own_config(folder, given)
    report = write_report(folder, config, style.say)
    style.conclude(summary(report, folder, config), report)


def _located(arguments: list[str]) -> list[str]:
    """Replace a run's folder, or its name in `runs`, given first, by the keys that locate it."""
    if not arguments or arguments[0].startswith("-") or is_configuration(arguments[0]):
        return arguments
    folder = run_folder(arguments[0])
    whole = folder.resolve()
    return [
        *arguments[1:],
        "--runs_dir",
        str(folder.parent if folder.name else whole.parent),
        "--run_name",
        whole.name,
    ]


if __name__ == "__main__":
    command(main)
