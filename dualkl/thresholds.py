"""The gate's threshold over a run, adapted to the divergences seen. Pure functions.

What they give is passed to `dual_kl(tau=...)`. Adapting works from a histogram of D with fixed bins, so that processes
add up theirs first and all come to the same threshold; it runs on the histogram's device and nothing waits for it.

Shape suffixes: N positions, B bins, E bin edges (B + 1).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST_DIVERGENCE, LARGEST_DIVERGENCE = 1e-6, 1e2
"""Nats. Between them bins have equal ratios; one bin below and one above take the rest."""
BINS_PER_DECADE = 32
RATE = 0.1
"""Part of the way to a histogram's own threshold that τ goes, once as many histograms have been seen as that takes."""
NUM_BINS = BINS_PER_DECADE * round(math.log10(LARGEST_DIVERGENCE / LEAST_DIVERGENCE)) + 2


def divergence_histogram(
    divergence: Float[Tensor, " N"], counted: Float[Tensor, " N"] | Int[Tensor, " N"] | None = None
) -> Int[Tensor, " B"]:
    """How many positions have their D in each of NUM_BINS bins, int64. NaN, and where `counted` is 0, is left out."""
    values_N = divergence.detach().double()
    include_N = ~values_N.isnan()
    if counted is not None:
        include_N &= counted != 0
    safe_N = torch.where(include_N, values_N, 0).clamp(LEAST_DIVERGENCE / 2, LARGEST_DIVERGENCE * 2)
    index_N = (safe_N / LEAST_DIVERGENCE).log10_().mul_(BINS_PER_DECADE).floor_().long() + 1
    histogram_B = torch.zeros(NUM_BINS, dtype=torch.int64, device=divergence.device)
    return histogram_B.scatter_add_(0, index_N.clamp_(0, NUM_BINS - 1), include_N.long())


def bin_edges(device: torch.device | str = "cpu") -> Float[Tensor, " E"]:
    """0, then LEAST_DIVERGENCE to LARGEST_DIVERGENCE, then one bin's ratio more (the last bin has no end), float64."""
    steps = torch.arange(NUM_BINS, dtype=torch.float64, device=device)
    edges_E = LEAST_DIVERGENCE * 10 ** (steps / BINS_PER_DECADE)
    return torch.cat([edges_E.new_zeros(1), edges_E])


def tau_for_share(
    histogram: Int[Tensor, " B"] | Float[Tensor, " B"],
    share: float,
    gating: Literal["soft", "hard"],
    alpha: float,
) -> Float[Tensor, ""]:
    """The τ in nats, float64, at which the mean of λ over the histogram's positions is `share`; NaN without positions.

    hard: the quantile of D, linear within its bin. soft: the τ that solves mean sigmoid(alpha (τ - D)) = share, with D in
    the middle of its bin. Where even τ = 0 gives more than `share` (a soft gate with a small alpha), it is 0.

    Raises:
        ValueError: a share outside (0, 1), or a gating without a threshold.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; expected a mean of the gate in (0, 1).")
    if gating not in ("soft", "hard"):
        raise ValueError(f"gating is {gating!r}; expected 'soft' or 'hard', which have a threshold.")
    counts_B, edges_E = histogram.double(), bin_edges(histogram.device)
    if gating == "hard":
        below_E = torch.cat([counts_B.new_zeros(1), counts_B.cumsum(0)])
    else:
        middles_B = (edges_E[1:] + edges_E[:-1]) / 2
        below_E = (torch.sigmoid(alpha * (edges_E[:, None] - middles_B)) * counts_B).sum(1)
    mean_E = below_E.cummax(0).values / counts_B.sum()
    # `gather` on a one-element index: plain indexing by a tensor would wait for its value.
    upper = torch.searchsorted(mean_E, mean_E.new_full((1,), share)).clamp_(1, NUM_BINS)
    (mean_low, mean_high), (low, high) = (
        (x.gather(0, upper - 1), x.gather(0, upper)) for x in (mean_E, edges_E)
    )
    part = ((share - mean_low) / (mean_high - mean_low).clamp(min=torch.finfo(torch.float64).tiny)).clamp(
        0, 1
    )
    return torch.where(counts_B.sum() > 0, low + (high - low) * part, torch.nan)[0]


@dataclass(frozen=True, eq=False)
class AdaptiveTau:
    """The state of an adaptive threshold: τ in nats and how many histograms have moved it, float64 on one device."""

    tau: Float[Tensor, ""]
    num_updates: Float[Tensor, ""]

    @classmethod
    def starting_at(cls, tau: float, device: torch.device | str = "cpu") -> "AdaptiveTau":
        """Before any histogram; the first one replaces `tau` altogether."""
        return cls.from_state({"tau": tau, "num_updates": 0.0}, device)

    @classmethod
    def from_state(cls, state: dict[str, float], device: torch.device | str = "cpu") -> "AdaptiveTau":
        """What `state` described, to the last bit."""
        return cls(
            *(torch.full((), state[x], dtype=torch.float64, device=device) for x in ("tau", "num_updates"))
        )

    def state(self) -> dict[str, float]:
        """Two floats for a checkpoint. Waits for the device."""
        return {"tau": float(self.tau), "num_updates": float(self.num_updates)}


def adapt(
    current: AdaptiveTau,
    histogram: Int[Tensor, " B"] | Float[Tensor, " B"],
    *,
    share: float,
    gating: Literal["soft", "hard"],
    alpha: float,
) -> AdaptiveTau:
    """τ moved toward the threshold at which the histogram's mean λ is `share`.

    The n-th update moves it by max(RATE, 1 / n) of the way: a mean of the first ones, then an exponential mean. A histogram without
    positions changes nothing. Equal histograms give equal thresholds, whatever they were summed from.

    Raises:
        ValueError: as `tau_for_share`.
    """
    wanted = tau_for_share(histogram, share, gating, alpha)
    counted, num_updates = ~wanted.isnan(), current.num_updates + 1
    moved = current.tau + (wanted - current.tau) * (1 / num_updates).clamp(min=RATE)
    return AdaptiveTau(
        torch.where(counted, moved, current.tau), torch.where(counted, num_updates, current.num_updates)
    )
