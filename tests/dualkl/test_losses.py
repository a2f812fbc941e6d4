"""`dual_kl` against its float64 oracle, its invariances, and the surroundings it has to work in."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dualkl import (
    DualKLConfig,
    DualKLOutput,
    Head,
    HiddenTeacher,
    LogitsTeacher,
    Sampled,
    Teacher,
    TopKTeacher,
    dual_kl,
)
from tests.support import reference

N, K, V, d, D = 7, 5, 503, 16, 24
PAD_S, PAD_T, CUT = 503, 511, 491


class Case:
    """Tensors of one comparison: a student, its head, three forms of one teacher, sampled tokens, weights."""

    def __init__(
        self,
        full_head: bool = False,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float64,
        distance: float = 1.0,
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        generator = torch.Generator().manual_seed(11)
        self.vocab_size, self.temperature = vocab_size, temperature
        size = V if vocab_size is None else PAD_T
        self.hidden = normal(N, d).to(dtype).requires_grad_()
        self.weight = (normal(V, d) * 0.6).to(dtype).requires_grad_()
        self.bias = (normal(V) * 0.5).to(dtype).requires_grad_() if full_head else None
        self.shape = {"scale": 0.8, "softcap": 6.0} if full_head else {"scale": 1.0, "softcap": None}
        self.teacher_hidden = torch.cat([self.hidden.detach().double(), normal(N, D - d)], 1).to(dtype)
        base = torch.zeros(size, D, dtype=torch.float64)
        base[:V, :d] = self.weight.detach().double()
        self.teacher_weight = (base + 0.3 * distance * normal(size, D)).to(dtype)
        self.teacher_head = {"weight": self.teacher_weight, "scale": 0.9, "softcap": 8.0}
        self.teacher_logits = reference.head_logits(self.teacher_hidden, self.teacher_head)
        num_ids = V if vocab_size is None else vocab_size
        scaled = self.teacher_logits[:, :num_ids] / temperature
        self.sampled_ids = torch.randint(0, num_ids, (N,), generator=generator)
        teacher_logprobs = torch.stack(
            [reference.log_softmax(t)[y] for t, y in zip(scaled, self.sampled_ids, strict=True)]
        )
        self.samples = {
            "ids": self.sampled_ids,
            "teacher_logprobs": teacher_logprobs,
            "behaviour_logprobs": -torch.rand(N, generator=generator, dtype=torch.float64) * 9,
        }
        self.weights = torch.rand(N, generator=generator, dtype=torch.float64)
        self.topk = self.ragged_topk(scaled)

    def ragged_topk(self, logits: Tensor) -> dict[str, Tensor]:
        """K kept ids a row, but one row keeps 2 and one none."""
        ids, logprobs, tails = reference.compress(logits, K)
        short_ids, short_logprobs, short_tails = reference.compress(logits[1:2], 2)
        ids[1], logprobs[1], tails[1] = (
            short_ids[0] + [-1] * 3,
            short_logprobs[0] + [-math.inf] * 3,
            short_tails[0],
        )
        ids[4], logprobs[4], tails[4] = [-1] * K, [-math.inf] * K, 0.0
        columns = {"ids": torch.tensor(ids), "logprobs": torch.tensor(logprobs).double()}
        return columns | {"log_tail_mass": torch.tensor(tails).double()}

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.shape["scale"] or 1.0, self.shape["softcap"])

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    @property
    def sampled(self) -> Sampled:
        return Sampled(**self.samples)

    def teacher(self, kind: str) -> Teacher:
        if kind == "logits":
            return LogitsTeacher(
                self.teacher_logits if self.hidden.dtype == torch.float64 else self.teacher_logits.float()
            )
        if kind == "hidden":
            return HiddenTeacher(self.teacher_hidden, Head(self.teacher_weight, None, 0.9, 8.0))
        return TopKTeacher(**self.topk, temperature=self.temperature)

    def config(self, **changes: Any) -> DualKLConfig:
        return DualKLConfig(
            **(
                {"tau": 0.8, "alpha": 2.0, "temperature": self.temperature, "vocab_size": self.vocab_size}
                | changes
            )
        )

    def run(self, kind: str, config: DualKLConfig, **options: Any) -> DualKLOutput:
        options = {"sampled": self.sampled, "weights": self.weights} | options
        return dual_kl(self.hidden, self.head, self.teacher(kind), config, **options)

    def oracle(self, kind: str, config: DualKLConfig, **gate_inputs: Tensor) -> dict[str, Tensor]:
        forms: dict[str, dict[str, Any]] = {
            "logits": {"logits": self.teacher_logits},
            "hidden": {"hidden": self.teacher_hidden, "head": self.teacher_head},
            "topk": self.topk,
        }
        head = {"weight": self.weight, "bias": self.bias} | self.shape
        return reference.dual_kl(
            self.hidden, head, forms[kind], config, self.samples, self.weights, **gate_inputs
        )


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


GATED: list[dict[str, Any]] = [
    {"gating": gating, "rkl": rkl, "fkl": fkl}
    for gating, rkl, fkl in itertools.product(("soft", "hard", "fixed"), ("exact", "mc"), ("full", "argmax"))
]
METHODS = [
    *GATED,
    {"gating": "soft", "gate_on": "fkl"},
    {"gating": "soft", "gate_on": "teacher_entropy", "alpha": 0.7},
    {"gating": "soft", "gate_on": "teacher_entropy", "alpha": 0.7, "teacher_smoothing": 0.3},
    {"gating": "hard", "rkl": "mc", "teacher_smoothing": 0.01},
    {"gating": "fixed", "fkl": "argmax", "teacher_smoothing": 0.01},
    {"gating": "fixed", "objective": "jsd", "teacher_smoothing": 0.05},
    {"gating": "fixed", "objective": "jsd"},
]


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
@pytest.mark.parametrize("full_head", [False, True], ids=["weight", "bias+scale+softcap"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("vocab_size", [None, CUT])
def test_value_and_gradient_are_the_oracles(
    kind: str, full_head: bool, temperature: float, vocab_size: int | None
) -> None:
    case = Case(full_head, temperature, vocab_size)
    median = float(case.run(kind, case.config(gating="fixed")).rkl.median())
    for method in METHODS:
        config = case.config(**method, mix=0.3, tau=1.01 * median)
        wanted = case.oracle(kind, config)
        smoothed = config.teacher_smoothing > 0
        assert config.gating != "hard" or smoothed or wanted["gate"].unique().tolist() == [0, 1]
        assert config.gate_on == "rkl" or wanted["gate"].unique().numel() >= N - 2
        found = case.run(kind, config, chunk_rows=3)
        torch.testing.assert_close(found.loss, wanted["loss"], rtol=1e-9, atol=1e-12)
        for name in ("rkl", "fkl", "gate"):
            torch.testing.assert_close(getattr(found, name), wanted[name], rtol=1e-8, atol=1e-12)
            assert not getattr(found, name).requires_grad
        pairs = zip(gradients(found.loss, case.leaves), gradients(wanted["loss"], case.leaves), strict=True)
        assert max(relative_error(f, w) for f, w in pairs) < 1e-9, method


def gate_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A threshold and an entropy for each position."""
    return {
        "tau": torch.linspace(-0.5, 3, N, dtype=dtype),
        "teacher_entropy": torch.linspace(2, 0.1, N, dtype=dtype),
    }


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
@pytest.mark.parametrize("method", [{"gate_on": "rkl"}, {"gate_on": "teacher_entropy"}, {"gating": "hard"}])
def test_thresholds_and_entropies_are_taken_per_position(kind: str, method: dict[str, str]) -> None:
    case, inputs = Case(full_head=True), gate_inputs()
    config = case.config(**method)
    found, wanted = case.run(kind, config, chunk_rows=3, **inputs), case.oracle(kind, config, **inputs)
    torch.testing.assert_close(found.gate, wanted["gate"], rtol=1e-9, atol=1e-12)
    pairs = zip(gradients(found.loss, case.leaves), gradients(wanted["loss"], case.leaves), strict=True)
    assert max(relative_error(f, w) for f, w in pairs) < 1e-9


@pytest.mark.parametrize("kind", ["logits", "topk"])
@pytest.mark.parametrize("gating", ["soft", "hard"])
def test_one_threshold_for_all_is_the_same_however_it_is_given(kind: str, gating: str) -> None:
    case = Case()
    wanted = case.run(kind, case.config(gating=gating, tau=0.9))
    for tau in (0.9, torch.tensor(0.9, dtype=torch.float64), torch.full((N,), 0.9, dtype=torch.float64)):
        found = case.run(kind, case.config(gating=gating, tau=7.0), tau=tau)
        assert torch.equal(found.loss, wanted.loss)
        assert torch.equal(found.gate, wanted.gate)


def test_a_threshold_is_not_differentiated_and_may_be_anything_where_the_weight_is_0() -> None:
    case, inputs = Case(), gate_inputs()
    case.weights[2] = 0
    config = case.config(gate_on="teacher_entropy")
    wanted = gradients(case.run("topk", config, **inputs).loss, case.leaves)
    for column in inputs.values():
        column[2] = math.nan
        column.requires_grad_()
    out = case.run("topk", config, **inputs)
    out.loss.backward()
    assert out.gate[2] == 0
    assert inputs["tau"].grad is None
    for leaf, gradient in zip(case.leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_a_smoothed_teacher_bounds_the_reverse_kl(kind: str) -> None:
    """q >= ε / V makes R <= ln V - ln ε - H(p); ε = 0 changes nothing."""
    case = Case(distance=30.0)
    sharp = case.run(kind, case.config())
    smooth = case.run(kind, case.config(teacher_smoothing=0.1))
    assert torch.equal(sharp.loss, case.run(kind, case.config(teacher_smoothing=0.0)).loss)
    assert (smooth.rkl < math.log(V / 0.1)).all()
    assert (smooth.rkl <= sharp.rkl + 0.1 * math.log(V)).all()
    assert smooth.floored.sum() <= sharp.floored.sum()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ({"gating": "fixed"}, {"tau": torch.tensor(1.0)}, "tau was given, but gating is 'fixed'"),
        ({"gating": "fixed"}, {"tau": 1.0}, "tau was given, but gating is 'fixed'"),
        ({}, {"tau": torch.ones(N + 1)}, "tau has shape [8]; expected [7]."),
        ({}, {"tau": -1.0}, "tau is -1.0; expected a number of nats >= 0."),
        ({}, {"tau": torch.ones((), device="meta")}, "tau is on meta, the hidden states are on cpu"),
        ({}, {"teacher_entropy": torch.ones(())}, "teacher_entropy has shape []; expected [7]."),
    ],
)
def test_a_gate_input_that_does_not_fit_is_refused(
    method: dict[str, str], options: dict[str, Any], message: str
) -> None:
    case = Case()
    with pytest.raises(ValueError, match=re.escape(message)):
        case.run("logits", case.config(**method), **options)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_the_oracle_on_the_same_inputs(kind: str, dtype: torch.dtype) -> None:
    case = Case(full_head=True, dtype=dtype)
    config = case.config()
    found, wanted = case.run(kind, config), case.oracle(kind, config)
    for name in ("rkl", "fkl"):
        torch.testing.assert_close(getattr(found, name).double(), wanted[name], atol=3e-6, rtol=1e-3)
    torch.testing.assert_close(found.gate.double(), wanted["gate"], atol=1e-3, rtol=0)
    assert found.rkl.dtype == found.loss.dtype == torch.float32
    leaves = gradients(found.loss, case.leaves)
    assert all(leaf.dtype == dtype for leaf in leaves)
    bound = 2**-8 + 1e-3 if dtype == torch.bfloat16 else 1e-5
    pairs = zip(leaves, gradients(wanted["loss"], case.leaves), strict=True)
    assert max(relative_error(f, w) for f, w in pairs) < bound


@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_finite_differences_agree_with_the_gradient(kind: str) -> None:
    case = Case(full_head=True)
    for method in ({}, {"fkl": "argmax"}, {"objective": "jsd"}):
        config = case.config(gating="fixed", mix=0.4, **method)

        def loss(hidden: Tensor, bias: Tensor, config: DualKLConfig = config) -> Tensor:
            head = Head(case.weight, bias, 0.8, 6.0)
            return dual_kl(hidden, head, case.teacher(kind), config, weights=case.weights).loss

        assert torch.autograd.gradcheck(loss, (case.hidden, case.bias), fast_mode=True)


def test_an_undetached_gate_would_be_noticed() -> None:
    case = Case()
    config = case.config(alpha=5.0, tau=0.6)
    hidden = case.hidden
    logits = reference.head_logits(hidden, {"weight": case.weight})
    loss = torch.zeros(())
    for n in range(N):
        logp, logq = reference.log_softmax(logits[n]), reference.log_softmax(case.teacher_logits[n])
        rkl, fkl = reference.kl(logp, logq), reference.kl(logq, logp)
        gate = torch.sigmoid(config.alpha * (config.tau - rkl))
        loss = loss + case.weights[n] * (gate * rkl + (1 - gate) * fkl)
    found = case.run("logits", config).loss
    torch.testing.assert_close(found, loss, check_dtype=False)
    assert relative_error(gradients(found, [hidden])[0], gradients(loss, [hidden])[0]) > 0.05


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_the_gate_at_0_and_1_leaves_pure_forward_and_pure_reverse_kl(kind: str) -> None:
    case = Case()
    for mix, name in ((0.0, "fkl"), (1.0, "rkl")):
        out = case.run(kind, case.config(gating="fixed", mix=mix))
        torch.testing.assert_close(out.loss.detach(), (case.weights * getattr(out, name)).sum())
    always = case.run(kind, case.config(gating="hard", tau=1e9))
    pure = case.run(kind, case.config(gating="fixed", mix=1.0))
    assert torch.equal(gradients(always.loss, [case.hidden])[0], gradients(pure.loss, [case.hidden])[0])


@pytest.mark.parametrize("kind", ["logits", "topk"])
def test_jensen_shannon_tends_to_the_two_divergences(kind: str) -> None:
    """JSD / β tends to the forward KL and JSD / (1 - β) to the reverse KL; the gate column is β."""
    case = Case()
    for beta, name in ((1e-7, "fkl"), (1 - 1e-7, "rkl")):
        out = case.run(kind, case.config(gating="fixed", objective="jsd", mix=beta))
        loss = float(out.loss.detach()) / min(beta, 1 - beta)
        assert math.isclose(loss, float((case.weights * getattr(out, name)).sum()), rel_tol=1e-5)
        assert (out.gate == beta).all()
        assert torch.equal(out.rkl, case.run(kind, case.config()).rkl)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_student_equal_to_its_teacher_has_loss_0(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    for method in ({"gating": "soft"}, {"gating": "hard"}, {"gating": "fixed"}, METHODS[-1]):
        out = dual_kl(
            case.hidden, case.weight, HiddenTeacher(case.hidden, case.weight), case.config(**method)
        )
        assert out.loss.item() == 0
        assert gradients(out.loss, [case.hidden])[0].abs().max() < 1e-8


def test_topk_with_all_ids_equals_the_dense_teacher() -> None:
    case = Case()
    ids, logprobs, tails = reference.compress(case.teacher_logits, V)
    teacher = TopKTeacher(torch.tensor(ids), torch.tensor(logprobs).double(), torch.tensor(tails).double())
    for method in METHODS:
        config = case.config(**method)
        kept = dual_kl(case.hidden, case.head, teacher, config, case.sampled, case.weights)
        dense = case.run("logits", config)
        torch.testing.assert_close(kept.loss, dense.loss)
        for a, b in zip(gradients(kept.loss, case.leaves), gradients(dense.loss, case.leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_chunks_do_not_change_the_result(kind: str) -> None:
    case = Case(dtype=torch.float32)
    config = case.config(rkl="mc", importance_cap=2.0)
    whole = case.run(kind, config)
    wanted = gradients(whole.loss, case.leaves)
    for chunk_rows in (1, 2, 3, 5, 6):
        parts = case.run(kind, config, chunk_rows=chunk_rows)
        torch.testing.assert_close(parts.loss, whole.loss)
        for a, b in zip(gradients(parts.loss, case.leaves), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_the_order_of_positions_does_not_matter(kind: str) -> None:
    case = Case()
    config, order = case.config(rkl="mc"), torch.tensor([3, 0, 6, 1, 5, 4, 2])
    wanted = case.run(kind, config)
    gradient = gradients(wanted.loss, [case.hidden])[0]
    case.hidden = case.hidden.detach()[order].requires_grad_()
    case.teacher_hidden, case.weights = case.teacher_hidden[order], case.weights[order]
    case.samples = {name: column[order] for name, column in case.samples.items()}
    case.topk = {name: column[order] for name, column in case.topk.items()}
    found = case.run(kind, config, chunk_rows=2)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.rkl, wanted.rkl[order])
    torch.testing.assert_close(gradients(found.loss, [case.hidden])[0], gradient[order])


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_positions_of_weight_0_are_as_if_absent_even_when_broken(kind: str) -> None:
    case = Case(full_head=True)
    off = torch.tensor([False, True, False, False, False, True, False])
    keep = ~off
    case.weights[off] = 0
    config = case.config(rkl="mc")
    with torch.no_grad():
        for tensor in (case.hidden, case.teacher_hidden, case.teacher_logits):
            tensor[1], tensor[5] = math.nan, math.inf
        case.topk["ids"][1], case.topk["logprobs"][1], case.topk["log_tail_mass"][1] = 77, math.nan, math.nan
        case.topk["ids"][5], case.topk["log_tail_mass"][5] = 99_999, math.inf
        case.samples["ids"][off], case.samples["teacher_logprobs"][off] = -100, math.nan
        case.samples["behaviour_logprobs"][off] = -math.inf
    found = case.run(kind, config, chunk_rows=4)
    found_gradients = gradients(found.loss, case.leaves)
    for name in ("rkl", "fkl", "gate", "student_logprobs"):
        assert (getattr(found, name)[off] == 0).all()
    assert (found_gradients[0][off] == 0).all()
    case.hidden = case.hidden.detach()[keep].requires_grad_()
    case.teacher_hidden, case.teacher_logits = case.teacher_hidden[keep], case.teacher_logits[keep]
    case.weights = case.weights[keep]
    case.samples = {name: column[keep] for name, column in case.samples.items()}
    case.topk = {name: column[keep] for name, column in case.topk.items()}
    wanted = case.run(kind, config)
    wanted_gradients = gradients(wanted.loss, case.leaves)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found_gradients[0][keep], wanted_gradients[0])
    for a, b in zip(found_gradients[1:], wanted_gradients[1:], strict=True):
        torch.testing.assert_close(a, b)


def test_a_broken_position_that_counts_is_not_hidden() -> None:
    case = Case()
    with torch.no_grad():
        case.hidden[2] = math.nan
    assert case.run("logits", case.config()).loss.isnan()


def test_weights_default_to_the_mean_and_are_not_differentiated() -> None:
    case = Case()
    default = case.run("logits", case.config(), weights=None).loss
    torch.testing.assert_close(
        default, case.run("logits", case.config(), weights=torch.full((N,), 1 / N).double()).loss
    )
    weights = case.weights.clone().requires_grad_()
    case.run("logits", case.config(), weights=weights).loss.backward()
    assert weights.grad is None


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_no_positions_give_a_loss_of_0_attached_to_both_inputs(kind: str) -> None:
    hidden = torch.empty(0, d, requires_grad=True)
    weight = torch.randn(V, d, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    teachers: dict[str, Teacher] = {
        "logits": LogitsTeacher(torch.empty(0, V)),
        "hidden": HiddenTeacher(torch.empty(0, D), torch.randn(V, D)),
        "topk": TopKTeacher(none.reshape(0, K), torch.empty(0, K), torch.empty(0)),
    }
    sampled = Sampled(none, torch.empty(0), torch.empty(0))
    out = dual_kl(hidden, weight, teachers[kind], DualKLConfig(rkl="mc"), sampled)
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.rkl.shape == out.gate.shape == out.floored.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, d)
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_the_sampled_estimates_mean_is_the_exact_gradient() -> None:
    """Every token y appears once, weighted by its probability μ(y) of being drawn: the mean is exact."""
    case = Case()
    behaviour = torch.randn(V, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log_softmax(0)
    teacher_logprobs = reference.log_softmax(case.teacher_logits[0])
    hidden = case.hidden.detach()[:1].expand(V, d).clone().requires_grad_()
    teacher = LogitsTeacher(case.teacher_logits[:1].expand(V, V))
    sampled = Sampled(torch.arange(V), teacher_logprobs, behaviour)
    for gating in ("soft", "fixed"):
        results = []
        for rkl in ("exact", "mc"):
            config = case.config(gating=gating, rkl=rkl, importance_cap=math.inf)
            out = dual_kl(hidden, case.weight, teacher, config, sampled, behaviour.exp())
            results.append((out.loss.detach(), *gradients(out.loss, [hidden, case.weight])))
        (exact, exact_hidden, exact_weight), (mc, mc_hidden, mc_weight) = results
        torch.testing.assert_close(mc, exact)
        torch.testing.assert_close(mc_hidden.sum(0), exact_hidden.sum(0))
        torch.testing.assert_close(mc_weight, exact_weight)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_backward_scales_with_the_upstream_gradient_and_may_run_twice(kind: str) -> None:
    case = Case(full_head=True)
    loss = case.run(kind, case.config()).loss
    once = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss * -2.5, case.leaves)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(a * -2.5, b)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    case = Case(full_head=True)
    wanted = gradients(case.run("hidden", case.config()).loss, [case.hidden])[0]
    case.weight.requires_grad_(False)
    assert case.bias is not None
    case.bias.requires_grad_(False)
    with _Recorder() as recorder:
        case.run("hidden", case.config()).loss.backward()
    assert case.weight.grad is None
    assert case.bias.grad is None
    assert "aten::addmm_" not in recorder.calls
    torch.testing.assert_close(case.hidden.grad, wanted)


def test_a_trained_head_over_frozen_hidden_states_gets_its_gradient() -> None:
    case = Case()
    wanted = gradients(case.run("topk", case.config()).loss, [case.weight])[0]
    case.hidden.requires_grad_(False)
    torch.testing.assert_close(gradients(case.run("topk", case.config()).loss, [case.weight])[0], wanted)


def test_without_gradient_mode_the_loss_is_the_same_and_detached() -> None:
    case = Case()
    wanted = case.run("topk", case.config())
    with torch.no_grad():
        found = case.run("topk", case.config())
    assert not found.loss.requires_grad
    assert torch.equal(found.loss, wanted.loss.detach())


def test_a_head_wider_than_the_cut_gets_gradient_0_beyond_it() -> None:
    case = Case(vocab_size=CUT)
    gradient = gradients(case.run("hidden", case.config()).loss, [case.weight])[0]
    assert gradient.shape == (V, d)
    assert (gradient[CUT:] == 0).all()
    assert (gradient[:CUT] != 0).any(1).all()


def test_a_float32_head_takes_bfloat16_hidden_states() -> None:
    case = Case(dtype=torch.bfloat16)
    case.weight = case.weight.detach().float().requires_grad_()
    found, wanted = case.run("topk", case.config()), case.oracle("topk", case.config())
    hidden, weight = gradients(found.loss, [case.hidden, case.weight])
    assert (hidden.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(weight, gradients(wanted["loss"], [case.weight])[0]) < 1e-5


class _Recorder(TorchDispatchMode):
    """Records the shapes of all tensors made inside it, and the operations that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()
        self.calls: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.add(func.name())
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.made.add(tuple(tensor.shape))
        return out

    @property
    def numel(self) -> int:
        return max(math.prod(shape) for shape in self.made)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_the_logits_of_all_positions_never_exist_at_once(kind: str) -> None:
    num_rows, num_ids = 96, 4096
    hidden = torch.randn(num_rows, d, requires_grad=True)
    weight = torch.randn(num_ids, d, requires_grad=True)
    ids = torch.arange(K).expand(num_rows, K)
    logprobs = torch.full((num_rows, K), math.log(0.9 / K))
    teacher: Teacher = TopKTeacher(ids, logprobs, torch.full((num_rows,), math.log(0.1)))
    if kind == "hidden":
        teacher = HiddenTeacher(torch.randn(num_rows, D), torch.randn(num_ids, D))
    with _Recorder() as recorder:
        dual_kl(hidden, weight, teacher, DualKLConfig(), chunk_rows=24).loss.backward()
    assert (24, num_ids) in recorder.made
    assert recorder.numel <= max(24 * num_ids, num_ids * D)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(reentrant: bool) -> None:
    case = Case()
    wanted = gradients(case.run("hidden", case.config()).loss, [case.hidden, case.weight])

    def loss(hidden: Tensor) -> Tensor:
        return dual_kl(
            hidden * 1.0, case.weight, case.teacher("hidden"), case.config(), weights=case.weights
        ).loss

    checkpoint(loss, case.hidden, use_reentrant=reentrant).backward()
    torch.testing.assert_close(case.hidden.grad, wanted[0])
    torch.testing.assert_close(case.weight.grad, wanted[1])


def test_autocast_changes_nothing() -> None:
    case = Case(dtype=torch.float32)
    wanted = case.run("hidden", case.config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run("hidden", case.config())
        found_gradient = gradients(found.loss, [case.hidden])[0]
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found_gradient, gradients(wanted.loss, [case.hidden])[0])


def test_compiled_code_may_call_it() -> None:
    case = Case(dtype=torch.float32)
    projection = torch.nn.Linear(d, d)

    def loss(hidden: Tensor) -> Tensor:
        return dual_kl(projection(hidden).relu(), case.weight, case.teacher("topk"), case.config()).loss * 2

    wanted = gradients(loss(case.hidden), [case.hidden, case.weight])
    found = gradients(torch.compile(loss, backend="aot_eager")(case.hidden), [case.hidden, case.weight])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_it_trains_a_head_inside_a_ddp_module(tmp_path: Path) -> None:
    case = Case(dtype=torch.float32)

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Parameter(case.weight.detach().clone())

        def forward(self, hidden: Tensor) -> Tensor:
            return dual_kl(hidden, self.lm_head, case.teacher("topk"), case.config()).loss

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        student = torch.nn.parallel.DistributedDataParallel(Student())
        student(case.hidden.detach()).backward()
        found = student.module.lm_head.grad
    finally:
        torch.distributed.destroy_process_group()
    loss = dual_kl(case.hidden, case.weight, case.teacher("topk"), case.config()).loss
    torch.testing.assert_close(found, gradients(loss, [case.weight])[0])


def test_what_it_reports_besides_the_loss() -> None:
    case = Case()
    out = case.run("topk", case.config())
    logits = reference.head_logits(case.hidden, {"weight": case.weight}).detach()
    assert out.student_logprobs is not None
    assert out.student_log_tail_mass is not None
    for n in (0, 1, 2):
        logp = reference.log_softmax(logits[n])
        outside = [j for j in range(V) if j not in set(case.topk["ids"][n].tolist())]
        assert math.isclose(out.student_logprobs[n], float(logp[case.sampled_ids[n]]), rel_tol=1e-9)
        assert math.isclose(
            out.student_log_tail_mass[n], float(torch.logsumexp(logp[outside], 0)), rel_tol=1e-9
        )
    assert not out.floored.any()
    dense = case.run("logits", case.config(), sampled=None)
    assert dense.student_logprobs is None
    assert dense.student_log_tail_mass is None
    assert dense.floored.dtype == torch.bool


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"student_hidden": torch.ones(N, d + 1)}, "student_hidden has shape [7, 17]; expected [any, 16]."),
    (
        {"student_hidden": torch.ones(N, d).half()},
        "student_hidden has dtype torch.float16; expected bfloat16, float32",
    ),
    ({"weights": torch.ones(N + 1)}, "weights has shape [8]; expected [7]."),
    ({"weights": torch.tensor([1.0] * 6 + [math.nan])}, "weights[6] is nan; expected finite numbers."),
    (
        {"config": DualKLConfig(rkl="mc"), "sampled": None},
        "rkl is 'mc', which needs the sampled tokens; pass sampled",
    ),
    (
        {"config": DualKLConfig(vocab_size=600)},
        "vocab_size is 600, the student's head has 503 ids; expected 1 to 503.",
    ),
    (
        {"teacher": LogitsTeacher(torch.ones(N, 511))},
        "The vocabularies differ (student's head 503, teacher's logits 511)",
    ),
    ({"config": DualKLConfig(temperature=2.0)}, "top-k logprobs are at temperature 1.0, the loss is at 2.0"),
    (
        {"sampled": Sampled(torch.ones(N), torch.ones(N), torch.ones(N))},
        "sampled.ids has dtype torch.float32",
    ),
    (
        {"sampled": Sampled(torch.full((N,), -1), torch.ones(N), torch.ones(N))},
        "sampled.ids[0] is -1; expected an id in",
    ),
    (
        {"sampled": Sampled(torch.ones(N).long(), torch.ones(3), torch.ones(N))},
        "sampled.teacher_logprobs has shape [3]",
    ),
    (
        {"lm_head": torch.ones(V, d, device="meta")},
        "lm_head is on meta, the hidden states are on cpu; expected one device.",
    ),
    ({"chunk_rows": 0}, "chunk_rows is 0; expected a number of positions >= 1, or None."),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_bad_input_is_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    case = Case(dtype=torch.float32)
    arguments: dict[str, Any] = {
        "student_hidden": case.hidden,
        "lm_head": case.weight,
        "teacher": case.teacher("topk"),
        "config": DualKLConfig(),
        "sampled": case.sampled,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        dual_kl(**(arguments | changes))


def test_a_topk_teacher_normalised_over_the_kept_ids_alone_is_refused() -> None:
    case = Case()
    case.topk["logprobs"] = case.topk["logprobs"].log_softmax(1)
    with pytest.raises(ValueError, match=r"Row 0 of the top-k teacher has masses that do not add up to 1"):
        case.run("topk", case.config())
