"""Measure what smaller signals cost: bytes a token against errors.

    dualkl fidelity runs/exact/cache FILE

Reads a cache of signal hidden or full, which holds the teacher's whole
distribution, packs its rows as top-k and nucleus signals of several sizes, and
evaluates the configured loss with each: errors of KL, gate and gradient. Writes
fidelity.json and fidelity.png to the run's folder. The student is the run's
newest checkpoint, else student_model itself.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "fidelity")

import json
import sys
from pathlib import Path
from typing import Any

import cache
from stages.loops import setup
from stages.loops.signal_errors import signal_errors
from stages.runtime.errors import UserError, command
from stages.runtime.files import replace_text
from stages.runtime.options import split_root
from stages.runtime.run import open_run


def main() -> None:
    root, arguments = split_root(sys.argv[1:])
    run = open_run(__doc__ or "", [*arguments, "--cache_dir", root] if root else arguments, read_only=True)
    if run.world.size > 1:
        raise UserError("dualkl fidelity runs in one process; start it without torchrun.")
    snapshot = cache.open(run.config.cache_root)
    kind = snapshot.fingerprint.must_match["signal"]["kind"]
    if kind not in ("hidden", "full"):
        raise UserError(
            f"{run.config.cache_root} holds {kind} rows; only a cache of signal hidden or full has the whole"
            " distribution to compare with. Write one: dualkl rollout --signal hidden --run_name"
            " exact ..."
        )
    student, _ = setup.current_student(run, setup.cached_vocabulary(run.config))
    found = signal_errors(run, student, snapshot)
    run.folder.mkdir(parents=True, exist_ok=True)
    replace_text(run.folder / "fidelity.json", json.dumps(found, indent=1))
    draw(found, run.folder / "fidelity.png")
    run.metrics.conclude(f"{table(found)}\npicture: {run.folder / 'fidelity.png'}", found)


def table(found: dict[str, Any]) -> str:
    exact = found["exact"]
    lines = [
        f"{found['tokens']:,} tokens of {found['cache']}, vocabulary {found['vocab_size']:,}; exact means:"
        f" reverse KL {exact['rkl']:.4f}, forward KL {exact['fkl']:.4f} nats, λ {exact['gate']:.3f}",
        "errors are means of |stored − exact| over tokens; gradient: ‖Δ‖ / ‖exact‖ by the student's hidden"
        " states",
        "",
        f"{'signal':<28}{'kept ids':>9}{'bytes/token':>13}{'reverse KL':>12}{'forward KL':>12}{'λ':>10}"
        f"{'gradient':>11}",
    ]
    lines += [
        f"{row['signal']:<28}{row['kept_ids']:>9.1f}{row['bytes_per_token']:>13.1f}"
        f"{row['reverse_kl_error']:>12.1e}{row['forward_kl_error']:>12.1e}{row['gate_error']:>10.1e}"
        f"{100 * row['gradient_error']:>10.2f}%"
        for row in found["signals"]
    ]
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Plot gradient error against bytes per token, one line for top-k and one for nucleus."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, colour, rows in (
        ("top-k", "#0072B2", [row for row in found["signals"] if row["p"] == 1]),
        ("nucleus", "#D55E00", [row for row in found["signals"] if row["p"] < 1]),
    ):
        x, y = [row["bytes_per_token"] for row in rows], [100 * row["gradient_error"] for row in rows]
        axes.plot(x, y, "o-", color=colour, label=label)
        for row, size, error in zip(rows, x, y, strict=True):
            text = str(row["k"]) if row["p"] == 1 else f"{row['p']:g}"
            axes.annotate(
                text, (size, error), xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour
            )
    axes.set(xscale="log", yscale="log", xlabel="signal, bytes a token", ylabel="error of the gradient, %")
    axes.set_title("What a stored signal costs, and what it changes", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    command(main)
