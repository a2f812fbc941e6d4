"""What a smaller signal would cost in accuracy: bytes a token against errors of KL, gate and gradient of the real loss.

    python -m stages.fidelity runs/exact/cache --student_model ... (any key of the configuration)

Reads a `hidden` or `full` cache, which holds the teacher's whole distribution, packs its rows as top-k and nucleus signals of
several sizes as stage one would, and puts the student through the configured loss with each. Writes fidelity.json and
fidelity.png below the run's folder. The student is the run's newest checkpoint, else student_model itself.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository's root is importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cache
from cache import codec
from dualkl import DualKLConfig, DualKLOutput, HiddenTeacher, LogitsTeacher, dual_kl
from dualkl.targets import Compressed, compress, compress_logits
from stages.data.alignment import at_scored
from stages.data.batches import AnyTeacher, MicroBatch, dual_kl_head, micro_batches, teacher_of, to_tensors
from stages.loops import setup
from stages.loops.collect import to_numpy
from stages.loops.fit import loss_config
from stages.models.student import Student
from stages.runtime.errors import UserError, command
from stages.runtime.files import replace_text
from stages.runtime.run import Run, open_run

MAX_TOKENS = 16_384
ROWS_PER_FORWARD = 8
SIZES = (4, 8, 16, 32, 64, 128, 256)
MASSES = (0.9, 0.95, 0.99, 0.999)
MOST_OF_NUCLEUS = 64


@dataclass
class Setting:
    """A signal that might be stored, and the sums of its errors over tokens."""

    k: int
    p: float
    floor: int = 1
    num_bytes: int = 0
    num_kept: int = 0
    errors: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # |ΔR|, |ΔF|, |Δλ|
    gradient: float = 0.0  # Σ ‖Δ‖²

    @property
    def name(self) -> str:
        return f"top-{self.k}" if self.p == 1 else f"nucleus {self.p:g}, {self.floor} to {self.k}"


def main() -> None:
    root, arguments = split_root(sys.argv[1:])
    run = open_run(__doc__ or "", [*arguments, "--cache_dir", root] if root else arguments)
    if run.world.size > 1:
        raise UserError("stages.fidelity runs in one process; start it without torchrun.")
    snapshot = cache.open(run.config.cache_root)
    kind = snapshot.fingerprint.must_match["signal"]["kind"]
    if kind not in ("hidden", "full"):
        raise UserError(
            f"{run.config.cache_root} holds {kind} rows; only a cache of signal hidden or full has the whole distribution"
            " to compare with. Write one: python -m stages.rollout --signal hidden --run_name exact ..."
        )
    student, _ = setup.current_student(run, setup.cached_vocabulary(run.config))
    found = measure(run, student, snapshot)
    run.metrics.say(table(found))
    replace_text(run.folder / "fidelity.json", json.dumps(found, indent=1))
    draw(found, run.folder / "fidelity.png")
    run.metrics.say(f"picture: {run.folder / 'fidelity.png'}")


def split_root(arguments: list[str]) -> tuple[str, list[str]]:
    """The cache's folder, as the first argument or the last, and all others."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if len(arguments) % 2 and not arguments[-1].startswith("-"):
        return arguments[-1], arguments[:-1]
    return "", arguments


def measure(run: Run, student: Student, snapshot: cache.Snapshot) -> dict[str, Any]:
    """Errors of each setting against the cache's own rows, over at most `MAX_TOKENS` tokens in row-id order."""
    config = loss_config(run.config, student.vocab_size)
    sizes = sorted({min(k, student.vocab_size) for k in SIZES})
    settings = [Setting(k, 1.0) for k in sizes]
    most = min(MOST_OF_NUCLEUS, student.vocab_size)
    settings += [Setting(most, p, min(run.config.teacher_signal.signal_floor, most)) for p in MASSES]
    head = dual_kl_head(snapshot.head(), run.world.device)
    tokens, exact = 0, {"rkl": 0.0, "fkl": 0.0, "gate": 0.0, "gradient": 0.0}
    student.model.eval()
    for records in micro_batches(list(_first_rows(snapshot)), ROWS_PER_FORWARD, None):
        batch = to_tensors(records, 1.0, head, student.tokenizer.pad_token_id, run.world.device, student.vocab_size)
        with torch.no_grad():
            states = at_scored(student.hidden(batch.aligned.input_ids, batch.aligned.attention_mask), batch.aligned)
        wanted, gradient = _loss(student, states, batch, batch.teacher, config)
        for name in ("rkl", "fkl", "gate"):
            exact[name] += float(getattr(wanted, name).double().sum())
        exact["gradient"] += float(gradient.double().square().sum())
        tokens += len(states)
        for setting in settings:
            teacher = _stored(setting, records, batch, run.world.device, student.vocab_size)
            out, other = _loss(student, states, batch, teacher, config)
            deltas = [(getattr(out, name) - getattr(wanted, name)).abs() for name in ("rkl", "fkl", "gate")]
            setting.errors += torch.stack([delta.double().sum() for delta in deltas]).cpu()
            setting.gradient += float((other - gradient).double().square().sum())
    return {
        "cache": str(snapshot.root), "tokens": tokens, "vocab_size": student.vocab_size,
        "exact": {name: exact[name] / tokens for name in ("rkl", "fkl", "gate")},
        "signals": [_result(setting, tokens, exact["gradient"]) for setting in settings],
    }  # fmt: skip


def _first_rows(snapshot: cache.Snapshot) -> Iterator[cache.Record]:
    tokens = 0
    for index in range(len(snapshot)):
        record = snapshot[index]
        tokens += len(record.completion_ids)
        if tokens > MAX_TOKENS and index:
            return
        yield record
    if not tokens:
        raise UserError(
            f"{snapshot.root} holds no rows; run `python -m stages.rollout` with the same configuration first."
        )


def _loss(
    student: Student, states: Tensor, batch: MicroBatch, teacher: AnyTeacher, config: DualKLConfig
) -> tuple[DualKLOutput, Tensor]:
    """The loss, and its gradient [N, d] by the student's hidden states."""
    hidden_Nd = states.detach().clone().requires_grad_()
    out = dual_kl(hidden_Nd, student.head, teacher, config, batch.sampled, batch.weights)
    (gradient_Nd,) = torch.autograd.grad(out.loss, hidden_Nd)
    return out, gradient_Nd


def _stored(
    setting: Setting, records: list[cache.Record], batch: MicroBatch, device: torch.device, vocab_size: int
) -> AnyTeacher:
    """The teacher that stage two would read back from rows packed as `setting` says; counts their bytes."""
    kept = _compress(batch.teacher, batch.aligned.targets, setting, vocab_size)
    ids, logprobs, tail = (to_numpy(part) for part in (kept.ids, kept.logprobs, kept.log_tail_mass))
    edges = np.cumsum([0, *(len(record.completion_ids) for record in records)])
    read = []
    for start, end, record in zip(edges[:-1], edges[1:], records, strict=True):
        packed = codec.encode(cache.TopK(ids[start:end], logprobs[start:end], tail[start:end]))
        setting.num_bytes += len(packed)
        setting.num_kept += int((ids[start:end] >= 0).sum())
        read.append(cache.Record(**{**record.__dict__, "signal": codec.decode(packed)}))
    return teacher_of(read, None, device, vocab_size)


def _compress(teacher: AnyTeacher, targets: Tensor, setting: Setting, vocab_size: int) -> Compressed:
    if isinstance(teacher, HiddenTeacher):
        return compress(
            teacher.hidden,
            teacher.lm_head,
            targets,
            k=setting.k,
            p=setting.p,
            floor=setting.floor,
            vocab_size=vocab_size,
        )
    assert isinstance(teacher, LogitsTeacher)
    return compress_logits(teacher.logits[:, :vocab_size], targets, k=setting.k, p=setting.p, floor=setting.floor)


def _result(setting: Setting, tokens: int, squared_gradient: float) -> dict[str, Any]:
    rkl, fkl, gate = (setting.errors / tokens).tolist()
    return {
        "signal": setting.name, "k": setting.k, "p": setting.p, "kept_ids": setting.num_kept / tokens,
        "bytes_per_token": setting.num_bytes / tokens, "reverse_kl_error": rkl, "forward_kl_error": fkl,
        "gate_error": gate, "gradient_error": (setting.gradient / squared_gradient) ** 0.5 if squared_gradient else 0.0,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    exact = found["exact"]
    lines = [
        f"{found['tokens']:,} tokens of {found['cache']}, vocabulary {found['vocab_size']:,}; exact means: reverse KL"
        f" {exact['rkl']:.4f}, forward KL {exact['fkl']:.4f} nats, λ {exact['gate']:.3f}",
        "errors are means of |stored − exact| over tokens; gradient: ‖Δ‖ / ‖exact‖ by the student's hidden states",
        "",
        f"{'signal':<28}{'kept ids':>9}{'bytes/token':>13}{'reverse KL':>12}{'forward KL':>12}{'λ':>10}{'gradient':>11}",
    ]
    lines += [
        f"{row['signal']:<28}{row['kept_ids']:>9.1f}{row['bytes_per_token']:>13.1f}{row['reverse_kl_error']:>12.1e}"
        f"{row['forward_kl_error']:>12.1e}{row['gate_error']:>10.1e}{100 * row['gradient_error']:>10.2f}%"
        for row in found["signals"]
    ]
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Gradient error against bytes a token, one line for top-k and one for nucleus."""
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
        for row, *place in zip(rows, x, y, strict=True):
            text = str(row["k"]) if row["p"] == 1 else f"{row['p']:g}"
            axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="signal, bytes a token", ylabel="error of the gradient, %")
    axes.set_title("What a stored signal costs, and what it changes", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    command(main)
