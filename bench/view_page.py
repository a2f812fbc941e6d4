"""Size and speed of the viewer's page of a run, in headless Chromium, and what its traces cost in training.

python -m bench.view_page RUN                  the page as `dualkl view RUN` writes it
python -m bench.view_page RUN --rows 200       with so many rollouts, whatever their size
python -m bench.view_page RUN --json FILE      the figures as JSON too

Needs Playwright and the system's Chromium. Steps of training are compared within the run: `trace_every 2` has
as many traced steps as others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.measuring import markdown
from stages import view
from stages.runtime import metrics, traces
from stages.viewer import gather, page

Figures = dict[str, Any]
WINDOW = {"width": 1280, "height": 800}
FRAMES = 120
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
SCROLL = """async ([where, frames]) => {
  const node = document.querySelector(where), found = [];
  let last = await new Promise(requestAnimationFrame);
  for (let i = 0; i < frames; i++) {
    node.scrollTop += 60;
    const now = await new Promise(requestAnimationFrame);
    found.push(now - last);
    last = now;
  }
  return found;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--json", type=Path)
    own = parser.parse_args()
    data = gather.page_data([view.source(own.run)], own.rows)
    text = page.render(data)
    found: Figures = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    found |= {"size": size(data["runs"][0], len(text.encode())), "speed": speed(text)}
    found["traces"] = trace_cost(Path(own.run))
    for name in ("size", "speed", "traces"):
        print(markdown([name, ""], [[key, f"{value:,}"] for key, value in found[name].items()]), "\n")
    if own.json:
        own.json.write_text(json.dumps(found, indent=1) + "\n")


def size(run: Figures, total: int) -> Figures:
    """Bytes of the page's parts; `traced` counts tokens with λ and both KLs."""
    rollouts = run["rollouts"]
    columns = {name: len(column["data"]) for name, column in rollouts["columns"].items()}
    rest = len(json.dumps({name: part for name, part in run.items() if name != "rollouts"}))
    return {
        "rollouts": rollouts["shown"],
        "held-out texts": rollouts["heldout"],
        "tokens": rollouts["tokens"],
        "page, bytes": total,
        "rows, prompts, vocabulary": len(rollouts["packed"]),
        **columns,
        "figures of the run": rest,
        "bytes a token": round(total / max(1, rollouts["tokens"]), 1),
    }


@contextmanager
def chromium(text: str) -> Iterator[tuple[Any, str]]:
    """A headless browser, and the address of a file with the page `text`."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("no Chromium on this machine; install it (Debian: apt install chromium).")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        path.write_text(text)
        browser = playwright.chromium.launch(executable_path=program)
        yield browser, path.as_uri()
        browser.close()


def speed(text: str) -> Figures:
    """Milliseconds to the first paint and to a rollout's tokens, and between frames while scrolling."""
    with chromium(text) as (browser, address):
        paints, tokens = [], []
        for _ in range(5):  # the first is cold
            opened = browser.new_context(viewport=WINDOW).new_page()
            opened.goto(address, wait_until="load")
            paints.append(opened.evaluate(PAINT) or opened.evaluate("performance.now()"))
            began = opened.evaluate("(performance.mark('go'), go({view: 'rollouts'}), performance.now())")
            opened.wait_for_selector("#tokens .token")
            tokens.append(opened.evaluate("performance.now()") - began)
        frames = {name: opened.evaluate(SCROLL, [where, FRAMES]) for name, where in SCROLLED.items()}
    return {
        "first paint, ms": round(statistics.median(paints)),
        "first paint of a cold browser, ms": round(paints[0]),
        "to a rollout's tokens, ms": round(statistics.median(tokens)),
        **{f"frames a second, {name}": _rate(found) for name, found in frames.items()},
        **{f"longest frame, {name}, ms": round(max(found)) for name, found in frames.items()},
    }


SCROLLED = {"list": ".list", "text": ".detail"}


def _rate(frames: list[float]) -> float:
    return round(1e3 * len(frames) / sum(frames), 1)


def trace_cost(folder: Path) -> Figures:
    """Seconds a token in traced steps over those in the others, each the median, without the first step."""
    traced = {int(path.stem[5:]) for path in traces.paths(folder)}
    steps = [r for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "step" and r["step"] > 1]
    rates: dict[bool, list[float]] = {True: [], False: []}
    for record in steps:
        if record.get("seconds") and record.get("tokens"):
            rates[record["step"] in traced].append(record["seconds"] / record["tokens"])
    counts = {"traced steps": len(rates[True]), "other steps": len(rates[False])}
    if not all(rates.values()):
        return counts
    ratio = statistics.median(rates[True]) / statistics.median(rates[False])
    newest = traces.paths(folder)[-1]
    with tempfile.TemporaryDirectory() as other:
        found, began = traces.read(newest), time.perf_counter()
        traces.write(Path(other) / newest.name, found)
    return counts | {
        "time of a traced step, × another": round(ratio, 3),
        "writing its file after it, ms": round(1e3 * (time.perf_counter() - began), 1),
        "its file, bytes": newest.stat().st_size,
    }


if __name__ == "__main__":
    main()
