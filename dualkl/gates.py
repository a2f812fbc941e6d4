"""The gate λ in [0, 1]: how much of each position's loss is reverse KL; the rest is forward KL."""

import torch
from jaxtyping import Float
from torch import Tensor

from dualkl.config import DualKLConfig


def gate(divergence: Float[Tensor, " N"], config: DualKLConfig) -> Float[Tensor, " N"]:
    """Weight of the reverse KL at each position, given D = KL(student || teacher) in nats.

    soft: λ = sigmoid(alpha (tau - D)). hard: λ = 1[D <= tau]. fixed: λ = mix.

    The result carries no gradient. Through an undetached soft gate the reverse KL's own gradient is multiplied by
    λ - alpha λ (1 - λ) (R - F) + ..., which is negative once alpha (1 - λ) (R - F) > 1: it would raise the reverse KL.
    D = inf gives λ = 0; D = NaN gives NaN under the soft and 0 under the hard gate.
    """
    divergence = divergence.detach()
    if config.gating == "soft":
        return torch.sigmoid(config.alpha * (config.tau - divergence))
    if config.gating == "hard":
        return (divergence <= config.tau).to(divergence.dtype)
    return torch.full_like(divergence, config.mix)
