"""Logits to logprobs, in place and without NaN where a token is impossible.

Shape suffixes: N positions, V vocabulary.
"""

import math

import torch
from torch import Tensor

LEAST_LOGPROB = -1e30
"""Stands for ln 0. Finite, so that 0 · ln 0 is 0 and two impossible tokens have a log-ratio of 0, not NaN."""


def centre_(logits_NV: Tensor) -> Tensor:
    """Take each row's maximum off it, in place.

    The log-sum-exp is then small, and the error of a likely token's logprob relative to it, not to the logit.
    """
    return logits_NV.sub_(logits_NV.amax(1, keepdim=True))


def log_normalise_(logits_NV: Tensor) -> Tensor:
    """Turn logits into logprobs in place, with ln 0 = LEAST_LOGPROB. NaN and +inf give NaN for their whole row."""
    centre_(logits_NV)
    return logits_NV.sub_(logits_NV.exp().sum(1, keepdim=True).log_()).clamp_(min=LEAST_LOGPROB)


def smooth(logprobs: Tensor, epsilon: float, share: float | Tensor) -> Tensor:
    """ln((1 - epsilon) p + epsilon share): mixed with a uniform distribution that gives each outcome its `share`."""
    uniform = logprobs.new_full((), epsilon) * share
    return torch.logaddexp(logprobs + math.log1p(-epsilon), uniform.log())


def entropy(logprobs_NV: Tensor) -> Tensor:
    """-Σ_j p_j ln p_j in nats, as a fresh [N]."""
    return -logprobs_NV.exp().mul_(logprobs_NV).sum(1)
