"""The sampled reverse KL: ratio, value and advantage."""

import math

import torch

from dualkl.estimators import importance_ratio, sampled_reverse_kl
from tests.support import reference


def test_the_importance_ratio_is_truncated_at_its_cap() -> None:
    student, behaviour = torch.tensor([-1.0, -1.0, -9.0]), torch.tensor([-1.0, -4.0, -1.0])
    ratio = importance_ratio(student, behaviour, 5.0)
    torch.testing.assert_close(ratio, torch.tensor([1.0, 5.0, math.exp(-8.0)]))
    assert importance_ratio(student, behaviour, math.inf)[1] > 20


def test_value_and_advantage_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher, behaviour, rkl = -torch.rand(4, 7, generator=generator, dtype=torch.float64) * 6
    value, advantage = sampled_reverse_kl(student, teacher, behaviour, -rkl, 2.0)
    for n in range(7):
        ratio = reference.importance(float(student[n]), float(behaviour[n]), 2.0)
        log_ratio = float(student[n] - teacher[n])
        assert math.isclose(value[n], ratio * log_ratio, rel_tol=1e-12)
        assert math.isclose(advantage[n], ratio * (log_ratio + float(rkl[n])), rel_tol=1e-12)


def test_a_token_that_the_teacher_rules_out_gives_finite_numbers() -> None:
    value, advantage = sampled_reverse_kl(
        torch.tensor([-2.0]), torch.tensor([-math.inf]), torch.tensor([-2.0]), torch.tensor([1.0]), 5.0
    )
    assert value.isfinite().all()
    assert advantage.isfinite().all()
