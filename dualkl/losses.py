"""The gated dual KL: `dual_kl`, its output, and the chunk loop that computes loss and gradient together.

Shape suffixes: N positions, V vocabulary after the cut, d width of the student's hidden states.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dualkl import kernels
from dualkl.checks import check_device, check_ids, check_integers, check_shape
from dualkl.chunks import Positions, Step, StepResult, plain_steps, sampled_columns
from dualkl.config import DualKLConfig
from dualkl.gates import GateInputs
from dualkl.heads import Head, HeadGradient, PreparedHead, as_head, prepare_head, row_chunks, statistics_dtype
from dualkl.logprobs import smooth
from dualkl.targets import (
    Sampled,
    Teacher,
    TopKTeacher,
    check_teacher,
    check_topk_values,
    shared_vocabulary,
    smooth_topk,
    support_tensor,
)

_HIDDEN_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class DualKLOutput:
    """Output of `dual_kl`. All fields but `loss` are detached and per position.

    Nats at the loss's temperature; float32, or float64 for float64 hidden states. Positions of weight 0 hold
    0.

    Attributes:
        loss: Σ_n weights_n (λ_n r_n + (1 - λ_n) f_n), or the weighted sum of Jensen-Shannon divergences; a
            scalar.
        rkl: R = KL(student || teacher), for either estimator; bucketed for a top-k teacher.
        fkl: F = KL(teacher || student), likewise.
        gate: λ, the weight of the reverse KL; β under objective="jsd".
        floored: True where a top-k teacher's tail was below `tail_floor`; False for dense teachers.
        student_logprobs: ln p(y) of the sampled tokens, or None without `sampled`.
        student_log_tail_mass: ln of the student's mass outside a top-k teacher's kept ids (-1e30 for zero
            mass); None for dense teachers.
    """

    loss: Float[Tensor, ""]
    rkl: Float[Tensor, " N"]
    fkl: Float[Tensor, " N"]
    gate: Float[Tensor, " N"]
    floored: Bool[Tensor, " N"]
    student_logprobs: Float[Tensor, " N"] | None
    student_log_tail_mass: Float[Tensor, " N"] | None


@torch.compiler.disable
def dual_kl(
    student_hidden: Float[Tensor, "N d"],
    lm_head: Float[Tensor, "V d"] | Head,
    teacher: Teacher,
    config: DualKLConfig,
    sampled: Sampled | None = None,
    weights: Float[Tensor, " N"] | None = None,
    *,
    tau: float | Float[Tensor, ""] | Float[Tensor, " N"] | None = None,
    teacher_entropy: Float[Tensor, " N"] | None = None,
    chunk_rows: int | None = None,
    check: bool = False,
) -> DualKLOutput:
    """Forward and reverse KL, mixed per position by a gate, computed from hidden states and the output head.

    With student p, teacher q and l_j = ln p_j - ln q_j, in nats:
        R = KL(p || q) = Σ_j p_j l_j,  F = KL(q || p) = -Σ_j q_j l_j,  λ = gate(D), detached (`dualkl.gates`),
        loss = Σ_n weights_n (λ_n r_n + (1 - λ_n) f_n).
    D is R by default (`config.gate_on`). r is R (rkl="exact") or the sampled estimate w l_y (rkl="mc",
    `dualkl.estimators`). f is F (fkl="full") or the cross-entropy on the teacher's most likely token
    (fkl="argmax"). objective="jsd" replaces the bracket by the generalised Jensen-Shannon divergence
    (`DualKLConfig`); R and F are still reported. Forward and reverse KL for on-policy distillation: arXiv
    2306.13649. Top-k teachers have K kept ids and one bucket for the rest (`dualkl.chunks`).

    Logits exist only for one chunk of positions at a time. The gradient is computed together with the loss;
    backward only scales it. Logits and statistics are float32 (float64 for float64 hidden states), and the
    head's gradient is accumulated in that dtype. On CUDA, bfloat16 hidden states use bfloat16 products.
    Autocast is disabled inside. "mc" saves no memory or time, since the gate needs R.

    On CUDA the gated objective runs in Triton kernels (`dualkl.kernels`). objective="jsd", teacher smoothing
    and gate_on other than "rkl" run in plain PyTorch on every device: the same numbers, with more time and
    memory.

    Args:
        student_hidden: the student's last hidden states at the scored positions; bfloat16, float32 or
            float64.
        lm_head: the student's output head; frozen parameters get no gradient, and cost none.
        teacher: logits, hidden states and a head, or top-k ids with the tail's mass.
        config: gate, estimators, temperature and limits.
        sampled: the sampled tokens; required by rkl="mc", otherwise used only to report `student_logprobs`.
        weights: finite constants, by default 1 / N. Positions of weight 0 are skipped: they contribute
            exactly zero loss and gradient, even if they contain NaN.
        tau: overrides config.tau for this call (schedules, adaptive thresholds: `dualkl.thresholds`). A
            number, a scalar tensor or one value per position, on the hidden states' device; never
            synchronises. tau - s shifts a position's gate towards forward KL by s nats.
        teacher_entropy: entropy of the teacher's full distribution, nats; gate_on="teacher_entropy" uses it
            instead of the entropy of `teacher`. Ignored by other settings.
        chunk_rows: positions per chunk; by default as many as fit a memory budget. Affects rounding only.
        check: also validate values on CUDA, which synchronises. CPU tensors are always validated.

    Returns:
        The loss, differentiable once in `student_hidden` and `lm_head`, and its components. N = 0 gives a
            loss of 0 attached to both. Positions where a top-k teacher keeps no id contribute nothing. A
            token that is impossible on only one side (logit -inf) counts as ln p = -1e30: the divergence is
            huge but finite, soft and hard gates close, and nothing becomes NaN. A NaN at a position of
            nonzero weight gives a NaN loss.

    Raises:
        ValueError: mismatched shapes, devices, dtypes or vocabularies; rkl="mc" without `sampled`; a top-k
            teacher at another temperature; a tau for gating="fixed". If values are validated: non-finite
            weights, ids outside the vocabulary or kept twice, top-k masses that differ from 1 by more than
            1e-4.
    """
    head = as_head(lm_head)
    num_ids = shared_vocabulary(head, teacher, config.vocab_size)
    _check_inputs(student_hidden, head, teacher, config, sampled, weights)
    _check_gate_inputs(student_hidden, config, tau, teacher_entropy)
    if isinstance(tau, (int, float)):
        config, tau = replace(config, tau=float(tau)), None
    needs = _needs_gradient(student_hidden, head)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        if check or not student_hidden.is_cuda:
            _check_values(teacher, sampled, weights, num_ids)
        if config.teacher_smoothing:
            teacher, sampled = _smoothed(teacher, sampled, num_ids, config, statistics_dtype(student_hidden))
        positions = _positions(student_hidden, sampled, weights, tau, teacher_entropy)
        output, gradients = _forward(positions, head, teacher, config, num_ids, needs, chunk_rows)
    if not any(needs):
        return output
    loss = _AttachGradient.apply(student_hidden, head.weight, head.bias, output.loss, *gradients)
    return replace(output, loss=loss)


class _AttachGradient(torch.autograd.Function):
    """The loss as a function of (hidden, weight, bias) with precomputed gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        *gradients: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(*gradients)  # type: ignore[arg-type]  # None is allowed, and comes back as None
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.Function, upstream: Tensor) -> tuple[Tensor | None, ...]:
        known = (None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return *known, None, None, None, None


def _needs_gradient(hidden: Tensor, head: Head) -> tuple[bool, bool, bool]:
    if not torch.is_grad_enabled():
        return False, False, False
    return hidden.requires_grad, head.weight.requires_grad, head.bias is not None and head.bias.requires_grad


def _smoothed(
    teacher: Teacher, sampled: Sampled | None, num_ids: int, config: DualKLConfig, dtype: torch.dtype
) -> tuple[Teacher, Sampled | None]:
    """Smooth a top-k teacher and the samples' teacher logprobs (dense teachers are smoothed per chunk)."""
    epsilon = config.teacher_smoothing
    if isinstance(teacher, TopKTeacher):
        teacher = smooth_topk(teacher, num_ids, epsilon, dtype)
    if sampled is not None:
        logprobs_N = smooth(sampled.teacher_logprobs.to(dtype), epsilon, 1 / num_ids)
        sampled = Sampled(sampled.ids, logprobs_N, sampled.behaviour_logprobs)
    return teacher, sampled


def _positions(
    hidden: Tensor,
    sampled: Sampled | None,
    weights: Tensor | None,
    tau: Tensor | None,
    teacher_entropy: Tensor | None,
) -> Positions:
    """All positions, in the statistics dtype. Samples and gate inputs at weight 0 are replaced by zeros."""
    dtype, num_rows = statistics_dtype(hidden), hidden.shape[0]
    active_N = None if weights is None else weights != 0
    if weights is None:
        weights = torch.full((num_rows,), 1 / max(1, num_rows), dtype=dtype, device=hidden.device)
    if sampled is not None:
        ids_N, teacher_N, behaviour_N = sampled_columns(sampled)
        sampled = Sampled(ids_N.long(), teacher_N.to(dtype), behaviour_N.to(dtype))
        if active_N is not None:
            sampled = Sampled(*(torch.where(active_N, column, 0) for column in sampled_columns(sampled)))
    active_N1 = None if active_N is None else active_N[:, None]
    return Positions(
        hidden, weights.to(dtype), active_N1, sampled, _gate_inputs(hidden, active_N, tau, teacher_entropy)
    )


def _gate_inputs(
    hidden: Tensor, active_N: Tensor | None, tau: Tensor | None, teacher_entropy: Tensor | None
) -> GateInputs:
    def column(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        values_N = values.detach().to(statistics_dtype(hidden)).expand(hidden.shape[0])
        return values_N if active_N is None else torch.where(active_N, values_N, 0)

    return GateInputs(column(tau), column(teacher_entropy))


def _forward(
    positions: Positions,
    lm_head: Head,
    teacher: Teacher,
    config: DualKLConfig,
    num_ids: int,
    needs: tuple[bool, bool, bool],
    chunk_rows: int | None,
) -> tuple[DualKLOutput, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return the output, with a detached loss, and the gradients of (hidden, weight, bias)."""
    hidden = positions.hidden_Nd
    head = prepare_head(lm_head, hidden, num_ids)
    gradient = HeadGradient(head, hidden, lm_head, needs)
    step, chunks = _step_for(teacher, head, hidden, num_ids, config, any(needs), chunk_rows)
    results = []
    for rows in chunks:
        chunk = positions.select(rows)
        hidden_Nd = chunk.hidden_Nd.to(head.weight_Vd.dtype)
        result, gradient_NV = step(rows, chunk, hidden_Nd)
        results.append(result)
        if gradient_NV is not None:
            gradient.add(rows, hidden_Nd, gradient_NV)
        del gradient_NV
    del step
    return _assemble(results, positions, isinstance(teacher, TopKTeacher)), gradient.results()


def _step_for(
    teacher: Teacher,
    head: PreparedHead,
    hidden: Tensor,
    num_ids: int,
    config: DualKLConfig,
    differentiate: bool,
    chunk_rows: int | None,
) -> tuple[Step, Iterable[slice]]:
    """Return the step for this teacher and device, and the chunks it runs on."""
    if kernels.usable(hidden, teacher, config):
        from dualkl.kernels import fused  # import triton only where the kernels run

        return fused.steps(teacher, head, hidden, num_ids, config, differentiate, chunk_rows)
    num_buffers = (2 if isinstance(teacher, TopKTeacher) else 4) + (head.softcap is not None)
    if not isinstance(teacher, TopKTeacher):
        num_buffers += 3 * (config.objective == "jsd") + 2 * (config.teacher_smoothing > 0)
    chunks = row_chunks(hidden.shape[0], chunk_rows, num_ids, num_buffers, hidden)
    return plain_steps(teacher, head, hidden, num_ids, config, differentiate), chunks


def _assemble(results: list[StepResult], positions: Positions, bucketed: bool) -> DualKLOutput:
    """Join the chunks. The loss is a single sum over positions, independent of the chunking."""
    zeros_N, active_N1 = torch.zeros_like(positions.weights_N), positions.active_N1

    def join(name: str) -> Tensor:
        column_N = torch.cat([getattr(result, name) for result in results]) if results else zeros_N
        return column_N if active_N1 is None else torch.where(active_N1[:, 0], column_N, 0)

    return DualKLOutput(
        loss=(positions.weights_N * join("loss")).sum(),
        rkl=join("rkl"),
        fkl=join("fkl"),
        gate=join("gate"),
        floored=join("floored").bool() if bucketed else zeros_N.bool(),
        student_logprobs=None if positions.sampled is None else join("student_logprobs"),
        student_log_tail_mass=join("student_log_tail_mass") if bucketed else None,
    )


def _check_inputs(
    hidden: Tensor,
    head: Head,
    teacher: Teacher,
    config: DualKLConfig,
    sampled: Sampled | None,
    weights: Tensor | None,
) -> None:
    """Checks that do not read tensor values."""
    check_shape("student_hidden", hidden, (None, head.weight.shape[1]))
    num_rows = hidden.shape[0]
    if hidden.dtype not in _HIDDEN_DTYPES:
        raise ValueError(f"student_hidden has dtype {hidden.dtype}; expected bfloat16, float32 or float64.")
    check_teacher(teacher, num_rows, config.temperature)
    check_device("lm_head", head.weight, hidden)
    check_device("teacher", support_tensor(teacher), hidden)
    if weights is not None:
        check_shape("weights", weights, (num_rows,))
        check_device("weights", weights, hidden)
    if sampled is None and config.rkl == "mc":
        raise ValueError("rkl is 'mc', which needs the sampled tokens; pass sampled, or use rkl='exact'.")
    if sampled is not None:
        for name, column in zip(
            ("ids", "teacher_logprobs", "behaviour_logprobs"), sampled_columns(sampled), strict=True
        ):
            check_shape(f"sampled.{name}", column, (num_rows,))
            check_device(f"sampled.{name}", column, hidden)
        check_integers("sampled.ids", sampled.ids)


def _check_gate_inputs(
    hidden: Tensor, config: DualKLConfig, tau: float | Tensor | None, teacher_entropy: Tensor | None
) -> None:
    if tau is not None and config.gating == "fixed":
        raise ValueError("tau was given, but gating is 'fixed', which has no threshold; leave tau out.")
    if isinstance(tau, Tensor):
        check_shape("tau", tau, (hidden.shape[0],) if tau.ndim else ())
        check_device("tau", tau, hidden)
    if teacher_entropy is not None:
        check_shape("teacher_entropy", teacher_entropy, (hidden.shape[0],))
        check_device("teacher_entropy", teacher_entropy, hidden)


def _check_values(teacher: Teacher, sampled: Sampled | None, weights: Tensor | None, num_ids: int) -> None:
    """Checks that read tensor values, and therefore synchronise. Rows of weight 0 are exempt."""
    if weights is not None and not weights.isfinite().all():
        row = int((~weights.isfinite()).nonzero()[0])
        raise ValueError(f"weights[{row}] is {float(weights[row])}; expected finite numbers.")
    active_N = None if weights is None else weights != 0
    if isinstance(teacher, TopKTeacher):
        check_topk_values(teacher, num_ids, active_N)
    if sampled is not None:
        ids_N = sampled.ids if active_N is None else torch.where(active_N, sampled.ids, 0)
        check_ids("sampled.ids", ids_N, num_ids)
