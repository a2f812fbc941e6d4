"""The overview of a run: table with intervals, curves, gate pictures, seconds, provenance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from stages.runtime import history, metrics
from stages.runtime.rounds import Round
from stages.viewer import intervals

Found = dict[str, Any]
HARDLY = 0.99  # share of the tokens at one end of λ from which the gate hardly acts
CURVES: list[tuple[str, str, bool, dict[str, str]]] = [
    ("Loss", "nats/token", False, {"loss": "loss"}),
    ("Divergence from the teacher", "nats/token", True, {"rkl": "reverse KL", "fkl": "forward KL"}),
    ("Gate", "", False, {"gate": "mean λ", "share_forward": "share of tokens with λ < 0.5"}),
    ("Gate threshold", "nats", False, {"tau": "τ"}),
    (
        "Reverse KL on each side of τ",
        "nats/token",
        True,
        {"rkl_above": "tokens with D > τ", "rkl_below": "tokens with D ≤ τ", "tau": "τ"},
    ),
    (
        "Uncertainty on the step's tokens",
        "nats/token",
        False,
        {"teacher_entropy": "teacher's entropy", "student_surprise": "student's −log p"},
    ),
    ("Completion length", "tokens", False, {"mean_completion_tokens": "mean length"}),
    ("Completions cut at max_new_tokens", "%", False, {"cut_percent": "cut completions"}),
    ("Drift from the policy of the rows", "nats/token", False, {"drift": "drift"}),
    ("Effective sample size", "", False, {"ess": "of the tokens", "ess_rows": "of the rows"}),
    ("Age of the rows", "steps", False, {"staleness": "staleness"}),
    ("Gradient norm before clipping", "", True, {"grad_norm": "gradient norm"}),
    ("Learning rate", "", False, {"lr": "learning rate"}),
    ("Throughput", "tokens/s", False, {"tokens_per_second": "training"}),
    (
        "Held-out text of the teacher",
        "nats/token",
        True,
        {"heldout_reverse_kl": "reverse KL", "heldout_forward_kl": "forward KL"},
    ),
]
"""Title, unit, whether the axis starts logarithmic, and the column and label of each line."""
TABLE = [
    ("Held-out problems solved", "%", "", "accuracy"),
    ("Held-out answers cut at max_new_tokens", "%", "", "cut_share"),
    ("Forward KL on its own text", "nats", "on_student", "forward_kl"),
    ("Reverse KL on its own text", "nats", "on_student", "reverse_kl"),
    ("Same most likely token, its own text", "%", "on_student", "top1_agreement"),
    ("Forward KL on teacher text", "nats", "", "forward_kl"),
    ("Reverse KL on teacher text", "nats", "", "reverse_kl"),
    ("Same most likely token, teacher text", "%", "", "top1_agreement"),
]
OF_PROMPTS = ("accuracy", "cut_share")
"""Figures that are shares of prompts; the others are means over tokens."""


def table(evaluations: dict[str, Found]) -> list[Found]:
    """Before, after and teacher, each with the bounds of its 95 % interval over prompts (`intervals`)."""
    rows = []
    for label, unit, part, name in TABLE:
        cells = {when: _cell(found, part, name) for when, found in evaluations.items()}
        rows.append({"label": label, "unit": unit, **cells})
    return rows


def _cell(evaluation: Found, part: str, name: str) -> intervals.Value | None:
    found = evaluation if not part else evaluation.get(part) or {}
    value = found.get(name)
    if name in OF_PROMPTS:
        flags = (evaluation.get("by_prompt") or {}).get("solved" if name == "accuracy" else "cut")
        known = flags and all(flag is not None for flag in flags)
        return intervals.with_interval(value, intervals.of_share(flags) if known and flags else None)
    return intervals.with_interval(value, intervals.of_rows(found, name))


def compared(new: dict[str, Found], old: dict[str, Found]) -> list[Found]:
    """The figures after training of a run minus those of another, of TABLE, over the same prompts."""
    rows = []
    for label, unit, part, name in TABLE:
        pairs = [_by_prompt(own.get("after") or {}, part, name) for own in (new, old)]
        of_pairs = intervals.of_share_difference if name in OF_PROMPTS else intervals.of_difference
        if (found := of_pairs(*pairs)) is not None:
            rows.append({"label": label, "unit": unit, **found})
    return rows


def _by_prompt(evaluation: Found, part: str, name: str) -> intervals.Pairs:
    """(sum, weight) of a figure by prompt; empty if it is not known of each, or a prompt has several."""
    if name in OF_PROMPTS:
        found = evaluation.get("by_prompt") or {}
        sums = found.get("solved" if name == "accuracy" else "cut") or []
        weights = [1] * len(sums)
    else:
        found = (evaluation if not part else evaluation.get(part) or {}).get("by_row") or {}
        sums, weights = found.get(name) or [], found.get("tokens") or []
    prompts = found.get("prompt_ids") or []
    if not len({*prompts}) == len(prompts) == len(sums) == len(weights) or None in sums:
        return {}
    return {
        prompt: (float(one), float(weight))
        for prompt, one, weight in zip(prompts, sums, weights, strict=True)
    }


def steps(records: Sequence[Found]) -> tuple[list[Found], dict[str, list[Any]]]:
    """The curves that have values, and their columns by step; None where a step has none."""
    taken = {record["step"]: _derived(record) for record in records if record["kind"] == "step"}
    for record in records:
        if record["kind"] == "eval" and record.get("step") in taken:
            kls = ("reverse_kl", "forward_kl")
            taken[record["step"]] |= {f"heldout_{name}": record.get(name) for name in kls}
    order = sorted(taken)
    names = {key for *_, lines in CURVES for key in lines}
    columns = {key: [taken[step].get(key) for step in order] for key in sorted(names)}
    columns = {key: values for key, values in columns.items() if any(v is not None for v in values)}
    is_adapted = len({*columns.get("tau", ())}) > 1
    curves = []
    for title, unit, is_log, lines in CURVES:
        series = [{"key": key, "label": label} for key, label in lines.items() if key in columns]
        if series and (title != "Gate threshold" or is_adapted):
            curves.append({"title": title, "unit": unit, "log": is_log, "x": "step", "series": series})
    return curves, {"step": order, **columns}


def _derived(step: Found) -> Found:
    seconds, surprise, cut = step.get("seconds"), step.get("student_logprob"), step.get("cut_share")
    return step | {
        "tokens_per_second": step.get("tokens", 0) / seconds if seconds else None,
        "student_surprise": None if surprise is None else -surprise,
        "cut_percent": None if cut is None else 100 * cut,
    }


def marks(records: Sequence[Found]) -> list[Found]:
    """Refreshes, evaluations, warnings and changes of configuration, at their steps."""
    found = []
    for record in records:
        kind, step = record["kind"], record.get("step", 0)
        if kind == "refresh":
            text = f"refresh {record.get('refresh_index', '')}: {record.get('reason') or 'new rollouts'}"
            found.append({"step": step, "kind": "refresh", "text": text})
        elif kind == "eval" or (kind == "evaluation" and record.get("label") in ("before", "after")):
            text = "held-out KLs measured" if kind == "eval" else f"measured {record['label']} training"
            found.append({"step": step, "kind": "eval", "text": text})
        elif kind == "warning":
            found.append({"step": step, "kind": "warning", "text": record["text"]})
        elif kind == "config":
            found.append({"step": record["from_step"], "kind": "start", "text": "training starts here"})
    return found


def evals(records: Sequence[Found]) -> dict[str, list[Any]]:
    """Held-out figures during training, as columns by step."""
    taken = [record for record in records if record["kind"] == "eval"]
    names = ("step", "forward_kl", "reverse_kl", "top1_agreement", "is_best")
    return {name: [record.get(name) for record in taken] for name in names}


def gate(records: Sequence[Found], summary: Found, loss: Found) -> Found:
    """Gate pictures from the `gate` records: D over all steps, λ over time, tables of the last steps."""
    if not summary:
        return {}
    newest = next(record for record in reversed(records) if record["kind"] == "gate")
    bins = len(newest["gate_histogram"]), len(newest["divergence_histogram"])
    taken = [record for record in records if record["kind"] == "gate"]
    taken = [r for r in taken if (len(r["gate_histogram"]), len(r["divergence_histogram"])) == bins]
    start, width = math.log10(newest["histogram_from"]), 1 / newest["histogram_bins_per_decade"]
    counts = [sum(column) for column in zip(*(r["divergence_histogram"] for r in taken), strict=True)]
    names = {"tau": newest.get("tau"), "alpha": loss.get("alpha"), "gating": loss.get("gating")}
    return {
        "lambda_vs_d": {
            "edges": [10 ** (start + width * (place - 1)) for place in range(bins[1] + 1)],
            "counts": counts,
            "gate_on": loss.get("gate_on"),
            **names,
        },
        "histogram_over_time": {
            "steps": [record["step"] for record in taken],
            "edges": [place / bins[0] for place in range(bins[0] + 1)],
            "counts": [record["gate_histogram"] for record in taken],
        },
        "by_position": summary["last"]["by_position"],
        "by_age": summary["last"]["by_age"],
        "first": summary["first"],
        "last": summary["last"],
        "told": told_of_gate(summary, loss),
    }


def told_of_gate(summary: Found, loss: Found) -> str:
    """What the gate did, in a sentence or two: the shares of the tokens with λ near 1 and near 0."""
    if loss.get("objective", "gated") != "gated":
        return ""
    if isinstance(loss.get("gating"), int | float):
        return f"There is no gate: λ is {loss['gating']:g} for every token."
    first, last = (_near_ends(summary[part]["gate_histogram"]) for part in ("first", "last"))
    if first is None or last is None:
        return ""
    spans = [
        "step {}".format(*part["steps"])
        if part["steps"][0] == part["steps"][1]
        else "steps {}–{}".format(*part["steps"])
        for part in (summary["first"], summary["last"])
    ]
    told = (
        f"In {spans[1]}, {last[0]:.1%} of the tokens had λ above 0.9 (almost only reverse KL) and {last[1]:.1%}"
        " below 0.1 (almost only forward KL)"
    )
    if summary["first"]["steps"][0] < summary["last"]["steps"][0]:
        told += f"; in {spans[0]}, {first[0]:.1%} and {first[1]:.1%}"
    if max(last) >= HARDLY and max(first) >= HARDLY:
        told += (
            f". The gate hardly acted: a constant λ of {int(last[0] >= HARDLY)} would train nearly the same"
        )
    return told + "."


def _near_ends(counts: Sequence[float]) -> tuple[float, float] | None:
    """Shares of the tokens with λ in the highest and in the lowest tenth; None without tokens."""
    total, tenth = sum(counts), len(counts) // 10
    return (sum(counts[-tenth:]) / total, sum(counts[:tenth]) / total) if total and tenth else None


def seconds(report: Found) -> list[Found]:
    """Seconds of each phase of the slowest process, `other` last; empty if none were noted."""
    total = report["seconds"]["total"]
    if not total:
        return []
    kinds = {
        "load": "load",
        "rollout": "generate",
        "score": "score",
        "train": "train",
        "evaluate": "evaluate",
    }
    parts = [
        {"phase": p, "seconds": report["seconds"][p], "kind": kinds.get(p, "other")} for p in metrics.PHASES
    ]
    other = max(0.0, total - sum(part["seconds"] for part in parts))
    return [*parts, {"phase": "other", "seconds": other, "kind": "other"}]


def rounds(found: Sequence[Round]) -> dict[str, list[Any]]:
    """Stage one round by round: seconds by use, tokens per second, peak GPU bytes (0: no GPU)."""
    return {
        "seconds": [one.seconds for one in found],
        "generated_tokens_per_second": [one.generated_rate for one in found],
        "scored_tokens_per_second": [one.scored_rate for one in found],
        "peak_memory_bytes": [one.peak for one in found],
        "is_first": [one.is_first for one in found],
    }


def memory(records: Sequence[Found]) -> Found:
    """Peak GPU bytes by stage; empty without a GPU."""
    peaks: dict[str, float] = {}
    for record in records:
        if record["kind"] == "memory" and record.get("peak_memory_bytes"):
            stage = str(record.get("stage", ""))
            peaks[stage] = max(peaks.get(stage, 0.0), record["peak_memory_bytes"])
    return peaks


def config_changes(records: Sequence[Found]) -> list[Found]:
    """Keys that changed while the run was trained, with the first step of the new value."""
    return [
        {"from_step": span["steps"][0], "key": key, "old": old, "new": new}
        for span in history.spans(list(records))
        for key, (old, new) in span["changed"].items()
    ]
