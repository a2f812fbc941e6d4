"""CUDA kernels on a CPU, under Triton's interpreter, against the float64 oracles.

Not collected by itself: `tests/dualkl/test_kernels.py` runs it in its own process with TRITON_INTERPRET=1.
Triton reads that variable when a kernel is defined, and it would affect all other uses of Triton.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dualkl import DualKLConfig, LogitsTeacher, TopKTeacher, dual_kl, kernels
from dualkl.chunks import Positions, StepResult
from dualkl.heads import PreparedHead
from dualkl.kernels import fused
from tests.dualkl.test_chunks import (
    CONFIGS,
    K,
    anchored,
    doubles,
    expected,
    peaked,
    random_logits,
    samples,
    topk_of,
)
from tests.dualkl.test_losses import GATED, Case, N, V, gate_inputs, gradients, relative_error
from tests.support.thinning import leading, thinned

KINDS = ["dense", "topk"]
LANES = 64
calls: list[str] = []


@pytest.fixture(autouse=True)
def _kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run all dtypes but float64 in the kernels, in tiles of 256 columns; fail tests that launch none."""

    def counted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(function.__name__)
            return function(*args)

        return call

    calls.clear()
    monkeypatch.setattr(kernels, "usable", lambda hidden, teacher, config: hidden.dtype != torch.float64)
    monkeypatch.setattr(fused, "dense_rows", counted(fused.dense_rows))
    monkeypatch.setattr(fused, "topk_rows", counted(fused.topk_rows))
    monkeypatch.setattr(fused.DENSE, "lanes", LANES)
    monkeypatch.setattr(fused.SPARSE, "lanes", LANES)
    yield
    assert calls


def run(
    logits: Tensor, teacher: dict[str, Tensor], config: DualKLConfig, dtype: torch.dtype = torch.bfloat16
) -> tuple[StepResult, Tensor]:
    """The kernel's result and the gradient of the summed losses, in `dtype`; padding is NaN."""
    num_rows, num_ids = logits.shape
    sampled, head = samples(logits), PreparedHead(torch.empty(0), None, 1.0, None, torch.float32)
    buffer = torch.full((num_rows, fused.padded(num_ids)), math.nan)
    buffer[:, :num_ids] = logits
    sampled.ids.remainder_(num_ids)
    chunk = Positions(torch.empty(0), torch.ones(num_rows), None, sampled)
    gradient = buffer.to(dtype)[:, :num_ids]
    out = torch.full((7, num_rows), math.nan)
    if "ids" in teacher:
        columns = TopKTeacher(**teacher)
        fused.topk_rows(buffer, head, columns, slice(0, num_rows), chunk, config, gradient, num_ids, out)
    else:
        dense = teacher["logits"].float()
        out = out[:5]
        fused.dense_rows(buffer, head, dense, None, chunk, config, gradient, num_ids, out)
    return fused._result(out, chunk), gradient


def teacher_of(kind: str, logits: Tensor, k: int = K) -> dict[str, Tensor]:
    return {"logits": logits} if kind == "dense" else topk_of(logits, k)


def check(
    result: StepResult, found: Tensor, rows: list[dict[str, Any]], gradient: Tensor, bound: float
) -> None:
    for column in ("rkl", "fkl"):
        torch.testing.assert_close(
            getattr(result, column).double(), doubles(rows, column), rtol=1e-3, atol=3e-6
        )
    torch.testing.assert_close(result.gate.double(), doubles(rows, "gate"), rtol=0, atol=1e-3)
    assert relative_error(found, gradient) < bound


@pytest.mark.parametrize(("full_head", "kind"), thinned(5, [False, True], ["logits", "hidden", "topk"]))
def test_value_and_gradient_are_the_oracles(kind: str, full_head: bool) -> None:
    """All methods, ragged and empty top-k rows, and an upstream gradient other than 1."""
    case = Case(full_head, 1.7 if full_head else 1.0, 491 if full_head else None, torch.float32)
    for method in GATED if full_head and kind != "hidden" else [GATED[i] for i in (0, 3, 6, -1)]:
        config = case.config(**method, mix=0.3)
        found, wanted = case.run(kind, config, chunk_rows=3), case.oracle(kind, config)
        torch.testing.assert_close(found.loss.double(), wanted["loss"], rtol=1e-5, atol=3e-6)
        for column in ("rkl", "fkl", "gate"):
            torch.testing.assert_close(getattr(found, column).double(), wanted[column], rtol=1e-5, atol=2e-6)
        pairs = zip(
            gradients(found.loss * -2.5, case.leaves), gradients(wanted["loss"], case.leaves), strict=True
        )
        assert max(relative_error(f, -2.5 * w) for f, w in pairs) < 1e-5, method


@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_thresholds_are_taken_per_position(kind: str) -> None:
    case, inputs = Case(dtype=torch.float32), {"tau": gate_inputs(torch.float32)["tau"]}
    config = case.config()
    found, wanted = case.run(kind, config, chunk_rows=3, **inputs), case.oracle(kind, config, **inputs)
    torch.testing.assert_close(found.gate.double(), wanted["gate"], rtol=1e-5, atol=2e-6)
    pairs = zip(gradients(found.loss, case.leaves), gradients(wanted["loss"], case.leaves), strict=True)
    assert max(relative_error(f, w) for f, w in pairs) < 1e-5


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_positions_of_weight_0_have_no_gradient_even_when_broken(kind: str) -> None:
    case = Case(full_head=True, dtype=torch.float32)
    case.weights[1] = case.weights[5] = 0
    config = case.config(rkl="mc")
    wanted = case.run(kind, config)
    wanted_gradients = gradients(wanted.loss, case.leaves)
    with torch.no_grad():
        for tensor in (case.hidden, case.teacher_hidden, case.teacher_logits):
            tensor[1], tensor[5] = math.nan, math.inf
    case.topk["ids"][1], case.topk["logprobs"][1], case.topk["log_tail_mass"][1] = 77, math.nan, math.nan
    case.topk["ids"][5], case.topk["log_tail_mass"][5] = 99_999, math.inf
    for column, value in (("ids", -100), ("teacher_logprobs", math.nan), ("behaviour_logprobs", -math.inf)):
        case.samples[column][1] = case.samples[column][5] = value
    found = case.run(kind, config, chunk_rows=4)
    found_gradients = gradients(found.loss, case.leaves)
    for column in ("rkl", "fkl", "gate", "student_logprobs"):
        assert (getattr(found, column)[[1, 5]] == 0).all()
    assert (found_gradients[0][[1, 5]] == 0).all()
    torch.testing.assert_close(found.loss, wanted.loss)
    for a, b in zip(found_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_a_broken_position_that_counts_is_not_hidden(kind: str) -> None:
    case = Case(dtype=torch.float32)
    with torch.no_grad():
        case.hidden[2] = math.nan
    assert case.run(kind, case.config()).loss.isnan()


def test_an_id_outside_the_vocabulary_touches_nothing_and_gives_nan() -> None:
    teacher = topk_of(random_logits(2))
    teacher["ids"][3, 1] = V + 40
    result, found = run(random_logits(1), teacher, DualKLConfig())
    others = [n for n in range(N) if n != 3]
    assert result.loss[3].isnan()
    assert result.loss[others].isfinite().all()
    assert found[others].isfinite().all()


def test_what_it_reports_besides_the_loss_is_the_plain_paths() -> None:
    found, wanted = (
        (case := Case(True, 1.3, 491, dtype)).run("topk", case.config())
        for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(found.floored, wanted.floored)
    for column in ("student_logprobs", "student_log_tail_mass"):
        torch.testing.assert_close(
            getattr(found, column).double(), getattr(wanted, column), rtol=1e-5, atol=2e-6
        )


@pytest.mark.parametrize(("config", "kind"), thinned(3, CONFIGS[4:8], KINDS))
def test_a_bfloat16_gradient_is_the_oracles(kind: str, config: DualKLConfig) -> None:
    """The bound is doubled: the interpreter truncates float32 to bfloat16, where a GPU rounds."""
    logits, teacher = random_logits(1, rows=2), teacher_of(kind, random_logits(2, rows=2))
    check(*run(logits, teacher, config), *expected(logits.float().double(), teacher, config), bound=2**-7)


@pytest.mark.parametrize(
    ("pair", "kind"), thinned(5, ["near", "nearer", "peaked", "shifted", "far", "extreme"], KINDS)
)
def test_statistics_keep_their_digits(kind: str, pair: str) -> None:
    """R and F within 3e-6 nats + 0.1 % of float64 on the same float32 logits, the gate within 1e-3."""
    z, noise = random_logits(1, 3.0), random_logits(2, 1.0)
    z, t = {
        "near": (z, z + 0.03 * noise),
        "nearer": (z, z + 0.01 * noise),
        "peaked": (z * 8, z * 8 + 0.03 * noise),
        "shifted": (z + 30, z + 0.02 * noise - 40),
        "far": (z * 2, random_logits(3, 6.0)),
        "extreme": (torch.where(noise > 1.9, 80.0, -80.0) + z, torch.where(z > 5, 80.0, -80.0) + noise),
    }[pair]
    z, t = z.float().double(), t.float().double()
    config, teacher = (
        DualKLConfig(tau=0.01, alpha=300.0) if "near" in pair else DualKLConfig(),
        teacher_of(kind, t),
    )
    rows, gradient = expected(z, teacher, config)
    result, found = run(z, teacher, config, torch.float32)
    if pair in ("near", "nearer"):
        assert 1e-6 < float(doubles(rows, "rkl").median()) < 1e-3
    check(result, found, rows, gradient, bound=1e-3 if pair == "nearer" else 2e-4)


@pytest.mark.parametrize("kind", leading(1, ["topk", "dense"]))
def test_a_real_vocabulary_keeps_its_digits(kind: str) -> None:
    fused.DENSE.lanes = fused.SPARSE.lanes = 1024
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 151_936, generator=generator) * torch.tensor([[1.0], [4.0]])
    t = z + 0.03 * torch.randn(2, 151_936, generator=generator)
    logp, logq = z.double().log_softmax(1), t.double().log_softmax(1)
    teacher: dict[str, Tensor] = {"logits": t}
    if kind == "topk":
        logprobs, ids = logq.topk(64, dim=1)
        logp = torch.stack([*logp.gather(1, ids).unbind(1), logp.scatter(1, ids, -math.inf).logsumexp(1)], 1)
        tail = logq.scatter(1, ids, -math.inf).logsumexp(1)
        logq = torch.cat([logprobs, tail[:, None]], 1)
        teacher = {"ids": ids.int(), "logprobs": logprobs.float(), "log_tail_mass": tail.float()}
    result, _ = run(z, teacher, DualKLConfig())
    torch.testing.assert_close(result.rkl.double(), (logp.exp() * (logp - logq)).sum(1), rtol=1e-3, atol=2e-6)
    torch.testing.assert_close(result.fkl.double(), (logq.exp() * (logq - logp)).sum(1), rtol=1e-3, atol=2e-6)


def test_a_student_equal_to_its_teacher_has_loss_0_and_gradient_0() -> None:
    logits = random_logits(1).float()
    result, found = run(logits, {"logits": logits.clone()}, DualKLConfig())
    assert (result.loss == 0).all()
    assert found.abs().max() < 1e-7


@pytest.mark.parametrize("tail", [1e-6, 1e-14, 1e-52])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_a_students_tiny_tail_keeps_its_gradient(tail: float, mix: float) -> None:
    config = DualKLConfig(gating="fixed", mix=mix)
    logits, teacher = peaked(math.log(tail)).float().double(), anchored(math.log(1e-3))
    rows, gradient = expected(logits, teacher, config)
    result, found = run(logits, teacher, config, torch.float32)
    assert math.isclose(result.rkl[0], rows[0]["rkl"], rel_tol=1e-4)
    assert math.isclose(result.fkl[0], rows[0]["fkl"], rel_tol=1e-4)
    for ids in (slice(0, K), slice(K, V)):
        scale = max(float(gradient[0, ids].norm()), 1e-30)
        assert float((found.double() - gradient)[0, ids].norm()) <= 2e-5 * scale + 1e-9 * float(mix > 0)


@pytest.mark.parametrize(
    ("side", "kind", "config"),
    thinned(
        5,
        ["student", "teacher", "both"],
        KINDS,
        [DualKLConfig(), DualKLConfig(gating="hard"), DualKLConfig(gating="fixed")],
    ),
)
def test_impossible_tokens_give_the_plain_paths_numbers(kind: str, side: str, config: DualKLConfig) -> None:
    from tests.dualkl.test_chunks import run as run_plain

    logits, dense = random_logits(1), random_logits(2)
    if side != "teacher":
        logits[:, 100:300] = -math.inf
    if side != "student":
        dense[:, 100:350] = -math.inf
    teacher = teacher_of(kind, dense)
    result, found = run(logits, teacher, config, torch.float32)
    plain, wanted = run_plain(logits, teacher, config)
    assert found.isfinite().all()
    for column in ("rkl", "fkl", "gate", "loss", "student_logprobs"):
        torch.testing.assert_close(getattr(result, column), getattr(plain, column), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("k", leading(2, [1, V, V - 1]))
def test_any_number_of_kept_ids_gives_the_oracles_gradient(k: int) -> None:
    logits, teacher = random_logits(1), topk_of(random_logits(2), k)
    check(
        *run(logits, teacher, DualKLConfig(), torch.float32),
        *expected(logits, teacher, DualKLConfig()),
        bound=1e-5,
    )


def test_a_tail_below_the_floor_is_floored_and_reported_and_a_full_row_is_not() -> None:
    config = DualKLConfig(gating="fixed", mix=0.5, tail_floor=1e-4)
    logits, teacher = peaked(math.log(1e-3)), anchored(math.log(1e-12))
    result, found = run(logits, teacher, config, torch.float32)
    rows, gradient = expected(logits, teacher, config)
    check(result, found, rows, gradient, bound=1e-5)
    assert result.floored is not None
    assert result.floored.bool().tolist() == [True]
    full, _ = run(random_logits(1), topk_of(random_logits(2), V), config)
    assert full.floored is not None
    assert not full.floored.any()


def test_a_row_without_kept_ids_contributes_nothing() -> None:
    teacher = topk_of(random_logits(2))
    teacher["ids"][2], teacher["logprobs"][2], teacher["log_tail_mass"][2] = -1, math.nan, math.nan
    for config in CONFIGS[4:8]:
        result, found = run(random_logits(1), teacher, config)
        assert result.rkl[2] == result.fkl[2] == result.loss[2] == 0
        assert (found[2] == 0).all()
        assert found.isfinite().all()


def test_the_teachers_first_most_likely_id_is_taken_on_ties() -> None:
    logits, dense = random_logits(1), random_logits(2)
    dense[:, [499, 170, 33]] = 20.0
    config = DualKLConfig(fkl="argmax", gating="fixed", mix=0.0)
    check(
        *run(logits, {"logits": dense}, config, torch.float32),
        *expected(logits, {"logits": dense}, config),
        1e-5,
    )


def test_without_gradients_the_loss_is_the_same_and_the_teachers_logits_are_not_changed() -> None:
    case = Case(dtype=torch.float32)
    logits = torch.randn(N, 600)[:, :V].bfloat16()
    kept = logits.clone()
    wanted = dual_kl(case.hidden, case.weight, LogitsTeacher(logits), case.config()).loss
    with torch.no_grad():
        found = dual_kl(case.hidden, case.weight, LogitsTeacher(logits), case.config()).loss
    assert torch.equal(found, wanted.detach())
    assert torch.equal(logits, kept)
    transposed = LogitsTeacher(logits.T.contiguous().T)
    assert torch.equal(dual_kl(case.hidden, case.weight, transposed, case.config()).loss, wanted)
