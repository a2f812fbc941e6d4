"""What is logged of the gate: sums that add up over parts, and the means read from them."""

import math

import pytest
import torch

from dualkl import TopKTeacher
from dualkl.gate_statistics import (
    LENGTH,
    NUM_GATE_BINS,
    NUM_SUMS,
    divergence_counts,
    figures,
    gate_statistics,
    group_sums,
    means,
)
from dualkl.thresholds import divergence_histogram
from tests.dualkl.test_losses import Case, N


def test_the_figures_are_means_over_the_positions_that_count() -> None:
    case = Case()
    case.weights[3] = 0
    teacher = case.teacher("topk")
    assert isinstance(teacher, TopKTeacher)
    out = case.run("topk", case.config(tau=0.2))
    tau = float(out.rkl.median())
    found = figures(gate_statistics(out, tau, case.weights, teacher_log_tail_mass=teacher.log_tail_mass))
    keep = case.weights != 0
    rkl, fkl, gates = out.rkl[keep], out.fkl[keep], out.gate[keep]
    above = rkl > tau
    assert 0 < above.sum() < N - 1
    assert found["gate_mean"] == pytest.approx(float(gates.mean()))
    assert found["share_above"] == pytest.approx(float(above.double().mean()))
    for name, column in (("rkl", rkl), ("fkl", fkl)):
        assert found[name] == pytest.approx(float(column.mean()))
        assert found[f"{name}_above"] == pytest.approx(float(column[above].mean()))
        assert found[f"{name}_below"] == pytest.approx(float(column[~above].mean()))
    assert out.student_log_tail_mass is not None
    wanted = 1 - out.student_log_tail_mass[keep].exp().mean(), 1 - teacher.log_tail_mass[keep].exp().mean()
    assert found["student_support_mass"] == pytest.approx(float(wanted[0]))
    assert found["teacher_support_mass"] == pytest.approx(float(wanted[1]))
    histogram = torch.histc(gates, NUM_GATE_BINS, 0, 1).int().tolist()
    assert found["gate_histogram"] == histogram
    assert found["divergence_histogram"] == divergence_histogram(rkl).tolist()


def test_statistics_of_parts_add_up() -> None:
    case = Case()
    out = case.run("logits", case.config())
    whole = gate_statistics(out, 0.8)
    first = (torch.arange(N) < 3).double()
    assert whole.shape == (LENGTH,)
    torch.testing.assert_close(gate_statistics(out, 0.8, first) + gate_statistics(out, 0.8, 1 - first), whole)
    assert torch.equal(divergence_counts(whole), divergence_histogram(out.rkl).double())


def test_groups_have_the_means_of_their_positions() -> None:
    case = Case()
    teacher = case.teacher("topk")
    assert isinstance(teacher, TopKTeacher)
    out = case.run("topk", case.config(tau=0.2))
    tau, tails = float(out.rkl.median()), teacher.log_tail_mass
    groups = torch.tensor([0, 2, 2, 0, 3, 2, 0], dtype=torch.uint8)
    counted = torch.ones(N)
    counted[1] = 0
    statistics = gate_statistics(out, tau, counted, teacher_log_tail_mass=tails, groups=groups, num_groups=3)
    assert statistics.shape == (LENGTH + 3 * NUM_SUMS,)
    assert torch.equal(statistics[:LENGTH], gate_statistics(out, tau, counted, teacher_log_tail_mass=tails))
    sums = group_sums(statistics, 3)
    for number in (0, 2):
        alone = figures(gate_statistics(out, tau, counted * (groups == number), teacher_log_tail_mass=tails))
        assert means(sums[number]) == pytest.approx(
            {k: v for k, v in alone.items() if not isinstance(v, list)}
        )
    assert means(sums[1]) == {}
    assert means(sums.sum(0))["positions"] == 5, "group 3 is none of three, one position does not count"


def test_a_dense_teacher_has_no_support_and_one_side_may_be_empty() -> None:
    case = Case()
    out = case.run("logits", case.config())
    found = figures(gate_statistics(out, torch.tensor(1e9)))
    assert found["share_above"] == 0
    assert not {"rkl_above", "fkl_above", "student_support_mass", "teacher_support_mass"} & set(found)
    assert "rkl_above" in figures(gate_statistics(out, torch.zeros(N)))
    assert figures(gate_statistics(out, 1.0, torch.zeros(N))) == {}


def test_another_signal_is_compared_with_the_threshold_and_nan_stays_visible() -> None:
    case = Case()
    out = case.run("logits", case.config(gate_on="fkl"))
    tau = float(out.fkl.median())
    statistics = gate_statistics(out, tau, divergence=out.fkl)
    assert figures(statistics)["share_above"] == pytest.approx(3 / 7)
    assert torch.equal(divergence_counts(statistics), divergence_histogram(out.fkl).double())
    with torch.no_grad():
        case.hidden[2] = math.nan
    broken = figures(gate_statistics(case.run("logits", case.config()), 0.8))
    assert math.isnan(broken["gate_mean"])
    assert math.isnan(broken["rkl"])
