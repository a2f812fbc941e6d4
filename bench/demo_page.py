"""What README shows of the demo: its curve, what it prints, and a screenshot of its page.

python -m bench.demo_page             run the demo in a folder of its own, and take them from it
python -m bench.demo_page RUN         take them from a finished run of the demo
python -m bench.demo_page --again     print and draw again what was taken before (docs/demo.json)

The first two need Playwright and Chromium.

Writes docs/demo.svg, docs/demo.png, docs/demo.json and a block of README.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from bench.view_page import chromium
from stages import report as reporting
from stages import view
from stages.runtime import metrics
from stages.runtime.config import parse_arguments
from stages.runtime.shares import wilson
from stages.viewer import gather, page

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8f98"  # distinguishable for colour-blind readers

ROOT = Path(__file__).resolve().parents[1]
README, RECORD, PICTURE = ROOT / "README.md", ROOT / "docs" / "demo.json", ROOT / "docs" / "demo.svg"
SCREENSHOT = ROOT / "docs" / "demo.png"
FOLDER = "runs/demo"
CURVES = ("step", "rkl", "fkl", "gate")
BLOCK = re.compile(r"(<!-- demo -->\n```\n).*?(\n```)", re.DOTALL)
PLACES = ("student ", "look ", "next ")  # lines from here on name files and further commands
WIDTH = 118
RESULTS = "report.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of the run")
    parser.add_argument("--again", action="store_true")
    own = parser.parse_args()
    if not own.again:
        with nullcontext(own.run) if own.run else fresh_run() as folder:
            SCREENSHOT.write_bytes(screenshot(folder))
            RECORD.write_text(json.dumps(record_of(folder), indent=1) + "\n")
    record = json.loads(RECORD.read_text())
    PICTURE.write_text(picture(record))
    README.write_text(with_output(README.read_text(), printed(record["report"])))


@contextmanager
def fresh_run() -> Iterator[Path]:
    """The folder of a run of the demo, which is made now and removed at the end."""
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "stages.pipeline", "--config", "pipeline.yaml", "--runs_dir", runs]
        subprocess.run(command, cwd=ROOT, check=True)
        yield Path(runs) / Path(FOLDER).name


def screenshot(folder: Path) -> bytes:
    """PNG of the page: the rollout of the largest reverse KL, at the token where student and teacher differ most."""
    with chromium(page.render(gather.page_data([view.source(str(folder))]))) as (browser, address):
        opened = browser.new_page(viewport={"width": 1280, "height": 760}, color_scheme="light")
        opened.goto(f"{address}#rollouts")
        opened.wait_for_selector("#tokens .token")
        opened.evaluate(WORST)
        opened.wait_for_selector(".inspected")
        opened.wait_for_timeout(300)  # canvases
        found: bytes = opened.screenshot()
        return found


WORST = """() => {
  const column = view.shown.tokens.columns.rkl;
  return chooseToken(column.indexOf(Math.max(...column)));
}"""


def record_of(folder: Path) -> dict[str, Any]:
    """What the picture and the printed text are made of: the report, and some figures of each step."""
    records = metrics.read(folder / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    report = json.loads((folder / RESULTS).read_text())
    kept = {name: value for name, value in report.items() if name not in ("gate", "config", "stage_one")}
    return {
        "report": kept,
        "answers": report["config"]["eval"]["eval_prompts"],
        "refreshes": [record["step"] for record in records if record["kind"] == "refresh"],
        "steps": {name: [float(f"{step[name]:.4g}") for step in steps] for name in CURVES},
    }


def printed(report: dict[str, Any]) -> str:
    """What the demo prints at its end: without its seconds, and up to the places to look at."""
    config = parse_arguments(["--config", str(ROOT / "pipeline.yaml")], "")
    lines = reporting.summary(report, Path(FOLDER), config).strip().split("\n")
    end = next((place for place, line in enumerate(lines) if line.startswith(PLACES)), len(lines))
    kept = [line for line in lines[:end] if not line.startswith("time ")]
    return "\n".join(_wrapped(line) for line in kept).strip()


def _wrapped(line: str) -> str:
    indent = " " * 8 * line.startswith(("gate ", "cache "))
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=indent)) if len(line) > WIDTH else line


def with_output(readme: str, text: str) -> str:
    """README with `text` in the block after the mark `<!-- demo -->`."""
    return BLOCK.sub(lambda found: found[1] + text + found[2], readme, count=1)


def shown(readme: str) -> str:
    """What README shows of the demo."""
    found = BLOCK.search(readme)
    if found is None:
        raise ValueError("README.md has no block after <!-- demo -->; add one.")
    return found[0].removeprefix(found[1]).removesuffix(found[2])


def picture(record: dict[str, Any]) -> str:
    """SVG: held-out problems solved, beside the divergences and the gate over the optimizer steps."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 2.9), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.6))
    _draw_accuracy(left, record)
    _draw_curves(right, record)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _draw_accuracy(axes: Any, record: dict[str, Any]) -> None:
    report = record["report"]
    for place, (name, colour) in enumerate((("before", GREY), ("after", BLUE), ("teacher", "#cfd6df"))):
        share = report[name]["accuracy"]
        centre, width = wilson(share, record["answers"])
        error = [[100 * (share - centre + width)], [100 * (centre + width - share)]]
        axes.bar(place, 100 * share, 0.7, color=colour, yerr=error, ecolor="#3a3f47", capsize=3)
        axes.text(place, 5, f"{share:.0%}", ha="center", color="white" if name != "teacher" else "black")
    axes.set_xticks(range(3), ["student\nbefore", "student\nafter", "teacher"])
    axes.set_ylim(0, 100)
    axes.set_title("held-out problems solved, %", loc="left", fontsize=11)


def _draw_curves(axes: Any, record: dict[str, Any]) -> None:
    steps = record["steps"]
    for step in record["refreshes"]:
        axes.axvline(step, color="#d9dde2", linewidth=0.8, zorder=0)
    for name, label, colour in (("rkl", "reverse KL", BLUE), ("fkl", "forward KL", ORANGE)):
        axes.plot(steps["step"], steps[name], color=colour, linewidth=1.6, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=1, right=steps["step"][-1])
    axes.set_xlabel("optimizer step (grey: new rollouts from the student)")
    axes.set_title("student against teacher, nats a token", loc="left", fontsize=11)
    weights = axes.twinx()
    weights.plot(
        steps["step"], steps["gate"], color=GREY, linewidth=1.2, linestyle="--", label="mean λ (right)"
    )
    weights.set_ylim(0, 1)
    weights.spines["top"].set_visible(False)
    lines = [*axes.get_lines()[len(record["refreshes"]) :], *weights.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=9, loc="center right")


def _svg(figure: Any) -> str:
    """The same bytes for the same figure."""
    import io

    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "dualkl"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    main()
