"""The gate's threshold τ, adapted to the observed divergences. Pure functions.

Pass the result to `dual_kl(tau=...)`. Adaptation uses a histogram of D with fixed bins: processes sum their
histograms and arrive at the same threshold. It runs on the histogram's device without synchronising.

Shape suffixes: N positions, B bins, E bin edges (B + 1).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST_DIVERGENCE, LARGEST_DIVERGENCE = 1e-6, 1e2
"""Histogram range in nats, with log-spaced bins; one bin below and one above take the rest."""
BINS_PER_DECADE = 32
RATE = 0.1
"""Minimum fraction by which an update moves τ towards the latest histogram's threshold."""
NUM_BINS = BINS_PER_DECADE * round(math.log10(LARGEST_DIVERGENCE / LEAST_DIVERGENCE)) + 2


def divergence_histogram(
    divergence: Float[Tensor, " N"], counted: Float[Tensor, " N"] | Int[Tensor, " N"] | None = None
) -> Int[Tensor, " B"]:
    """Count positions per bin of D (NUM_BINS, int64). Excludes NaN and positions where `counted` is 0."""
    values_N = divergence.detach().double()
    include_N = ~values_N.isnan()
    if counted is not None:
        include_N &= counted != 0
    safe_N = torch.where(include_N, values_N, 0).clamp(LEAST_DIVERGENCE / 2, LARGEST_DIVERGENCE * 2)
    index_N = (safe_N / LEAST_DIVERGENCE).log10_().mul_(BINS_PER_DECADE).floor_().long() + 1
    histogram_B = torch.zeros(NUM_BINS, dtype=torch.int64, device=divergence.device)
    return histogram_B.scatter_add_(0, index_N.clamp_(0, NUM_BINS - 1), include_N.long())


def bin_edges(device: torch.device | str = "cpu") -> Float[Tensor, " E"]:
    """Return the bin edges, float64: 0, LEAST_DIVERGENCE to LARGEST_DIVERGENCE, and one above.

    The top edge is nominal, as the last bin is open.
    """
    steps = torch.arange(NUM_BINS, dtype=torch.float64, device=device)
    edges_E = LEAST_DIVERGENCE * 10 ** (steps / BINS_PER_DECADE)
    return torch.cat([edges_E.new_zeros(1), edges_E])


def tau_for_share(
    histogram: Int[Tensor, " B"] | Float[Tensor, " B"],
    share: float,
    gating: Literal["soft", "hard"],
    alpha: float,
) -> Float[Tensor, ""]:
    """Return τ in nats, float64, for which λ averages `share` over the histogram; NaN if it is empty.

    hard: the quantile of D, interpolated linearly within its bin. soft: the solution of mean sigmoid(alpha (τ
    - D)) = share, with D at bin centres. Returns 0 if even τ = 0 exceeds `share` (a soft gate with a small
    alpha).

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
    # `gather` with a one-element index: plain indexing by a tensor would synchronise.
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
    """State of an adaptive threshold: τ in nats and the number of updates, float64 on one device."""

    tau: Float[Tensor, ""]
    num_updates: Float[Tensor, ""]

    @classmethod
    def starting_at(cls, tau: float, device: torch.device | str = "cpu") -> "AdaptiveTau":
        """Initial state. The first histogram replaces `tau` completely."""
        return cls.from_state({"tau": tau, "num_updates": 0.0}, device)

    @classmethod
    def from_state(cls, state: dict[str, float], device: torch.device | str = "cpu") -> "AdaptiveTau":
        """Restore a `state`, bit for bit."""
        return cls(
            *(torch.full((), state[x], dtype=torch.float64, device=device) for x in ("tau", "num_updates"))
        )

    def state(self) -> dict[str, float]:
        """Return two floats for a checkpoint. Synchronises."""
        return {"tau": float(self.tau), "num_updates": float(self.num_updates)}


def adapt(
    current: AdaptiveTau,
    histogram: Int[Tensor, " B"] | Float[Tensor, " B"],
    *,
    share: float,
    gating: Literal["soft", "hard"],
    alpha: float,
) -> AdaptiveTau:
    """Move τ towards the threshold for which the histogram's mean λ is `share`.

    The n-th update moves it by max(RATE, 1 / n) of the way: a running mean at first, then an exponential
    moving average. An empty histogram changes nothing. Equal histograms give equal thresholds, however they
    were summed.

    Raises:
        ValueError: see `tau_for_share`.
    """
    wanted = tau_for_share(histogram, share, gating, alpha)
    counted, num_updates = ~wanted.isnan(), current.num_updates + 1
    moved = current.tau + (wanted - current.tau) * (1 / num_updates).clamp(min=RATE)
    return AdaptiveTau(
        torch.where(counted, moved, current.tau), torch.where(counted, num_updates, current.num_updates)
    )
