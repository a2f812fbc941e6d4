"""The gate: formula, limits, detachment."""

import math

import pytest
import torch

from dualkl import DualKLConfig
from dualkl.gates import gate
from tests.support import reference

DIVERGENCES = torch.tensor([0.0, 1e-6, 0.3, 1.0, 1.0000001, 4.0, 200.0, 1e30], dtype=torch.float64)


@pytest.mark.parametrize("gating", ["soft", "hard", "fixed"])
def test_the_gate_is_its_formula(gating: str) -> None:
    config = DualKLConfig(gating=gating, tau=1.0, alpha=5.0, mix=0.3)
    expected = [reference.gate(float(d), config) for d in DIVERGENCES]
    torch.testing.assert_close(gate(DIVERGENCES, config), torch.tensor(expected, dtype=torch.float64))


def test_the_hard_gate_is_open_at_tau_itself() -> None:
    assert gate(
        torch.tensor([1.0, math.nextafter(1.0, 2)], dtype=torch.float64), DualKLConfig(gating="hard")
    ).tolist() == [1, 0]


def test_an_infinite_divergence_closes_the_gate() -> None:
    assert gate(torch.tensor([math.inf]), DualKLConfig()).item() == 0


def test_the_gate_carries_no_gradient() -> None:
    assert not gate(torch.ones(3, requires_grad=True), DualKLConfig()).requires_grad
