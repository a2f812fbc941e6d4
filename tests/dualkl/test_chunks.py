"""One chunk, logits to gradient, in float32: peaked students, far tails, extreme logits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dualkl import DualKLConfig, TopKTeacher
from dualkl.chunks import StepResult, dense_step, topk_step
from dualkl.targets import Sampled
from tests.support import reference

N, K, V = 7, 5, 503
CONFIGS = [
    DualKLConfig(gating="fixed", mix=mix, rkl=rkl, fkl=fkl)
    for mix in (0.0, 0.4, 1.0)
    for rkl in ("exact", "mc")
    for fkl in ("full", "argmax")
]
JSD = [DualKLConfig(gating="fixed", mix=mix, objective="jsd") for mix in (0.1, 0.5)]
CONFIGS += JSD


def name(config: DualKLConfig) -> str:
    return f"{config.objective}-{config.mix}-{config.rkl}-{config.fkl}"


def random_logits(seed: int, spread: float = 2.0, rows: int = N) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def topk_of(logits: Tensor, k: int = K) -> dict[str, Tensor]:
    ids, logprobs, tails = reference.compress(logits, k)
    return {
        "ids": torch.tensor(ids),
        "logprobs": torch.tensor(logprobs),
        "log_tail_mass": torch.tensor(tails),
    }


def samples(logits: Tensor) -> Sampled:
    ids = torch.arange(len(logits)) * 61 % V
    return Sampled(ids, torch.full((len(logits),), -5.0), torch.full((len(logits),), -6.5))


def run(
    logits: Tensor, teacher: dict[str, Tensor], config: DualKLConfig, dtype: torch.dtype = torch.float32
) -> tuple[StepResult, Tensor]:
    """The step's result and the gradient of the sum of losses by the logits."""
    sampled, scale, z = samples(logits), torch.ones(len(logits), dtype=dtype), logits.to(dtype, copy=True)
    if "ids" in teacher:
        return topk_step(z, TopKTeacher(**teacher), sampled, scale, config), z
    return dense_step(z, teacher["logits"].to(dtype, copy=True), sampled, scale, config), z


def expected(
    logits: Tensor, teacher: dict[str, Tensor], config: DualKLConfig
) -> tuple[list[dict[str, Any]], Tensor]:
    z, sampled = logits.clone().requires_grad_(), samples(logits)
    columns = {"ids": sampled.ids, "teacher_logprobs": sampled.teacher_logprobs}
    columns["behaviour_logprobs"] = sampled.behaviour_logprobs
    rows = [reference.position_loss(z[n], teacher, n, config, columns) for n in range(len(z))]
    (gradient,) = torch.autograd.grad(sum(row["loss"] for row in rows), z)
    return rows, gradient


def doubles(rows: list[dict[str, Any]], column: str) -> Tensor:
    return torch.stack([torch.as_tensor(row[column], dtype=torch.float64).detach() for row in rows])


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_the_gradient_sums_to_0_over_the_vocabulary(kind: str, config: DualKLConfig) -> None:
    teacher = {"logits": random_logits(2)} if kind == "dense" else topk_of(random_logits(2))
    _, gradient = run(random_logits(1), teacher, config, torch.float64)
    assert gradient.sum(1).abs().max() < 1e-12 * gradient.abs().sum(1).max()


def peaked(log_tail: float) -> Tensor:
    """One student row whose mass outside ids 0..K-1 is exp(log_tail), unevenly spread inside and outside."""
    inside = torch.tensor([3.0, 2.0, 1.5, 0.0, -1.0], dtype=torch.float64)
    outside = random_logits(5, 1.0, 1)[0, K:]
    inside = inside - torch.logsumexp(inside, 0) + math.log1p(-math.exp(log_tail))
    return torch.cat([inside, outside - torch.logsumexp(outside, 0) + log_tail])[None]


def anchored(log_tail: float) -> dict[str, Tensor]:
    """A teacher that keeps ids 0..K-1 and has mass exp(log_tail) outside."""
    kept = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]], dtype=torch.float64) * (1 - math.exp(log_tail))
    return {
        "ids": torch.arange(K)[None],
        "logprobs": kept.log(),
        "log_tail_mass": torch.tensor([log_tail], dtype=torch.float64),
    }


@pytest.mark.parametrize("tail", [1e-6, 1e-14, 1e-52])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_a_students_tiny_tail_keeps_its_gradient_in_float32(tail: float, mix: float) -> None:
    """The teacher's tail is 1e-3. The form c p + k-hot carries q_0 / p_0 and is wrong here by 100 %."""
    config = DualKLConfig(gating="fixed", mix=mix)
    logits, teacher = peaked(math.log(tail)).float().double(), anchored(math.log(1e-3))
    rows, gradient = expected(logits, teacher, config)
    result, found = run(logits, teacher, config)
    assert math.isclose(result.rkl[0], rows[0]["rkl"], rel_tol=1e-4)
    assert math.isclose(result.fkl[0], rows[0]["fkl"], rel_tol=1e-4)
    for ids in (slice(0, K), slice(K, V)):
        scale = max(float(gradient[0, ids].norm()), 1e-30)
        assert float((found.double() - gradient)[0, ids].norm()) <= 2e-5 * scale + 1e-9 * float(mix > 0)
    assert found.isfinite().all()


@pytest.mark.parametrize("tail", [1e-6, 1e-14, 1e-30, 1e-52])
@pytest.mark.parametrize("config", JSD, ids=name)
def test_a_students_tiny_tail_keeps_its_jensen_shannon_gradient(tail: float, config: DualKLConfig) -> None:
    """The gradient outside is of the order of the student's tail: 0 in float32 for the last one."""
    logits, teacher = peaked(math.log(tail)).float().double(), anchored(math.log(1e-3))
    rows, gradient = expected(logits, teacher, config)
    result, found = run(logits, teacher, config)
    assert math.isclose(result.loss[0], float(doubles(rows, "loss")), rel_tol=1e-4)
    for ids in (slice(0, K), slice(K, V)):
        difference = (found.double() - gradient)[0, ids].norm()
        assert float(difference) <= 2e-5 * float(gradient[0, ids].norm()) + 1e-45


@pytest.mark.parametrize("config", JSD, ids=name)
@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_jensen_shannon_without_a_shared_id_is_the_entropy_of_beta(kind: str, config: DualKLConfig) -> None:
    logits, dense = random_logits(1), random_logits(2)
    logits[:, :250] = -math.inf
    dense[:, 250:] = -math.inf
    teacher = {"logits": dense} if kind == "dense" else topk_of(dense, 250)
    result, found = run(logits, teacher, config)
    bound = -config.mix * math.log(config.mix) - (1 - config.mix) * math.log(1 - config.mix)
    torch.testing.assert_close(result.loss, torch.full((N,), bound), rtol=1e-5, atol=1e-6)
    assert found.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["dense", "topk"])
@pytest.mark.parametrize("distance", [1e-2, 1e-3])
def test_jensen_shannon_keeps_its_digits_near_0(kind: str, distance: float) -> None:
    """At 1e-3 the divergence is 1e-7 nats: the difference of two rounded KL would be noise."""
    z = random_logits(1).float().double()
    t = (z + distance * random_logits(2, 1.0)).float().double()
    teacher = {"logits": t} if kind == "dense" else topk_of(t)
    rows, gradient = expected(z, teacher, JSD[0])
    result, found = run(z, teacher, JSD[0])
    torch.testing.assert_close(result.loss.double(), doubles(rows, "loss"), rtol=3e-3, atol=1e-12)
    assert (found.double() - gradient).norm() < 3e-3 * gradient.norm()


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("kind", ["dense", "topk"])
@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_logits_give_the_oracles_numbers(kind: str, config: DualKLConfig, size: float) -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.where(torch.rand(N, V, generator=generator) < 0.02, size, -size).double() + random_logits(
        1, 0.5
    )
    dense = torch.where(torch.rand(N, V, generator=generator) < 0.02, size, -size).double() + random_logits(
        2, 0.5
    )
    logits, dense = logits.float().double(), dense.float().double()
    teacher = {"logits": dense} if kind == "dense" else topk_of(dense)
    rows, gradient = expected(logits, teacher, config)
    result, found = run(logits, teacher, config)
    torch.testing.assert_close(result.rkl.double(), doubles(rows, "rkl"), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.loss.double(), doubles(rows, "loss"), rtol=1e-3, atol=1e-3)
    # R is of the order of `size`, so p (l - R) is known to float32's epsilon times that.
    atol = 1e-3 * float(gradient.abs().max()) + 4e-7 * size
    torch.testing.assert_close(found.double(), gradient, rtol=2e-3, atol=atol)


@pytest.mark.parametrize(
    "config", [DualKLConfig(), DualKLConfig(gating="hard"), JSD[0]], ids=["soft", "hard", "jsd"]
)
@pytest.mark.parametrize("kind", ["dense", "topk"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_impossible_tokens_give_finite_losses_and_gradients(
    kind: str, side: str, config: DualKLConfig
) -> None:
    logits, dense = random_logits(1), random_logits(2)
    if side != "teacher":
        logits[:, 100:200] = -math.inf
    if side != "student":
        dense[:, 100:250] = -math.inf
    teacher = {"logits": dense} if kind == "dense" else topk_of(dense)
    result, found = run(logits, teacher, config)
    assert found.isfinite().all()
    assert result.loss.isfinite().all()
    assert result.gate.isfinite().all()
    if config in JSD:
        assert (result.loss < 0.4).all()
    elif kind == "dense" and side == "teacher":
        assert (result.gate == 0).all()


def test_a_dense_teachers_impossible_tokens_close_the_gate_and_leave_forward_kl() -> None:
    logits, dense = random_logits(1), random_logits(2)
    dense[:, 100:] = -math.inf
    gradient = logits.softmax(1) - dense.softmax(1)
    result, found = run(logits, {"logits": dense}, DualKLConfig())
    torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-7)
    assert (result.rkl > 1e20).all()


@pytest.mark.parametrize("config", [DualKLConfig(), JSD[0]], ids=["gated", "jsd"])
@pytest.mark.parametrize("k", [1, K, V - 1, V])
def test_any_number_of_kept_ids_gives_the_oracles_gradient(k: int, config: DualKLConfig) -> None:
    logits, teacher = random_logits(1), topk_of(random_logits(2), k)
    rows, gradient = expected(logits, teacher, config)
    result, found = run(logits, teacher, config, torch.float64)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.rkl, doubles(rows, "rkl"), rtol=1e-9, atol=1e-12)


def test_a_tail_below_the_floor_is_floored_renormalised_and_reported() -> None:
    teacher = anchored(math.log(1e-12))
    logits = peaked(math.log(1e-3))
    config = DualKLConfig(gating="fixed", mix=0.5, tail_floor=1e-4)
    rows, gradient = expected(logits, teacher, config)
    result, found = run(logits, teacher, config, torch.float64)
    assert result.floored is not None
    assert result.floored.tolist() == [True]
    assert math.isclose(result.rkl[0], rows[0]["rkl"], rel_tol=1e-9)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-15)
    unfloored, _ = run(logits, anchored(math.log(1e-3)), config, torch.float64)
    assert unfloored.floored is not None
    assert unfloored.floored.tolist() == [False]


def test_keeping_all_ids_is_never_floored() -> None:
    result, _ = run(random_logits(1), topk_of(random_logits(2), V), DualKLConfig())
    assert result.floored is not None
    assert not result.floored.any()


def test_a_row_without_kept_ids_contributes_nothing() -> None:
    teacher = topk_of(random_logits(2))
    teacher["ids"][2], teacher["logprobs"][2], teacher["log_tail_mass"][2] = -1, math.nan, math.nan
    for config in CONFIGS:
        result, found = run(random_logits(1), teacher, config, torch.float64)
        assert result.rkl[2] == result.fkl[2] == result.loss[2] == 0
        assert (found[2] == 0).all()
        assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_student_logprobs_are_those_of_the_sampled_ids(kind: str) -> None:
    logits = random_logits(1)
    teacher = {"logits": random_logits(2)} if kind == "dense" else topk_of(random_logits(2))
    if "ids" in teacher:
        teacher["ids"][3] = -1
    ids = samples(logits).ids
    result, _ = run(logits, teacher, DualKLConfig(), torch.float64)
    assert result.student_logprobs is not None
    wanted = torch.stack([reference.log_softmax(logits[n])[ids[n]] for n in range(N)])
    torch.testing.assert_close(result.student_logprobs, wanted)


def test_without_a_gradient_scale_no_gradient_is_computed() -> None:
    teacher, z = random_logits(2), random_logits(1)
    with_gradient, _ = run(z, {"logits": teacher}, DualKLConfig(), torch.float64)
    without = dense_step(z.clone(), teacher.clone(), None, None, DualKLConfig())
    assert torch.equal(with_gradient.loss, without.loss)
    assert without.student_logprobs is None
