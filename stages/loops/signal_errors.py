"""Errors that smaller signals cause: the loss on packed rows against that on the whole distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cache
from cache import codec
from dualkl import DualKLConfig, DualKLOutput, HiddenTeacher, LogitsTeacher, dual_kl
from dualkl.compress import Compressed, compress, compress_logits
from stages.data.alignment import at_scored
from stages.data.batches import MicroBatch, micro_batches, num_tokens, on_device, to_tensors
from stages.data.signals import NUCLEUS_FLOOR, AnyTeacher, dual_kl_head, teacher_of
from stages.loops.writing import to_numpy
from stages.models.student import Student
from stages.runtime.errors import UserError
from stages.runtime.run import Run

MAX_TOKENS = 16_384
ROWS_PER_FORWARD = 8
SIZES = (4, 8, 16, 32, 64, 128, 256)
MASSES = (0.9, 0.95, 0.99, 0.999)
MOST_OF_NUCLEUS = 64


@dataclass
class Setting:
    """A candidate signal, and its errors summed over tokens."""

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


def signal_errors(run: Run, student: Student, snapshot: cache.Snapshot) -> dict[str, Any]:
    """Errors of each setting relative to the cache's rows, on at most `MAX_TOKENS` tokens in row-id order."""
    config = run.config.loss.settings(student.vocab_size)
    sizes = sorted({min(k, student.vocab_size) for k in SIZES})
    settings = [Setting(k, 1.0) for k in sizes]
    most = min(MOST_OF_NUCLEUS, student.vocab_size)
    settings += [Setting(most, p, min(NUCLEUS_FLOOR, most)) for p in MASSES]
    head = dual_kl_head(snapshot.head(), run.world.device)
    tokens, exact = 0, {"rkl": 0.0, "fkl": 0.0, "gate": 0.0, "gradient": 0.0}
    student.model.eval()
    for records in micro_batches(_first_rows(snapshot), num_tokens, ROWS_PER_FORWARD, None):
        batch = to_tensors(
            records, 1.0, head, student.tokenizer.pad_token_id, run.world.device, student.vocab_size
        )
        with torch.no_grad():
            states = at_scored(student.hidden(batch.aligned), batch.aligned)
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
        "cache": snapshot.root,
        "tokens": tokens,
        "vocab_size": student.vocab_size,
        "exact": {name: exact[name] / tokens for name in ("rkl", "fkl", "gate")},
        "signals": [_result(setting, tokens, exact["gradient"]) for setting in settings],
    }


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
            f"{snapshot.root} holds no rows; run `dualkl rollout` with the same configuration first."
        )


def _loss(
    student: Student, states: Tensor, batch: MicroBatch, teacher: AnyTeacher, config: DualKLConfig
) -> tuple[DualKLOutput, Tensor]:
    """The loss, and its gradient [N, d] with respect to the student's hidden states."""
    hidden_Nd = states.detach().clone().requires_grad_()
    out = dual_kl(hidden_Nd, student.head, teacher, config, batch.sampled, batch.weights)
    (gradient_Nd,) = torch.autograd.grad(out.loss, hidden_Nd)
    return out, gradient_Nd


def _stored(
    setting: Setting, records: list[cache.Record], batch: MicroBatch, device: torch.device, vocab_size: int
) -> AnyTeacher:
    """The teacher that stage two would read from rows packed with `setting`. Counts their bytes."""
    kept = _compress(batch.teacher, batch.aligned.targets, setting, vocab_size)
    ids, logprobs, tail = (to_numpy(part) for part in (kept.ids, kept.logprobs, kept.log_tail_mass))
    edges = np.cumsum([0, *(len(record.completion_ids) for record in records)])
    read = []
    for start, end, record in zip(edges[:-1], edges[1:], records, strict=True):
        packed = codec.encode(cache.TopK(ids[start:end], logprobs[start:end], tail[start:end]))
        setting.num_bytes += len(packed)
        setting.num_kept += int((ids[start:end] >= 0).sum())
        read.append(cache.Record(**{**record.__dict__, "signal": codec.decode(packed)}))
    return on_device(teacher_of(read, None, vocab_size), device)


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
    return compress_logits(
        teacher.logits[:, :vocab_size], targets, k=setting.k, p=setting.p, floor=setting.floor
    )


def _result(setting: Setting, tokens: int, squared_gradient: float) -> dict[str, Any]:
    rkl, fkl, gate = (setting.errors / tokens).tolist()
    return {
        "signal": setting.name,
        "k": setting.k,
        "p": setting.p,
        "kept_ids": setting.num_kept / tokens,
        "bytes_per_token": setting.num_bytes / tokens,
        "reverse_kl_error": rkl,
        "forward_kl_error": fkl,
        "gate_error": gate,
        "gradient_error": (setting.gradient / squared_gradient) ** 0.5 if squared_gradient else 0.0,
    }
