"""The gate λ in [0, 1]: each position's weight of the reverse KL against the forward KL."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dualkl.config import DualKLConfig
from dualkl.logprobs import entropy


@dataclass(frozen=True, eq=False)
class GateInputs:
    """Optional per-position gate inputs; by default `config.tau` and the teacher outcomes' entropy."""

    tau_N: Tensor | None = None
    teacher_entropy_N: Tensor | None = None

    def select(self, rows: slice) -> "GateInputs":
        """Select positions."""
        return GateInputs(*(None if x is None else x[rows] for x in (self.tau_N, self.teacher_entropy_N)))


NO_INPUTS = GateInputs()


def gate(
    divergence: Float[Tensor, " N"], config: DualKLConfig, tau: Float[Tensor, "*N"] | None = None
) -> Float[Tensor, " N"]:
    """Return the weight of the reverse KL at each position.

    D is in nats and defaults to KL(student || teacher).
    soft: λ = sigmoid(alpha (tau - D)). hard: λ = 1[D <= tau]. fixed: λ = mix.
    `tau`, broadcastable to D, overrides `config.tau`.

    The result is detached. An undetached soft gate would multiply the reverse KL's own gradient by
    λ - alpha λ (1 - λ) (R - F) + ..., which is negative once alpha (1 - λ) (R - F) > 1: it would raise the
    reverse KL. D = inf gives λ = 0; D = NaN gives NaN (soft gate) or 0 (hard gate).
    """
    divergence = divergence.detach()
    threshold = config.tau if tau is None else tau.detach()
    if config.gating == "soft":
        return torch.sigmoid(config.alpha * (threshold - divergence))
    if config.gating == "hard":
        return (divergence <= threshold).to(divergence.dtype)
    return torch.full_like(divergence, config.mix)


def teacher_signal(
    logq_NC: Float[Tensor, "N C"], config: DualKLConfig, inputs: GateInputs
) -> Float[Tensor, " N"] | None:
    """Return a D that depends on the teacher alone (given entropy or that of its outcomes), else None."""
    if config.gate_on != "teacher_entropy":
        return None
    return entropy(logq_NC) if inputs.teacher_entropy_N is None else inputs.teacher_entropy_N
