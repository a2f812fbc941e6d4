"""The check at each refresh that what generates is what trains, on a fixed probe batch, and that it has moved.

Rounding is measured, not assumed: the same student in fp32 (`in_fp32`) tells how far training and generation are from what
both of them round. Rounding has no direction. Another policy has one: towards the student without its adapter, towards that
of the refresh before, or along the adapter's part of a layer's output. So a gap beyond rounding is a warning, and a
direction is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel

import cache
from dualkl.divergences import gather_logprobs
from stages.data.alignment import align, at_scored
from stages.engine.protocol import Engine, forced_logprobs
from stages.models.reference import in_fp32
from stages.models.student import Student
from stages.models.witness import Seen, Witness
from stages.runtime.errors import UserError
from stages.runtime.files import replace_text
from stages.runtime.run import Run

ROWS, TOKENS = 32, 128
"""Of the probe batch: rows, and of each completion its first tokens."""
OTHERS = {
    "without_adapter": "the student without its adapter",
    "refresh_before": "that of the refresh before",
}
FORWARD_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Of a forward in fp32, with padding."""
SIGNIFICANT, SIGNIFICANT_LAYER = 6.0, 8.0
"""Standard errors from which on a direction is one, of all together and of one layer among hundreds."""
FEW = 20  # tokens: of so few a direction must be twice as clear
LEAST_SHARE = {torch.bfloat16: 0.03, torch.float32: 0.003}
"""Of the way to another policy: what rounding may look like."""
LEAST_LAYER_SHARE = 0.3
CLEAR = 8.0
"""Contrast from which on a forward that rounds the frozen product before it adds an update follows the update."""
FP32_ROUNDING = 1e-4  # nats: sums in another order
MORE = 1.5  # than training's forward a healthy generator may round: merged weights are rounded, too
SAME = 1e-7  # nats: no direction
UNSEEN = 1e-5  # nats: what a layer's output may be off by without a word, where no logprob shows it
BOUND, BROKEN = 3.0, 30.0
"""In units of what rounding moves training's logprobs by: a gap beyond the first is told, beyond the second refused."""
LAYER_BOUND = 8.0
"""Of a layer's output, in units of its own rounding."""


@dataclass(frozen=True)
class Share:
    """How far logprobs are on the way from the student's to another policy's.

    `value`: 0 not at all, 1 they are that policy's; its standard `error`. `contrast`: how far the other policy is away,
    root mean square, in units of what remains of the distance to the student.
    """

    of: str
    value: float
    error: float
    contrast: float


class Row(NamedTuple):
    """One of the probe's: token ids."""

    row_id: str
    prompt_ids: np.ndarray
    completion_ids: np.ndarray


def check_generator(run: Run, student: Student, engine: Engine, refresh_index: int) -> dict[str, float]:
    """Figures of the probe for the refresh record; `UserError` where what generates is not the student that is trained.

    An adapter that never reaches the generator looks like staleness, with a finite loss; here it is an error.
    """
    rows, history = _probe_batch(run)
    if not rows:
        return {}
    exact = exact_logprobs(student, rows)
    others = {}
    if isinstance(student.model, PeftModel):
        with student.model.disable_adapter():
            others["without_adapter"] = exact_logprobs(student, rows)
    before = np.asarray(history.get(str(refresh_index - 1), []), dtype=np.float32)
    if before.shape == exact.shape:
        others["refresh_before"] = before
    trainer = trainer_logprobs(student, rows)
    witness = Witness(student.base.get_decoder(), student.compute_dtype)
    with witness.watching():
        generator = generator_logprobs(student, engine, rows)

    lengths = [len(row.completion_ids) for row in rows]
    least = LEAST_SHARE[student.compute_dtype]
    lags = [
        found
        for of, other in others.items()
        if (found := share_of(of, trainer, exact, other, trainer, lengths))
    ]
    shares = [
        found
        for of, other in others.items()
        if (found := share_of(of, generator, exact, other, trainer, lengths))
    ]
    gap, rounding = _distance(trainer, generator), max(_distance(trainer, exact), FP32_ROUNDING)
    figures = {
        "probe_gap": gap,
        "probe_bound": BOUND * rounding,
        "probe_tokens": len(exact),
        "probe_trainer_rounding": rounding,
        "probe_generator_rounding": _distance(generator, exact),
        **{f"probe_{share.of}": share.value for share in shares},
        **{f"probe_{share.of}_error": share.error for share in shares},
    }
    reasons = [*_of_logprobs(shares, lags, least, len(exact)), *_of_layers(witness.seen(), least, gap)]
    if gap > BROKEN * rounding:
        reasons.append(f"that is more than {BROKEN:.0f} times what rounding moves training's own logprobs by")
    if reasons:
        raise UserError(
            f"what generates is not the student that is trained: at refresh {refresh_index} they differ by {gap:.2g} nats a"
            f" token on the probe batch of {len(exact)} tokens (rounding explains {BOUND * rounding:.2g}), and {reasons[0]}."
            " The rollouts would not be the student's; nothing is trained on them. Please report this."
        )
    if gap > figures["probe_bound"]:
        run.metrics.say(
            f"warning: generator and trainer differ by {gap:.2g} nats a token on the probe batch of refresh {refresh_index},"
            f" more than {BOUND:.0f} times what rounding moves training's own logprobs by ({rounding:.2g}). The difference has"
            " no direction, so it is the same policy, rounded more; dtype fp32 would be exact."
        )
    return figures | {"probe_moved": _moved(run, exact, before, refresh_index, rows)}


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean |difference|, nats a token."""
    return float(np.abs(one - other).mean())


def share_of(
    of: str,
    logprobs: np.ndarray,
    exact: np.ndarray,
    other: np.ndarray,
    rounded: np.ndarray,
    lengths: list[int],
) -> Share | None:
    """How far `logprobs` are on the way from `exact` to `other`; None where these are the same. All [N], rows in turn.

    A slope over the tokens, without the hundredth that is furthest away: unlikely tokens, which are rounded most. Its error
    is that of logprobs that are rounded as `rounded` are, `MORE` than these, with tokens or rows (`lengths`) as samples.
    """
    way, moved, noise = (np.float64(each) - exact for each in (other, logprobs, rounded))
    way, moved, noise = way - way.mean(), moved - moved.mean(), noise - noise.mean()
    most = 3 * np.abs(way).mean()
    if most < SAME:
        return None
    weight = np.clip(way, -most, most)
    weight[np.argsort(-np.abs(way))[: max(1, len(way) // 100)]] = 0
    total = float(weight @ way)
    if total < SAME**2:
        return None
    value = float(weight @ moved) / total
    typical = np.sqrt(np.square(noise).mean()) + FP32_ROUNDING
    by_row = np.add.reduceat(weight * noise, np.cumsum([0, *lengths[:-1]]))
    errors = (np.linalg.norm(weight * np.maximum(np.abs(noise), typical)), np.linalg.norm(by_row))
    contrast = np.abs(way).mean() / max(np.abs(moved - value * way).mean(), SAME)
    return Share(of, value, MORE * float(max(errors)) / total, float(contrast))


def _of_logprobs(shares: list[Share], lags: list[Share], least: float, num_tokens: int) -> Iterator[str]:
    """Why the logprobs are another policy's. `lags`: the same of training's forward.

    Some adapters' forwards round the frozen product before they add to it, and follow small updates in part only. That is
    no other policy; what is judged of the generator is how far it lies beyond.
    """
    significant = SIGNIFICANT * (1 + FEW / num_tokens)
    for share, lag in zip(shares, lags, strict=True):
        if abs(lag.value) > 0.5 and lag.contrast > CLEAR:
            yield f"training's own forward is {lag.value:.0%} of the way to {OTHERS[lag.of]}"
        follows = lag.value if abs(lag.value) > significant * lag.error else 0.0
        beyond = max(share.value - max(0.0, follows), min(0.0, follows) - share.value)
        if beyond > max(least, significant * share.error):
            yield (
                f"the generator is {share.value:.1%} (standard error {share.error:.1%}) of the way from the student to"
                f" {OTHERS[share.of]}, where rounding has no direction"
            )


def _of_layers(layers: list[Seen], least: float, gap: float) -> Iterator[str]:
    """Why layers that were seen while the generator ran are not the student's; `gap`: of the logprobs, nats a token."""
    adapted = [layer for layer in layers if layer.error]
    if adapted:
        weights = np.array([layer.error**-2 for layer in adapted])
        share = float((weights * [layer.share for layer in adapted]).sum() / weights.sum())
        if abs(share) > max(least, SIGNIFICANT / math.sqrt(weights.sum())):
            yield f"its layers add {1 + share:.1%} of the adapter's part"
    for layer in adapted:
        if abs(layer.share) > max(LEAST_LAYER_SHARE, SIGNIFICANT_LAYER * layer.error):
            yield f"layer {layer.name} adds {1 + layer.share:.0%} of its adapter's part"
    for layer in layers:
        if layer.rounding > LAYER_BOUND and gap > UNSEEN:
            yield f"the output of layer {layer.name} differs by {layer.rounding:.0f} times its own rounding"


def _probe_batch(run: Run) -> tuple[list[Row], dict[str, list[float]]]:
    """The rows of the run's first probe, and its logprobs at earlier refreshes by their index.

    Where they cannot be read any more, or rows of it are gone from the cache, another batch begins.
    """
    snapshot, path = cache.open(run.config.cache_root), run.folder / "probe.json"
    kept = _read(path)
    places: Sequence[int] = range(len(snapshot))[:ROWS]
    if kept and set(kept[0]) <= set(snapshot.row_ids):
        places = [snapshot.position(row_id) for row_id in kept[0]]
    elif path.exists():
        run.metrics.say(
            "the probe takes other rows: those that it had are gone from the cache, or probe.json is damaged"
        )
        kept = None
    rows = [
        Row(r.row_id, r.prompt_ids, r.completion_ids[:TOKENS]) for r in (snapshot[place] for place in places)
    ]
    return rows, kept[1] if kept else {}


def _read(path: Path) -> tuple[list[str], dict[str, list[float]]] | None:
    """Row ids and logprobs by refresh of a probe.json; None where there is none that is whole."""
    try:
        kept = json.loads(path.read_bytes()) if path.exists() else {}
        row_ids, logprobs = list(kept["row_ids"]), dict(kept["logprobs"])
        for values in logprobs.values():
            np.asarray(values, dtype=np.float32)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return (row_ids, logprobs) if row_ids and all(isinstance(row_id, str) for row_id in row_ids) else None


def _moved(run: Run, exact: np.ndarray, before: np.ndarray, refresh_index: int, rows: list[Row]) -> float:
    """Mean |change| of the student's probe logprobs since the refresh before; no change is an error."""
    moved = _distance(exact, before) if before.shape == exact.shape else 0.0
    if before.shape == exact.shape and moved == 0.0:
        raise UserError(
            f"the student's logprobs on the probe batch did not change between refresh {refresh_index - 1} and"
            f" {refresh_index}: training does not reach the weights that generate. Is lr 0, or the adapter inactive?"
        )
    run.world.barrier()
    if run.world.is_main:
        kept = {str(refresh_index): exact.tolist()}
        if before.size:
            kept[str(refresh_index - 1)] = before.tolist()
        text = json.dumps({"row_ids": [row.row_id for row in rows], "logprobs": kept})
        replace_text(run.folder / "probe.json", text)
    run.world.barrier()
    return moved


@torch.no_grad()
def trainer_logprobs(student: Student, rows: Sequence[Row], packed: bool | None = None) -> np.ndarray:
    """The student's logprobs [N] of the rows' completions, by training's forward without gradients."""
    was_training = student.model.training
    student.model.eval()
    aligned = align(
        [row.prompt_ids for row in rows],
        [row.completion_ids for row in rows],
        student.tokenizer.pad_token_id,
        student.device,
        packed=student.packs if packed is None else packed,
    )
    hidden_Nd = at_scored(student.hidden(aligned), aligned)
    student.model.train(was_training)
    return (
        gather_logprobs(hidden_Nd, student.head, aligned.targets, vocab_size=student.vocab_size).cpu().numpy()
    )


def exact_logprobs(student: Student, rows: Sequence[Row]) -> np.ndarray:
    """The same in fp32, of the weights as training reads them. Takes the memory of one layer in fp32."""
    in_full = replace(student, compute_dtype=torch.float32)
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    size = max(1, FORWARD_TOKENS[student.device.type] // longest)
    with in_fp32(student.base, student.compute_dtype):
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return np.concatenate([trainer_logprobs(in_full, part, packed=False) for part in parts])


def generator_logprobs(student: Student, engine: Engine, rows: Sequence[Row]) -> np.ndarray:
    """The engine's logprobs [N] of the same completions at temperature 1. Frees the engine's memory."""
    with closing(engine), student.autocast():
        found = forced_logprobs(
            engine,
            [row.prompt_ids for row in rows],
            [row.completion_ids for row in rows],
            vocab_size=student.vocab_size,
            pad_id=student.tokenizer.pad_token_id,
        )
    return np.concatenate(found)
