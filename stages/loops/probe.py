"""At each refresh, check that the generator runs the student in training and that the student has moved.

Rounding is measured on a fixed probe batch: the same student with fp32 weights (`upcast_weights`) shows how
far training and generation each are from the unrounded logprobs. Rounding errors are not correlated with
any other policy. A generator that runs another policy differs towards that one: the student without its
adapter, the previous refresh's student, or along the adapter's part of a layer's output. So a gap beyond
rounding is a warning, and such a correlation is an error.
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
from stages.models.dropout import evaluating
from stages.models.float32 import upcast_weights
from stages.models.student import Student
from stages.models.witness import Seen, Witness
from stages.runtime.config import Config
from stages.runtime.errors import UserError
from stages.runtime.files import replace_text
from stages.runtime.run import Run
from stages.runtime.split import rollouts_of

MOST_ROWS, LEAST_ROWS, TOKENS = 32, 8, 128
"""Size of the probe batch: rows, and tokens from the start of each completion."""
ROWS_SHARE = 4  # one row for so many rollouts of a refresh: the probe must not outlast them in a small run
OTHERS = {
    "without_adapter": "the student without its adapter",
    "refresh_before": "the previous refresh's student",
}
FORWARD_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens per fp32 forward, including padding."""
LONG = {"cpu": 4e10, "cuda": 4e13}
"""Parameters times tokens, from which on the probe takes more than a few seconds."""
SIGNIFICANT, SIGNIFICANT_LAYER = 6.0, 8.0
"""Significance bounds for a direction, in standard errors: over all tokens, and for one of many layers."""
FEW = 20  # tokens: with only this many, the significance bound doubles
LEAST_SHARE = {torch.bfloat16: 0.03, torch.float32: 0.003}
"""Smallest share of the way to another policy that cannot be rounding."""
LEAST_LAYER_SHARE = 0.3
CLEAR = 8.0
"""Contrast above which a forward that rounds the frozen product before adding an update does follow it."""
FP32_ROUNDING = 1e-4  # nats: different summation order
# Allowed rounding of a healthy generator relative to training's forward: merged weights are rounded too.
MORE = 1.5
SAME = 1e-7  # nats: too close to measure a correlation
# Nats: with a smaller gap in logprobs, errors of single layers are ignored.
UNSEEN = 1e-5
BOUND, BROKEN = 3.0, 30.0
"""Gaps that cause a warning and an error, in units of the rounding of training's logprobs."""
LAYER_BOUND = 8.0
"""Largest allowed error of a layer's output, in units of its own rounding."""


@dataclass(frozen=True)
class Share:
    """Position of logprobs on the line from the student's to another policy's.

    `value` is 0 at the student and 1 at the other policy; `error` is its standard error. `contrast` is the
    mean distance to the other policy divided by the mean residual off the line.
    """

    of: str
    value: float
    error: float
    contrast: float


class Row(NamedTuple):
    """One row of the probe, as token ids."""

    row_id: str
    prompt_ids: np.ndarray
    completion_ids: np.ndarray


def check_generator(run: Run, student: Student, engine: Engine, refresh_index: int) -> dict[str, float]:
    """Probe figures for the refresh record. Raises UserError if the generator is not the student in training.

    An adapter that never reaches the generator would otherwise look like staleness, with a finite loss.
    """
    with run.clock.phase("probe"):
        return _probe(run, student, engine, refresh_index)


def _probe(run: Run, student: Student, engine: Engine, refresh_index: int) -> dict[str, float]:
    rows, history = _probe_batch(run)
    if not rows:
        return {}
    _say_if_long(run, student, rows)
    exact = exact_logprobs(student, rows)
    before = np.asarray(history.get(str(refresh_index - 1), []), dtype=np.float32)
    others = {"refresh_before": before} if before.shape == exact.shape else {}
    if isinstance(student.model, PeftModel):
        with student.model.disable_adapter():
            others = {"without_adapter": exact_logprobs(student, rows)} | others
    trainer = trainer_logprobs(student, rows)
    witness = Witness(student.base.get_decoder(), student.compute_dtype)
    with witness.watching():
        generator = generator_logprobs(student, engine, rows)

    lengths = [len(row.completion_ids) for row in rows]
    lags, shares = (
        [s for of, other in others.items() if (s := share_of(of, one, exact, other, trainer, lengths))]
        for one in (trainer, generator)
    )
    gap, rounding = _distance(trainer, generator), max(_distance(trainer, exact), FP32_ROUNDING)
    least = LEAST_SHARE[student.compute_dtype]
    reasons = [*_of_logprobs(shares, lags, least, len(exact)), *_of_layers(witness.seen(), least, gap)]
    _judge(run, refresh_index, gap, rounding, len(exact), reasons)
    return {
        "probe_gap": gap,
        "probe_bound": BOUND * rounding,
        "probe_tokens": len(exact),
        "probe_trainer_rounding": rounding,
        "probe_generator_rounding": _distance(generator, exact),
        **{f"probe_{share.of}": share.value for share in shares},
        **{f"probe_{share.of}_error": share.error for share in shares},
        "probe_moved": _moved(run, exact, before, refresh_index, rows),
    }


def num_rows(config: Config) -> int:
    """Rows of the probe batch, if the cache has as many."""
    return min(MOST_ROWS, max(LEAST_ROWS, len(rollouts_of(config, 0)) // ROWS_SHARE))


def _say_if_long(run: Run, student: Student, rows: list[Row]) -> None:
    num_tokens = sum(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    work = sum(p.numel() for p in student.base.parameters()) * num_tokens
    if work > LONG[student.device.type]:
        run.metrics.say(
            f"comparing the engine's log-probabilities with training's on {len(rows)} rollouts,"
            f" {num_tokens:,} tokens"
        )


def _judge(
    run: Run, refresh_index: int, gap: float, rounding: float, num_tokens: int, reasons: list[str]
) -> None:
    """Raise UserError if there are reasons or `gap` is far beyond rounding; warn if it is just beyond."""
    if gap > BROKEN * rounding:
        reasons = [
            *reasons,
            f"that is more than {BROKEN:.0f} times the rounding of training's own logprobs",
        ]
    if reasons:
        raise UserError(
            f"the rollout engine does not run the student in training: at refresh {refresh_index} their"
            f" logprobs differ by {gap:.2g} nats a token on {num_tokens} tokens (rounding explains"
            f" {BOUND * rounding:.2g}), and {reasons[0]}. Its rollouts are not trained on. Please report"
            " this."
        )
    if gap > BOUND * rounding:
        run.metrics.say(
            f"warning: generator and trainer differ by {gap:.2g} nats a token on the probe batch of refresh"
            f" {refresh_index}, more than {BOUND:.0f} times the rounding of training's own logprobs"
            f" ({rounding:.2g}). The difference is not correlated with any other policy, so it is the same"
            " policy, rounded more; dtype fp32 would be exact."
        )


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean |difference|, nats per token."""
    return float(np.abs(one - other).mean())


def share_of(
    of: str,
    logprobs: np.ndarray,
    exact: np.ndarray,
    other: np.ndarray,
    rounded: np.ndarray,
    lengths: list[int],
) -> Share | None:
    """Position of `logprobs` between `exact` (0) and `other` (1); None if those are equal.

    All arrays are [N], row after row.

    The value is a slope over tokens. It excludes the 1% furthest apart: unlikely tokens, which round most.
    Its error assumes `MORE` times the rounding of `rounded`, with tokens or rows (`lengths`) as samples,
    whichever is larger.
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
    """Reasons to believe that the logprobs are another policy's. `lags` are the shares of training's forward.

    Some adapters round the frozen product before adding to it, so their forward follows small updates only
    in part. That is not another policy, so the generator is judged by its distance beyond training's forward.
    """
    significant = SIGNIFICANT * (1 + FEW / num_tokens)
    for share, lag in zip(shares, lags, strict=True):
        if abs(lag.value) > 0.5 and lag.contrast > CLEAR:
            yield f"those of training's forward are {lag.value:.0%} of the way to those of {OTHERS[lag.of]}"
        follows = lag.value if abs(lag.value) > significant * lag.error else 0.0
        beyond = max(share.value - max(0.0, follows), min(0.0, follows) - share.value)
        if beyond > max(least, significant * share.error):
            yield (
                f"the engine's are {share.value:.1%} (standard error {share.error:.1%}) of the way from the"
                f" student's to those of {OTHERS[share.of]}, while rounding errors are not"
                " correlated with any other policy"
            )


def _of_layers(layers: list[Seen], least: float, gap: float) -> Iterator[str]:
    """Evidence that the generator's layers are not the student's. `gap`: nats per token."""
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
    """Rows of the run's first probe, and its logprobs by refresh index.

    Starts a new batch if they cannot be read or rows are gone from the cache.
    """
    snapshot, path = cache.open(run.config.cache_root), run.folder / "probe.json"
    kept = _read(path)
    places: Sequence[int] = range(len(snapshot))[: num_rows(run.config)]
    if kept and set(kept[0]) <= set(snapshot.row_ids):
        places = [snapshot.position(row_id) for row_id in kept[0]]
    elif path.exists():
        run.metrics.say(
            "the probe takes new rows: its previous ones are gone from the cache, or probe.json is damaged"
        )
        kept = None
    rows = [
        Row(r.row_id, r.prompt_ids, r.completion_ids[:TOKENS]) for r in (snapshot[place] for place in places)
    ]
    return rows, kept[1] if kept else {}


def _read(path: Path) -> tuple[list[str], dict[str, list[float]]] | None:
    """Row ids and logprobs by refresh from probe.json; None if it is missing or damaged."""
    try:
        kept = json.loads(path.read_bytes()) if path.exists() else {}
        row_ids, logprobs = list(kept["row_ids"]), dict(kept["logprobs"])
        for values in logprobs.values():
            np.asarray(values, dtype=np.float32)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return (row_ids, logprobs) if row_ids and all(isinstance(row_id, str) for row_id in row_ids) else None


def _moved(run: Run, exact: np.ndarray, before: np.ndarray, refresh_index: int, rows: list[Row]) -> float:
    """Mean |change| of the student's probe logprobs since the last refresh; UserError if there is none."""
    moved = _distance(exact, before) if before.shape == exact.shape else 0.0
    if before.shape == exact.shape and moved == 0.0:
        raise UserError(
            f"the student's logprobs on the probe batch did not change between refresh {refresh_index - 1}"
            f" and {refresh_index}: training does not reach the weights that generate. Is lr 0, or the"
            " adapter inactive?"
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
    """The student's logprobs [N] of the rows' completions, from training's forward without gradients."""
    aligned = align(
        [row.prompt_ids for row in rows],
        [row.completion_ids for row in rows],
        student.tokenizer.pad_token_id,
        student.device,
        packed=student.packs if packed is None else packed,
    )
    with evaluating(student.model):
        hidden_Nd = at_scored(student.hidden(aligned), aligned)
    return (
        gather_logprobs(hidden_Nd, student.head, aligned.targets, vocab_size=student.vocab_size).cpu().numpy()
    )


def exact_logprobs(student: Student, rows: Sequence[Row]) -> np.ndarray:
    """The same in fp32, with the weights as training reads them. Needs memory for one layer in fp32."""
    in_full = replace(student, compute_dtype=torch.float32)
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    size = max(1, FORWARD_TOKENS[student.device.type] // longest)
    with upcast_weights(student.base, student.compute_dtype):
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return np.concatenate([trainer_logprobs(in_full, part, packed=False) for part in parts])


def generator_logprobs(student: Student, engine: Engine, rows: Sequence[Row]) -> np.ndarray:
    """The engine's logprobs [N] of the same completions at temperature 1. Frees the engine's memory."""
    with closing(engine), student.autocast():
        found = forced_logprobs(
            engine,
            [row.prompt_ids for row in rows],
            [row.completion_ids for row in rows],
            student.vocab_size,
        )
    return np.concatenate(found)
