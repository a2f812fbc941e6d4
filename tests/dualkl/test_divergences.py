"""Measuring without gradient: `compare`, `gather_logprobs`, and the properties of both divergences."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dualkl import Head, HiddenTeacher, LogitsTeacher, TopKTeacher
from dualkl.compress import compress
from dualkl.divergences import compare, divergences_, gather_logprobs
from dualkl.logprobs import log_normalise_
from tests.support import reference

N, V, D = 7, 503, 24


def pair(dtype: torch.dtype = torch.float64, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(student hidden, student weight, teacher hidden, teacher weight), not far from each other."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    teacher_hidden = hidden + 0.3 * spread * torch.randn(N, D, generator=generator, dtype=torch.float64)
    teacher_weight = weight + 0.2 * spread * torch.randn(V, D, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), teacher_hidden.to(dtype), teacher_weight.to(dtype)


def topk(hidden: Tensor, weight: Tensor, k: int, **options: Any) -> TopKTeacher:
    kept = compress(hidden, weight, torch.zeros(len(hidden), dtype=torch.long), k=k, **options)
    return TopKTeacher(kept.ids, kept.logprobs, kept.log_tail_mass, options.get("temperature", 1.0))


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_compare_is_the_dense_oracle(kind: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = pair()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    teacher_logits = reference.head_logits(teacher_hidden, {"weight": teacher_weight})
    teacher = (
        LogitsTeacher(teacher_logits) if kind == "logits" else HiddenTeacher(teacher_hidden, teacher_weight)
    )
    found = compare(hidden, Head(weight, bias), teacher, vocab_size=491, temperature=1.3, chunk_rows=3)
    logits = reference.head_logits(hidden, {"weight": weight, "bias": bias}, 491)
    for n in range(N):
        logp, logq = (
            reference.log_softmax(logits[n] / 1.3),
            reference.log_softmax(teacher_logits[n, :491] / 1.3),
        )
        assert math.isclose(found.rkl[n], reference.kl(logp, logq), rel_tol=1e-6)
        assert math.isclose(found.fkl[n], reference.kl(logq, logp), rel_tol=1e-6)
        assert math.isclose(found.student_entropy[n], reference.entropy(logp), rel_tol=1e-6)
        assert (found.student_top1[n], found.teacher_top1[n]) == (logp.argmax(), logq.argmax())


def test_compare_with_a_topk_teacher_is_the_bucketed_oracle() -> None:
    hidden, weight, teacher_hidden, teacher_weight = pair()
    teacher = topk(teacher_hidden, teacher_weight, 5)
    found = compare(hidden, weight, teacher, chunk_rows=2)
    rows = {"ids": teacher.ids, "logprobs": teacher.logprobs, "log_tail_mass": teacher.log_tail_mass}
    logits = reference.head_logits(hidden, {"weight": weight})
    for n in range(N):
        logp, logq = reference.topk_outcomes(logits[n], rows, n, 1e-8)
        assert math.isclose(found.rkl[n], reference.kl(logp, logq), rel_tol=1e-6)
        assert math.isclose(found.fkl[n], reference.kl(logq, logp), rel_tol=1e-6)
        assert math.isclose(
            found.student_entropy[n], reference.entropy(reference.log_softmax(logits[n])), rel_tol=1e-6
        )
    assert torch.equal(found.teacher_top1, teacher.ids[:, 0].long())
    assert torch.equal(found.student_top1, logits.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e-3, 0.03, 1.0, 10.0])
def test_both_divergences_are_at_least_0(dtype: torch.dtype, spread: float) -> None:
    hidden, weight, teacher_hidden, teacher_weight = pair(dtype, spread)
    for teacher in (HiddenTeacher(teacher_hidden, teacher_weight), topk(teacher_hidden, teacher_weight, 5)):
        found = compare(hidden, weight, teacher)
        assert (found.rkl >= 0).all()
        assert (found.fkl >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_forward_and_reverse_kl_are_0_when_equal(dtype: torch.dtype) -> None:
    hidden, weight, _, _ = pair(dtype)
    found = compare(hidden, weight, HiddenTeacher(hidden, weight))
    assert found.rkl.tolist() == found.fkl.tolist() == [0.0] * N
    found = compare(hidden, weight, topk(hidden, weight, 5))
    assert found.rkl.max() < 1e-6
    assert found.fkl.max() < 1e-6


@pytest.mark.parametrize("k", [1, 5, 64, 400])
def test_bucketed_divergences_are_at_most_the_full_ones(k: int) -> None:
    hidden, weight, teacher_hidden, teacher_weight = pair()
    full = compare(hidden, weight, HiddenTeacher(teacher_hidden, teacher_weight))
    bucketed = compare(hidden, weight, topk(teacher_hidden, teacher_weight, k), tail_floor=0.0)
    assert (bucketed.rkl <= full.rkl + 1e-6).all()
    assert (bucketed.fkl <= full.fkl + 1e-6).all()


def test_keeping_all_ids_equals_the_dense_teacher() -> None:
    hidden, weight, teacher_hidden, teacher_weight = pair()
    full = compare(hidden, weight, HiddenTeacher(teacher_hidden, teacher_weight))
    kept = compare(hidden, weight, topk(teacher_hidden, teacher_weight, V))
    torch.testing.assert_close(kept.rkl, full.rkl)
    torch.testing.assert_close(kept.fkl, full.fkl)


def test_a_small_divergence_is_exact_in_float32() -> None:
    hidden, weight, teacher_hidden, teacher_weight = pair(torch.float32, 0.03)
    exact = compare(
        hidden.double(),
        weight.double(),
        HiddenTeacher(teacher_hidden.double(), teacher_weight.double()),
    )
    found = compare(hidden, weight, HiddenTeacher(teacher_hidden, teacher_weight))
    assert 1e-5 < exact.rkl.min() < 1e-2
    torch.testing.assert_close(found.rkl, exact.rkl, atol=3e-6, rtol=1e-3)
    torch.testing.assert_close(found.fkl, exact.fkl, atol=3e-6, rtol=1e-3)


def test_a_token_that_one_side_rules_out_gives_huge_numbers_not_nan() -> None:
    logp = log_normalise_(torch.tensor([[0.0, 0.0, -math.inf, -math.inf]]))
    logq = log_normalise_(torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]))
    rkl, fkl, product = divergences_(logp, logq)
    assert rkl.item() > 1e29
    assert fkl.item() > 1e29
    assert product[0, 2:].tolist() == [0, 0]


def test_gather_logprobs_is_log_softmax_at_the_ids() -> None:
    hidden, weight, _, _ = pair()
    bias, ids = torch.linspace(-1, 1, V), torch.arange(N) * 70
    head = {"weight": weight, "bias": bias, "scale": 0.5, "softcap": 4.0}
    logits = reference.head_logits(hidden, head, 491) / 0.7
    expected = torch.stack([reference.log_softmax(logits[n])[ids[n]] for n in range(N)])
    head_object = Head(weight, bias, 0.5, 4.0)
    for chunk_rows in (None, 2):
        found = gather_logprobs(
            hidden, head_object, ids, vocab_size=491, temperature=0.7, chunk_rows=chunk_rows
        )
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_nothing_to_measure_gives_nothing() -> None:
    none = torch.empty(0, D)
    found = compare(none, torch.ones(V, D), HiddenTeacher(none, torch.ones(V, D)))
    assert found.rkl.shape == found.student_top1.shape == (0,)
    assert gather_logprobs(none, torch.ones(V, D), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_bad_arguments_are_refused() -> None:
    hidden, weight, teacher_hidden, teacher_weight = pair()
    with pytest.raises(ValueError, match=r"ids\[6\] is 503; expected an id in \[0, 503\)"):
        gather_logprobs(hidden, weight, torch.tensor([0, 0, 0, 0, 0, 0, 503]))
    with pytest.raises(ValueError, match="temperature is 0; expected a finite number > 0"):
        compare(hidden, weight, HiddenTeacher(teacher_hidden, teacher_weight), temperature=0)
    with pytest.raises(ValueError, match=r"top-k logprobs are at temperature 1.0, the loss is at 2.0"):
        compare(hidden, weight, topk(teacher_hidden, teacher_weight, 5), temperature=2.0)
