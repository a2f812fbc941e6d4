"""How far the student has moved from the policy that wrote the rows, from log-probabilities that a step has anyway.

Per scored token, with behaviour policy μ and student p: ln μ(y) - ln p(y). Its mean over tokens drawn from μ estimates
KL(μ || p), nats a token. The weights w = p(y) / μ(y) would correct for the difference; (Σ w)² / (n Σ w²) is the effective
share of the n samples, 1 without drift.
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
    """Per row Σ (ln μ - ln p), Σ w and Σ w² over its scored tokens, [rows, 3] in float64; tokens lie row after row."""
    rows = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    if student_logprobs.is_cuda:  # queued: the host does not wait for the device
        rows = rows.pin_memory().to(student_logprobs.device, non_blocking=True)
    ratio_N = student_logprobs.double() - behaviour_logprobs.double()
    terms_N3 = torch.stack([-ratio_N, ratio_N.exp(), (2 * ratio_N).exp()], dim=1)
    return torch.zeros(len(lengths), NUM_SUMS, dtype=torch.float64, device=ratio_N.device).index_add(
        0, rows, terms_N3
    )


@dataclass(frozen=True)
class Drift:
    """Of the rows of one optimizer step.

    Attributes:
        drift: mean ln μ - ln p over all tokens, nats per token.
        ess: effective share of the tokens, weighted one by one.
        ess_rows: effective share of the rows, weighted as wholes (the product of a row's token weights).
        own: drift over the rows of this run, which a refresh would replace; None if the step had none.
    """

    drift: float
    ess: float
    ess_rows: float
    own: float | None


def drift_of(sums: np.ndarray, lengths: Sequence[int], is_own: Sequence[bool]) -> Drift:
    """What the sums [rows, 3] of `row_sums`, of all ranks, say; `is_own`: of each row, whether this run wrote it."""
    tokens = np.asarray(lengths, dtype=np.float64)
    own = np.asarray(is_own, dtype=bool)
    with np.errstate(over="ignore"):  # an infinite weight leaves an effective share of 0
        weights = np.exp(-sums[:, 0])
    total, first, second = sums.sum(axis=0).tolist()
    return Drift(
        total / float(tokens.sum()),
        _share(first, second, float(tokens.sum())),
        _share(float(weights.sum()), float(weights @ weights), len(weights)),
        float(sums[own, 0].sum() / tokens[own].sum()) if own.any() else None,
    )


def _share(first: float, second: float, count: float) -> float:
    """(Σ w)² / (n Σ w²); 0 where every weight is 0, or one too large for a float."""
    return first * first / (count * second) if second and math.isfinite(second) else 0.0
