"""Drift of the student from the policy that wrote the rows, from log-probabilities a step has anyway.

Per scored token, with behaviour policy μ and student p: ln μ(y) - ln p(y). Its mean over tokens sampled
from μ estimates KL(μ || p), nats per token. The weights w = p(y) / μ(y) would correct for the difference;
(Σ w)² / (n Σ w²) is the effective share of the n samples, 1 without drift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_SUMS = 3


def row_sums(student_logprobs: Tensor, behaviour_logprobs: Tensor, lengths: Sequence[int]) -> Tensor:
    """Σ (ln μ - ln p), Σ w and Σ w² over the scored tokens of each row: [rows, 3], float64.

    The tokens of the rows are concatenated.
    """
    rows = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    if student_logprobs.is_cuda:  # queued; no host synchronization
        rows = rows.pin_memory().to(student_logprobs.device, non_blocking=True)
    ratio_N = student_logprobs.double() - behaviour_logprobs.double()
    terms_N3 = torch.stack([-ratio_N, ratio_N.exp(), (2 * ratio_N).exp()], dim=1)
    return torch.zeros(len(lengths), NUM_SUMS, dtype=torch.float64, device=ratio_N.device).index_add(
        0, rows, terms_N3
    )


@dataclass(frozen=True)
class Drift:
    """Drift figures for the rows of one optimizer step.

    Attributes:
        drift: mean ln μ - ln p over all tokens, nats per token.
        ess: effective share of the tokens, weighted individually.
        ess_rows: effective share of the rows; a row's weight is the product of its token weights.
        own: drift over this run's rows, which a refresh would replace; None if the step had none.
    """

    drift: float
    ess: float
    ess_rows: float
    own: float | None


def drift_of(sums: np.ndarray, lengths: Sequence[int], is_own: Sequence[bool]) -> Drift:
    """Drift from the `row_sums` [rows, 3] of all ranks; `is_own`: per row, whether this run wrote it."""
    tokens = np.asarray(lengths, dtype=np.float64)
    own = np.asarray(is_own, dtype=bool)
    with np.errstate(over="ignore"):  # infinite weights give an effective share of 0
        weights = np.exp(-sums[:, 0])
    total, first, second = sums.sum(axis=0).tolist()
    return Drift(
        total / float(tokens.sum()),
        _share(first, second, float(tokens.sum())),
        _share(float(weights.sum()), float(weights @ weights), len(weights)),
        float(sums[own, 0].sum() / tokens[own].sum()) if own.any() else None,
    )


def _share(first: float, second: float, count: float) -> float:
    """(Σ w)² / (n Σ w²); 0 if all weights are 0 or one overflows."""
    return first * first / (count * second) if second and math.isfinite(second) else 0.0
