"""Sampling: from a step's logits to tokens, their log-probabilities and the sampling distribution's entropy.

The vocabulary is read once, in blocks of 1,024 ids, to find each block's peak, mass and first moment.
Everything else uses those few numbers and the block that holds the token. Sums are in float64.

Shape suffixes: B rows, V vocabulary after the cut, C blocks, E ids of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.engine.protocol import Sampling

BLOCK = 1024
LEAST = torch.finfo(torch.float32).min
_BELOW_ONE = 1.0 - 2.0**-53


class Chosen(NamedTuple):
    """One token per row, its logprob and the entropy (nats) of its sampling distribution."""

    token: Int[Tensor, " B"]
    logprob: Float[Tensor, " B"]
    entropy: Float[Tensor, " B"]


class Blocks(NamedTuple):
    """Per block of logits z, in float64: the largest z, Σ exp(z − peak) and Σ exp(z − peak) (z − peak)."""

    peak: Float[Tensor, "B C"]
    mass: Float[Tensor, "B C"]
    moment: Float[Tensor, "B C"]


def choose(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], forced: Int[Tensor, " B"], sampling: Sampling
) -> Chosen:
    """The forced token if not negative, else the most likely (greedy) or the one at the row's uniform.

    `uniforms` are float64 in [0, 1), `logits` float32. A NaN among a row's logits makes its logprob NaN.
    """
    logits = sampling_logits(logits, sampling)
    blocks = block_statistics(logits)
    top = blocks.peak.amax(-1, keepdim=True)
    mass = blocks.mass * (blocks.peak - top).exp()
    total = mass.sum(-1)
    drawn = _most_likely(logits, blocks) if sampling.greedy else _inverse_cdf(logits, mass, uniforms)
    drawn = drawn.clamp(max=logits.shape[1] - 1)  # rows with NaN point past the end
    token = torch.where(forced >= 0, forced, drawn)
    log_total = total.log()
    logprob = logits.gather(1, token[:, None]).squeeze(1) - top.squeeze(1) - log_total
    moment = blocks.moment * (blocks.peak - top).exp() + mass * (blocks.peak - top)
    return Chosen(token, logprob.float(), (log_total - moment.sum(-1) / total).float())


def sampling_logits(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Logits after temperature, top-k and top-p, in this order; not normalised, -inf for removed ids."""
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.top_k > 0:
        kth = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    return logits


def block_statistics(logits: Float[Tensor, "B V"]) -> Blocks:
    """Peak, mass and moment of each block of at most 1,024 ids; NaN if the block holds NaN."""
    if logits.is_cuda:
        from stages.engine import kernels

        return Blocks(*kernels.block_statistics(logits, BLOCK))
    logits_BCE = _in_blocks(logits)
    peak = logits_BCE.amax(-1).clamp(min=LEAST)  # finite: an empty block has mass 0, not NaN
    gap_BCE = (logits_BCE - peak[..., None]).clamp(min=LEAST)
    p_BCE = gap_BCE.exp()
    moment = (p_BCE * gap_BCE).sum(-1, dtype=torch.float64)
    return Blocks(peak.double(), p_BCE.sum(-1, dtype=torch.float64), moment)


def _in_blocks(logits: Float[Tensor, "B V"]) -> Float[Tensor, "B C E"]:
    num_ids = logits.shape[1]
    size = min(BLOCK, num_ids)
    missing = -num_ids % size
    if missing:
        logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    return logits.unflatten(1, (-1, size))


def _most_likely(logits: Float[Tensor, "B V"], blocks: Blocks) -> Int[Tensor, " B"]:
    """Id of the first largest logit."""
    block = blocks.peak.argmax(-1)
    within, start = _block_of(logits, block)
    return start + within.argmax(-1)


def _inverse_cdf(
    logits: Float[Tensor, "B V"], mass: Float[Tensor, "B C"], uniforms: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """The first token whose cumulative probability exceeds the uniform: its block first, then the token."""
    cumulative = mass.cumsum(-1)
    target = (uniforms * cumulative[:, -1]).clamp(max=cumulative[:, -1] * _BELOW_ONE)[:, None]
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=mass.shape[1] - 1)
    below, own = (cumulative - mass).gather(1, block), mass.gather(1, block)
    rest = (target - below) / own  # share of the block, in [0, 1]
    within, start = _block_of(logits, block.squeeze(1))
    within = (within - within.amax(-1, keepdim=True)).exp().double().cumsum(-1)
    ends = within[:, -1:]
    token = torch.searchsorted(within, torch.minimum(rest.clamp(min=0) * ends, ends * _BELOW_ONE), right=True)
    return start + token.squeeze(1)


def _block_of(
    logits: Float[Tensor, "B V"], block: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B E"], Int[Tensor, " B"]]:
    """Logits of one block per row, -inf beyond the vocabulary, and the block's first id."""
    num_ids = logits.shape[1]
    size = min(BLOCK, num_ids)
    start = block * size
    ids = start[:, None] + torch.arange(size, device=logits.device)
    picked = logits.gather(1, ids.clamp(max=num_ids - 1))
    return picked.masked_fill(ids >= num_ids, -torch.inf), start
