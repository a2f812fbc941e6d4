"""report.html: one self-contained page with the verdict, figures and samples of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stages.runtime import metrics, rounds
from stages.runtime.config import Config, to_yaml
from stages.runtime.rounds import Round

TEMPLATE = Path(__file__).resolve().parent.parent / "report_template.html"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8f98"  # distinguishable for colour-blind readers
TRACED_ROWS = 2
USES = {
    "generate": ("generating", BLUE),
    "score": ("scoring", "#56b4e9"),
    "write": ("waiting for the writer", "#e69f00"),
    "rows": ("waiting for rollouts", "#cc79a7"),
    "other": ("other", "#dfe3e8"),
}


def render(
    report: dict[str, Any],
    records: list[dict[str, Any]],
    evaluations: dict[str, dict[str, Any]],
    folder: Path,
    config: Config,
) -> str:
    """The page as text: no scripts, no external resources, all text from the run escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        report=report,
        pictures=[Markup(svg) for svg in _pictures(records)],
        histograms=[Markup(svg) for svg in _histograms(report["gate"])],
        phases=_phases(report["seconds"]),
        uses=[(*USES[name], share) for name, share in report["stage_one"]["shares"].items() if share],
        round_pictures=[Markup(svg) for svg in _round_pictures(rounds.rounds_of(records))],
        samples=_samples(evaluations),
        traces=[],
        config_text=to_yaml(config),
        show=lambda value, form: "–" if value is None else form.format(value),
    )


CURVES = [
    ("Loss, nats a token", {"loss": ("loss", BLUE)}),
    (
        "Divergence from the teacher, nats a token",
        {"rkl": ("reverse KL", BLUE), "fkl": ("forward KL", ORANGE)},
    ),
    (
        "Gate",
        {
            "gate": ("mean λ (weight of the reverse KL)", BLUE),
            "share_forward": ("share of tokens with λ < 0.5", ORANGE),
        },
    ),
    ("Gate threshold τ, nats", {"tau": ("τ", BLUE)}),
    (
        "Reverse KL on each side of τ, nats a token",
        {
            "rkl_above": ("tokens with D > τ", ORANGE),
            "tau": ("τ", GREY),
            "rkl_below": ("tokens with D ≤ τ", BLUE),
        },
    ),
    ("Gradient norm before clipping", {"grad_norm": ("gradient norm", GREY)}),
    ("Drift from the policy of the rows, KL in nats a token", {"drift": ("drift", BLUE)}),
    (
        "Effective sample size, share",
        {"ess": ("of the tokens", BLUE), "ess_rows": ("of the rows", ORANGE)},
    ),
]
"""Title, and the lines of each picture: key of the step records to label and colour."""


def _pictures(records: list[dict[str, Any]]) -> list[str]:
    """SVG curves over optimizer steps, with refreshes as vertical lines."""
    steps = [record for record in records if record["kind"] == "step"]
    if not steps:
        return []
    refreshes = [record["step"] for record in records if record["kind"] == "refresh"]
    noted = set.intersection(*(set(step) for step in steps))  # older runs noted less
    found = [_curve(steps, refreshes, title, lines) for title, lines in CURVES if noted >= lines.keys()]
    heldout = [record for record in records if record["kind"] == "eval"]
    if heldout:
        lines = {"reverse_kl": ("reverse KL", BLUE), "forward_kl": ("forward KL", ORANGE)}
        found.append(_curve(heldout, refreshes, "Divergence on held-out teacher text, nats a token", lines))
    return found


def _histograms(gate: dict[str, Any]) -> list[str]:
    """SVG histograms of the gated divergence (τ marked) and of λ, in the first and last steps."""
    if not gate:
        return []
    parts = [(gate["first"], ORANGE, "first"), (gate["last"], BLUE, "last")]
    bins = len(gate["first"]["divergence_histogram"])
    start, width = math.log10(gate["first"]["histogram_from"]), 1 / gate["first"]["histogram_bins_per_decade"]
    edges = [10 ** (start + width * (place - 1)) for place in range(bins + 1)]
    figure, axes = _figure("Divergence D that the gate looked at, share of the tokens")
    for part, colour, name in parts:
        label = f"{name} steps ({part['steps'][0]} to {part['steps'][1]})"
        _outline(axes, part["divergence_histogram"], edges, colour, label)
        if part["tau"] is not None:
            axes.axvline(part["tau"], color=colour, linewidth=1.2, linestyle="--", label=f"τ, {name} steps")
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(top=1.5 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlabel("D, nats (outermost bins: all below and above)")
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    pictures = [_svg(figure)]
    figure, axes = _figure("λ, share of the tokens")
    count = len(gate["first"]["gate_histogram"])
    for part, colour, name in parts:
        _outline(axes, part["gate_histogram"], [i / count for i in range(count + 1)], colour, f"{name} steps")
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xlabel("λ, weight of the reverse KL")
    axes.legend(frameon=False, fontsize=9, loc="upper center")
    return [*pictures, _svg(figure)]


def _outline(axes: Any, counts: list[int], edges: list[float], colour: str, label: str) -> None:
    total = max(1, sum(counts))
    axes.stairs([count / total for count in counts], edges, color=colour, linewidth=1.5, label=label)


def _figure(title: str) -> tuple[Any, Any]:
    """An empty figure of the page's size, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 2.9), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curve(
    steps: list[dict[str, Any]], refreshes: list[int], title: str, lines: dict[str, tuple[str, str]]
) -> str:
    figure, axes = _figure(title)
    for step in refreshes:
        axes.axvline(step, color="#c9cdd3", linewidth=0.8, zorder=0)
    for key, (label, colour) in lines.items():
        marker = "o" if len(steps) == 1 else None
        values = [math.nan if s[key] is None else s[key] for s in steps]  # None: no tokens
        axes.plot([s["step"] for s in steps], values, color=colour, linewidth=1.5, label=label, marker=marker)
    axes.set_xlabel("optimizer step (grey lines: refreshes)" if refreshes else "optimizer step")
    if "rkl_below" in lines:
        axes.set_yscale("log")  # they differ by orders of magnitude
        axes.set_ylim(top=20 * axes.get_ylim()[1])  # room for the legend
    else:
        axes.set_ylim(bottom=min(0, *(s[key] for s in steps for key in lines if s[key] is not None)))
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _round_pictures(found: list[Round]) -> list[str]:
    """SVG curves over the rounds of stage one: time by phase, tokens per second, and GPU memory if any."""
    if not found:
        return []
    starts = [number for number, one in enumerate(found, 1) if one.is_first]
    rates = {
        "drawn": (BLUE, [one.generated_rate for one in found]),
        "read by the teacher": (ORANGE, [one.scored_rate for one in found]),
    }
    pictures = [_time_of_rounds(found, starts)]
    if any(rate for _, of_kind in rates.values() for rate in of_kind):
        pictures.append(_lines_of_rounds("Tokens a second, each of its own time", rates, starts))
    if any(one.peak for one in found):
        memory = {"peak": (GREY, [one.peak / 2**30 for one in found])}
        pictures.append(_lines_of_rounds("Peak GPU memory so far, GiB", memory, starts))
    return pictures


def _time_of_rounds(found: list[Round], starts: list[int]) -> str:
    figure, axes = _round_axes("Seconds of each round, by use as above", starts)
    bottoms = [0.0] * len(found)
    for name, (_, colour) in USES.items():
        heights = [one.seconds[name] for one in found]
        axes.bar(range(1, len(found) + 1), heights, 0.8, bottom=bottoms, color=colour)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    return _svg(figure)


def _lines_of_rounds(
    title: str, lines: Mapping[str, tuple[str, Sequence[float | None]]], starts: list[int]
) -> str:
    figure, axes = _round_axes(title, starts)
    for label, (colour, values) in lines.items():
        places = [(number, value) for number, value in enumerate(values, 1) if value is not None]
        if places:
            axes.plot(*zip(*places, strict=True), color=colour, linewidth=1.5, marker=".", label=label)
    axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _round_axes(title: str, starts: list[int]) -> tuple[Any, Any]:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(title)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="#c9cdd3", linewidth=0.8, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round (grey lines: refreshes)" if len(starts) > 1 else "round")
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure's <svg> element, scaled to its container."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "dualkl"}):
        file = io.StringIO()
        figure.savefig(
            file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = file.getvalue()
    return text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1)


def _phases(seconds: dict[str, float]) -> list[tuple[str, float, float]]:
    """(name, seconds, percentage) of each phase, `other` last."""
    total = seconds["total"] or 1.0
    named = [(phase, seconds[phase]) for phase in metrics.PHASES]
    named.append(("other", max(0.0, total - sum(value for _, value in named))))
    return [(name, value, 100 * value / total) for name, value in named]


def _samples(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Completions of the same prompts before training, after training, and by the teacher."""
    found = {label: evaluation.get("samples", []) for label, evaluation in evaluations.items()}
    count = max(len(samples) for samples in found.values())
    rows = []
    for i in range(count):
        present = {label: samples[i] for label, samples in found.items() if i < len(samples)}
        rows.append({"prompt": next(iter(present.values()))["prompt"], "by": present})
    return rows
