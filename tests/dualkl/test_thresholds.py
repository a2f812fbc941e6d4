"""Thresholds over a run: the histogram of D, and the adaptive threshold."""

import json
import math

import pytest
import torch
from torch import Tensor

from dualkl import DualKLConfig
from dualkl.gates import gate
from dualkl.thresholds import (
    LARGEST_DIVERGENCE,
    LEAST_DIVERGENCE,
    NUM_BINS,
    AdaptiveTau,
    adapt,
    bin_edges,
    divergence_histogram,
    tau_for_share,
)


def divergences(num: int, centre: float = 0.1, seed: int = 0) -> Tensor:
    """Log-normal, as the reverse KL of a student's tokens is: most small, a few large."""
    generator = torch.Generator().manual_seed(seed)
    return centre * (1.5 * torch.randn(num, generator=generator, dtype=torch.float64)).exp()


def test_every_divergence_is_in_the_bin_between_its_edges() -> None:
    edges = bin_edges()
    assert len(edges) == NUM_BINS + 1
    assert edges[0] == 0
    assert edges[1] == LEAST_DIVERGENCE
    assert math.isclose(edges[-2], LARGEST_DIVERGENCE)
    values = (edges[1:] + edges[:-1]) / 2
    assert torch.equal(divergence_histogram(values), torch.ones(NUM_BINS, dtype=torch.int64))
    odd = torch.tensor([0.0, 1e-30, math.inf, 1e30, math.nan, 0.5])
    histogram = divergence_histogram(odd, torch.tensor([1, 1, 1, 1, 1, 0]))
    assert (histogram[0], histogram[-1], histogram.sum()) == (2, 2, 4)


def test_histograms_of_parts_add_up_to_that_of_the_whole() -> None:
    values = divergences(1000)
    parts = sum(divergence_histogram(part) for part in values.split(77))
    assert torch.equal(parts, divergence_histogram(values))


@pytest.mark.parametrize("gating", ["soft", "hard"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
def test_the_threshold_gives_the_share_that_was_asked_for(gating: str, share: float) -> None:
    values = divergences(4000)
    tau = tau_for_share(divergence_histogram(values), share, gating, 40.0)
    config = DualKLConfig(gating=gating, alpha=40.0)
    assert abs(float(gate(values, config, tau).mean()) - share) < 0.01
    if gating == "hard":
        assert math.isclose(tau, values.quantile(share), rel_tol=0.08)  # a bin's ratio


def test_the_threshold_has_its_limits() -> None:
    same = divergence_histogram(torch.full((10,), 0.3))
    assert math.isclose(tau_for_share(same, 0.5, "hard", 1.0), 0.3, rel_tol=0.08)
    assert tau_for_share(same, 0.2, "soft", 0.5) == 0  # sigmoid(-0.15) is more than that at τ = 0
    assert tau_for_share(divergence_histogram(torch.full((10,), 1e30)), 0.5, "soft", 5.0) <= bin_edges()[-1]
    assert tau_for_share(torch.zeros(NUM_BINS), 0.5, "soft", 5.0).isnan()


@pytest.mark.parametrize("gating", ["soft", "hard"])
def test_an_adaptive_threshold_keeps_the_share_while_divergences_fall(gating: str) -> None:
    """D falls by a factor of 30 over 300 steps, as it does in a run; a fixed threshold would end at pure
    reverse KL.
    """
    config, state = DualKLConfig(gating=gating, alpha=40.0), AdaptiveTau.starting_at(1.0)
    shares, fixed = [], []
    for step in range(300):
        values = divergences(500, 0.3 * 30 ** (-step / 300), seed=step)
        shares.append(float(gate(values, config, state.tau).mean()))
        fixed.append(float(gate(values, config, torch.tensor(0.3)).mean()))
        state = adapt(state, divergence_histogram(values), share=0.7, gating=gating, alpha=40.0)
    assert all(abs(share - 0.7) < 0.1 for share in shares[1:])
    assert abs(sum(shares[1:]) / 299 - 0.7) < 0.05
    assert fixed[-1] > 0.95
    assert state.num_updates == 300


def test_the_state_is_two_floats_that_come_back_to_the_bit() -> None:
    state = adapt(
        AdaptiveTau.starting_at(1.0), divergence_histogram(divergences(50)), share=0.5, gating="hard", alpha=1
    )
    kept = json.loads(json.dumps(state.state()))
    again = AdaptiveTau.from_state(kept)
    assert kept == {"tau": float(state.tau), "num_updates": 1.0}
    histogram = divergence_histogram(divergences(50, seed=1))
    moved = [adapt(x, histogram, share=0.5, gating="soft", alpha=5.0).state() for x in (state, again)]
    assert moved[0] == moved[1]


def test_the_first_histogram_replaces_the_start_and_an_empty_one_changes_nothing() -> None:
    histogram, options = (
        divergence_histogram(divergences(500)),
        {"share": 0.5, "gating": "hard", "alpha": 1.0},
    )
    states = [adapt(AdaptiveTau.starting_at(tau), histogram, **options) for tau in (0.0, 50.0)]
    assert math.isclose(states[0].tau, states[1].tau, rel_tol=1e-9)
    unmoved = adapt(states[0], torch.zeros(NUM_BINS), **options)
    assert unmoved.state() == states[0].state()
    slow = adapt(states[0], divergence_histogram(torch.full((9,), 50.0)), **options)
    assert slow.tau > 20  # the second one counts for half


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, r"share is 1.0; expected a mean of the gate in \(0, 1\)."),
        ({"gating": "fixed"}, "gating is 'fixed'; expected 'soft' or 'hard'"),
    ],
)
def test_an_adaption_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    options = {"share": 0.5, "gating": "soft", "alpha": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        adapt(AdaptiveTau.starting_at(1.0), torch.zeros(NUM_BINS), **options)
