"""The loss on one chunk of positions: divergences, gate, loss and gradient from logits, in plain PyTorch.

`dense_step` and `topk_step` handle one kind of teacher each; the gradient overwrites the logits.
`plain_steps` wraps both in the interface that the chunk loop calls. `dualkl.kernels` computes the same on
CUDA in one pass over the logits.

Shape suffixes: N positions of the chunk, V vocabulary after the cut, K kept ids, C outcomes (V, or K + 1 with
the tail bucket last).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dualkl.config import DualKLConfig
from dualkl.divergences import Bucket, Split, bucket_teacher, divergences_, over_mixture, split_student_
from dualkl.estimators import sampled_reverse_kl
from dualkl.gates import NO_INPUTS, GateInputs, gate, teacher_signal
from dualkl.heads import PreparedHead
from dualkl.logprobs import LEAST_LOGPROB, centre_, log_normalise_
from dualkl.targets import DenseTarget, Sampled, Teacher, TopKTeacher, select_rows


@dataclass(frozen=True, eq=False)
class StepResult:
    """Per-position results of a step, detached, in nats. The gradient is left in the logits."""

    rkl: Tensor
    fkl: Tensor
    gate: Tensor
    loss: Tensor
    student_logprobs: Tensor | None = None
    student_log_tail_mass: Tensor | None = None
    floored: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Positions:
    """Per-position inputs of the loss other than the teacher.

    `active_N1` is None if all weights are nonzero.
    """

    hidden_Nd: Tensor
    weights_N: Tensor
    active_N1: Tensor | None
    sampled: Sampled | None
    gate_inputs: GateInputs = NO_INPUTS

    def select(self, rows: slice) -> "Positions":
        """Select positions; hidden states of weight 0 become zeros."""
        hidden_Nd, active_N1 = self.hidden_Nd[rows], self.active_N1
        if active_N1 is not None:
            active_N1 = active_N1[rows]
            hidden_Nd = torch.where(active_N1, hidden_Nd, 0)
        sampled, gate_inputs = select_sampled(self.sampled, rows), self.gate_inputs.select(rows)
        return Positions(hidden_Nd, self.weights_N[rows], active_N1, sampled, gate_inputs)


def select_sampled(sampled: Sampled | None, rows: slice) -> Sampled | None:
    """Select the samples of some positions."""
    return None if sampled is None else Sampled(*(column[rows] for column in sampled_columns(sampled)))


def sampled_columns(sampled: Sampled) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids, teacher logprobs and behaviour logprobs of the sampled tokens."""
    return sampled.ids, sampled.teacher_logprobs, sampled.behaviour_logprobs


Step = Callable[[slice, Positions, Tensor], tuple[StepResult, Tensor | None]]
"""Maps (slice, positions, hidden states in the head's product dtype) of a chunk to (result, gradient).

The gradient [N, V] is with respect to hidden @ weight.T + bias, or None. Its storage may be reused by the
next chunk.
"""


def plain_steps(
    teacher: Teacher,
    head: PreparedHead,
    hidden: Tensor,
    num_ids: int,
    config: DualKLConfig,
    differentiate: bool,
) -> Step:
    """Return a plain PyTorch step, for any device and dtype."""
    dense = None
    if not isinstance(teacher, TopKTeacher):
        dense = DenseTarget(teacher, num_ids, config.temperature, hidden, config.teacher_smoothing)

    def step(rows: slice, chunk: Positions, hidden_Nd: Tensor) -> tuple[StepResult, Tensor | None]:
        logits_NV = head.logits(hidden_Nd)
        slope_NV = head.slope(logits_NV) if differentiate else None
        if config.temperature != 1.0:
            logits_NV.div_(config.temperature)
        scale_N = chunk.weights_N * (head.scale / config.temperature) if differentiate else None
        if dense is not None:
            target_NV = dense.logits(rows, chunk.active_N1)
            result = dense_step(logits_NV, target_NV, chunk.sampled, scale_N, config, chunk.gate_inputs)
        else:
            assert isinstance(teacher, TopKTeacher)
            target = select_rows(teacher, rows, chunk.active_N1)
            result = topk_step(logits_NV, target, chunk.sampled, scale_N, config, chunk.gate_inputs)
        if slope_NV is not None:
            logits_NV.mul_(slope_NV)
        return result, logits_NV if differentiate else None

    return step


@dataclass(frozen=True, eq=False)
class _Mix:
    """Loss and gradient over C outcomes. The gradient excludes the sampled token's term, `onehot_N`."""

    rkl_N: Tensor
    fkl_N: Tensor
    gate_N: Tensor
    loss_N: Tensor
    gradient_NC: Tensor
    onehot_N: Tensor | None


def dense_step(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    sampled: Sampled | None,
    gradient_scale_N: Tensor | None,
    config: DualKLConfig,
    gate_inputs: GateInputs = NO_INPUTS,
) -> StepResult:
    """Gated dual KL against a dense teacher.

    With l_j = ln p_j - ln q_j, the gradient with respect to the student's logits is
        g_j = p_j [λ (l_j - R) + (1 - λ)] - (1 - λ) q_j.
    Multiplied by `gradient_scale_N`, it replaces the logits (unless the scale is None). R is computed as Σ_j
    p_j l_j; the difference of two log-sum-exps would suffer cancellation.

    Both logits are at the loss's temperature, and both are overwritten.
    """
    logp_NV, logq_NV = log_normalise_(logits_NV), log_normalise_(teacher_NV)
    top_N1 = logq_NV.argmax(1, keepdim=True) if config.fkl == "argmax" else None
    sampled_logp_N = None if sampled is None else _at(logp_NV, sampled.ids)
    mix = _mix_outcomes_(
        logp_NV, logq_NV, top_N1, sampled_logp_N, sampled, gradient_scale_N, config, gate_inputs
    )
    _add_onehot_(mix.gradient_NC, mix.onehot_N, sampled)
    return StepResult(mix.rkl_N, mix.fkl_N, mix.gate_N, mix.loss_N, sampled_logp_N)


def topk_step(
    logits_NV: Tensor,
    teacher: TopKTeacher,
    sampled: Sampled | None,
    gradient_scale_N: Tensor | None,
    config: DualKLConfig,
    gate_inputs: GateInputs = NO_INPUTS,
) -> StepResult:
    """Gated dual KL against a top-k teacher.

    All ids outside the top K form one outcome, the tail bucket, with student mass p_0 and teacher mass q_0.
    The loss and its gradient G_c per outcome follow `dense_step` over the K + 1 outcomes. A kept id takes its
    own G_c. The ids outside share the bucket's G_0 in proportion to the student's probabilities:
        g_j = G_0 softmax_outside(z)_j
            = p_j [λ (l_0 - R) + (1 - λ)] - (1 - λ) exp(z_j - lse_tail + ln q_0).
    The equivalent c p + k-hot form contains q_0 / p_0 and loses all precision when the student is far more
    peaked than the teacher.

    Rows without kept ids have R = F = 0, zero loss and zero gradient. `logits_NV` (at the loss's temperature)
    is overwritten, with the gradient times `gradient_scale_N` unless that is None.
    """
    bucket = bucket_teacher(teacher, logits_NV.shape[1], config.tail_floor, logits_NV.dtype)
    centre_(logits_NV)
    sampled_logit_N = None if sampled is None else _at(logits_NV, sampled.ids)
    split = split_student_(logits_NV, bucket)
    sampled_logp_N = None
    if sampled_logit_N is not None:
        sampled_logp_N = (sampled_logit_N - split.lse_N1[:, 0]).clamp_(min=LEAST_LOGPROB)
    top_N1 = torch.zeros_like(bucket.index_NK[:, :1]) if config.fkl == "argmax" else None
    log_tail_N = split.logp_NC[:, -1].clone()
    scale_N = None if gradient_scale_N is None else torch.where(bucket.filled_N, gradient_scale_N, 0)
    mix = _mix_outcomes_(
        split.logp_NC, bucket.logq_NC, top_N1, sampled_logp_N, sampled, scale_N, config, gate_inputs
    )
    if scale_N is not None:
        _spread_(split, bucket, mix.gradient_NC)
        _add_onehot_(split.outside_NV, mix.onehot_N, sampled)
    loss_N = torch.where(bucket.filled_N, mix.loss_N, 0)
    return StepResult(mix.rkl_N, mix.fkl_N, mix.gate_N, loss_N, sampled_logp_N, log_tail_N, bucket.floored_N)


def _mix_outcomes_(
    logp_NC: Tensor,
    logq_NC: Tensor,
    top_N1: Tensor | None,
    sampled_logp_N: Tensor | None,
    sampled: Sampled | None,
    scale_N: Tensor | None,
    config: DualKLConfig,
    gate_inputs: GateInputs,
) -> _Mix:
    """Divergences, gate, loss and scaled gradient over C outcomes; the gradient overwrites `logp_NC`."""
    if config.objective == "jsd":
        return _jensen_shannon_(logp_NC, logq_NC, scale_N, config)
    cross_entropy_N = None if top_N1 is None else -logp_NC.gather(1, top_N1)[:, 0]
    signal_N = teacher_signal(logq_NC, config, gate_inputs)
    rkl_N, fkl_N, product_NC = divergences_(logp_NC, logq_NC)
    if signal_N is None:
        signal_N = fkl_N if config.gate_on == "fkl" else rkl_N
    gate_N = gate(signal_N, config, gate_inputs.tau_N)
    reverse_kl_N, advantage_N, onehot_N = rkl_N, None, None
    if config.rkl == "mc":
        assert sampled is not None
        assert sampled_logp_N is not None
        reverse_kl_N, advantage_N = sampled_reverse_kl(
            sampled_logp_N, sampled.teacher_logprobs, sampled.behaviour_logprobs, rkl_N, config.importance_cap
        )
    forward_kl_N = fkl_N if cross_entropy_N is None else cross_entropy_N
    loss_N = gate_N * reverse_kl_N + (1 - gate_N) * forward_kl_N
    if scale_N is not None:
        reverse_N1, forward_N1 = (gate_N * scale_N)[:, None], ((1 - gate_N) * scale_N)[:, None]
        onehot_N = None if advantage_N is None else reverse_N1[:, 0] * advantage_N
        _outcome_gradient_(logp_NC, logq_NC, product_NC, rkl_N, reverse_N1, forward_N1, onehot_N, top_N1)
    return _Mix(rkl_N, fkl_N, gate_N, loss_N, logp_NC, onehot_N)


def _jensen_shannon_(logp_NC: Tensor, logq_NC: Tensor, scale_N: Tensor | None, config: DualKLConfig) -> _Mix:
    """`_mix_outcomes_` for objective="jsd". The gradient is (1 - β) p_c [ln(p_c / m_c) - KL(p || m)].

    The divergence is summed as Σ_c β q_c ln(q_c / m_c) + (1 - β) p_c ln(p_c / m_c). Its terms are
    non-negative, so it stays accurate near 0, where the two KL terms summed separately would cancel.
    """
    beta, ratio_NC = config.mix, logp_NC - logq_NC
    rkl_N, fkl_N, _ = divergences_(logp_NC, logq_NC)
    p_NC, q_NC = logp_NC, logq_NC
    student_NC, teacher_NC = over_mixture(ratio_NC, beta)
    student_NC.mul_(p_NC)
    loss_N = teacher_NC.mul_(q_NC).mul_(beta).add_(student_NC, alpha=1 - beta).sum(1).clamp_(min=0)
    if scale_N is not None:
        centre_N1 = student_NC.sum(1, keepdim=True)
        p_NC.mul_(-centre_N1).add_(student_NC).mul_((1 - beta) * scale_N[:, None])
    return _Mix(rkl_N, fkl_N, gate(rkl_N, config), loss_N, p_NC, None)


def _outcome_gradient_(
    p_NC: Tensor,
    q_NC: Tensor,
    product_NC: Tensor,
    rkl_N: Tensor,
    reverse_N1: Tensor,
    forward_N1: Tensor,
    onehot_N: Tensor | None,
    top_N1: Tensor | None,
) -> None:
    """Set p to λ p (l - R) + (1 - λ) (p - q), with scaled λ and 1 - λ, from p, q and p l, in few passes.

    "mc" replaces the first term by -λA p; "argmax" replaces q by a one-hot.
    """
    if onehot_N is None:
        p_NC.mul_(forward_N1 - reverse_N1 * rkl_N[:, None]).addcmul_(product_NC, reverse_N1)
    else:
        p_NC.mul_(forward_N1 - onehot_N[:, None])
    if top_N1 is None:
        p_NC.addcmul_(q_NC, forward_N1, value=-1)
    else:
        p_NC.scatter_add_(1, top_N1, -forward_N1)


def _add_onehot_(gradient_NV: Tensor, onehot_N: Tensor | None, sampled: Sampled | None) -> None:
    """Add the sampled token's one-hot term (rkl="mc" only)."""
    if onehot_N is not None:
        assert sampled is not None
        gradient_NV.scatter_add_(1, sampled.ids.long()[:, None], onehot_N[:, None])


def _spread_(split: Split, bucket: Bucket, gradient_NC: Tensor) -> None:
    """Replace the logits outside K by their share of the bucket's gradient; write the kept ids' own."""
    shift_N1 = split.lse_tail_N1.masked_fill(split.lse_tail_N1 == -torch.inf, 0)
    split.outside_NV.sub_(shift_N1).exp_().mul_(gradient_NC[:, -1:])
    gradient_NK = torch.where(bucket.kept_NK, gradient_NC[:, :-1], gradient_NC[:, :1])
    split.outside_NV.scatter_(1, bucket.index_NK, gradient_NK)


def _at(values_NV: Tensor, ids_N: Tensor) -> Tensor:
    return values_NV.gather(1, ids_N.long()[:, None])[:, 0]
