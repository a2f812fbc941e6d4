"""In-place conversion of logits to logprobs; impossible tokens never cause NaN.

Shape suffixes: N positions, V vocabulary.
"""

import math

import torch
from torch import Tensor

LEAST_LOGPROB = -1e30
"""Finite substitute for ln 0: 0 · ln 0 is 0, and two impossible tokens have a log-ratio of 0, not NaN."""


def centre_(logits_NV: Tensor) -> Tensor:
    """Subtract each row's maximum, in place.

    This keeps the log-sum-exp small, so a likely token's logprob has a small relative error.
    """
    return logits_NV.sub_(logits_NV.amax(1, keepdim=True))


def log_normalise_(logits_NV: Tensor) -> Tensor:
    """Turn logits into logprobs in place, with ln 0 = LEAST_LOGPROB. NaN or +inf makes the whole row NaN."""
    centre_(logits_NV)
    return logits_NV.sub_(logits_NV.exp().sum(1, keepdim=True).log_()).clamp_(min=LEAST_LOGPROB)


def smooth(logprobs: Tensor, epsilon: float, share: float | Tensor) -> Tensor:
    """ln((1 - epsilon) p + epsilon share): p mixed with a uniform distribution (`share` per outcome)."""
    uniform = logprobs.new_full((), epsilon) * share
    return torch.logaddexp(logprobs + math.log1p(-epsilon), uniform.log())


def entropy(logprobs_NV: Tensor) -> Tensor:
    """-Σ_j p_j ln p_j in nats, newly allocated [N]."""
    return -logprobs_NV.exp().mul_(logprobs_NV).sum(1)
