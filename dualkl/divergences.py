"""Forward and reverse KL per position, the K + 1 outcomes of a top-k teacher, and gradient-free evaluation.

Shape suffixes: N positions, V vocabulary after the cut, K kept ids, C outcomes (V, or K + 1 with the tail
bucket last).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualkl.checks import check_ids, check_integers, check_shape, cut_vocabulary
from dualkl.config import TAIL_FLOOR, check_temperature
from dualkl.heads import Head, as_head, prepare_head, row_chunks
from dualkl.logprobs import LEAST_LOGPROB, entropy, log_normalise_
from dualkl.targets import (
    DenseTarget,
    Teacher,
    TopKTeacher,
    check_teacher,
    check_topk_values,
    select_rows,
    shared_vocabulary,
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Per-position comparison of a student with a teacher. Divergences and entropy in nats, float32.

    Attributes:
        rkl: KL(student || teacher); over the kept ids and the tail bucket for a top-k teacher.
        fkl: KL(teacher || student), likewise.
        student_entropy: entropy of the student's full distribution.
        student_top1: the student's most likely id.
        teacher_top1: the teacher's most likely id; -1 if a top-k teacher keeps none.
    """

    rkl: Float[Tensor, " N"]
    fkl: Float[Tensor, " N"]
    student_entropy: Float[Tensor, " N"]
    student_top1: Int[Tensor, " N"]
    teacher_top1: Int[Tensor, " N"]


@torch.no_grad()
def compare(
    student_hidden: Float[Tensor, "N d"],
    lm_head: Float[Tensor, "V d"] | Head,
    teacher: Teacher,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tail_floor: float = TAIL_FLOOR,
    chunk_rows: int | None = None,
) -> Comparison:
    """Both divergences, the student's entropy and both top-1 ids per position, without gradient.

    As in `dual_kl`, sums run in float32 over chunks of positions and are exact over the vocabulary for dense
    teachers. For a top-k teacher both divergences are lower bounds of the full ones (up to `tail_floor`).

    Raises:
        ValueError: see `dual_kl`.
    """
    head = as_head(lm_head)
    check_temperature(temperature)
    num_ids = shared_vocabulary(head, teacher, vocab_size)
    check_shape("student_hidden", student_hidden, (None, head.weight.shape[1]))
    check_teacher(teacher, student_hidden.shape[0], temperature)
    if isinstance(teacher, TopKTeacher) and not student_hidden.is_cuda:
        check_topk_values(teacher, num_ids)
    prepared = prepare_head(head, student_hidden, num_ids)
    dense = (
        None
        if isinstance(teacher, TopKTeacher)
        else DenseTarget(teacher, num_ids, temperature, student_hidden)
    )
    parts = []
    with torch.autocast(student_hidden.device.type, enabled=False):
        for rows in row_chunks(student_hidden.shape[0], chunk_rows, num_ids, 4, student_hidden):
            logits_NV = prepared.logits(student_hidden[rows].to(prepared.weight_Vd.dtype)).div_(temperature)
            if dense is not None:
                parts.append(_compare_dense(logits_NV, dense.logits(rows, None)))
            elif isinstance(teacher, TopKTeacher):
                parts.append(_compare_topk(logits_NV, select_rows(teacher, rows, None), tail_floor))
    if not parts:
        none, no_ids = (
            student_hidden.new_empty(0, dtype=torch.float32),
            student_hidden.new_empty(0, dtype=torch.long),
        )
        return Comparison(none, none.clone(), none.clone(), no_ids, no_ids.clone())
    return Comparison(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _compare_dense(logits_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, ...]:
    logp_NV, logq_NV = log_normalise_(logits_NV), log_normalise_(teacher_NV)
    entropy_N, student_top_N, teacher_top_N = entropy(logp_NV), logp_NV.argmax(1), logq_NV.argmax(1)
    rkl_N, fkl_N, _ = divergences_(logp_NV, logq_NV)
    return rkl_N.float(), fkl_N.float(), entropy_N.float(), student_top_N, teacher_top_N


def _compare_topk(logits_NV: Tensor, teacher: TopKTeacher, tail_floor: float) -> tuple[Tensor, ...]:
    logp_NV = log_normalise_(logits_NV)
    entropy_N, student_top_N = entropy(logp_NV), logp_NV.argmax(1)
    bucket = bucket_teacher(teacher, logp_NV.shape[1], tail_floor, logp_NV.dtype)
    rkl_N, fkl_N, _ = divergences_(split_student_(logp_NV, bucket).logp_NC, bucket.logq_NC)
    return rkl_N.float(), fkl_N.float(), entropy_N.float(), student_top_N, teacher.ids[:, 0].long()


@torch.no_grad()
def gather_logprobs(
    hidden: Float[Tensor, "N d"],
    head: Float[Tensor, "V d"] | Head,
    ids: Int[Tensor, " N"],
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Float[Tensor, " N"]:
    """ln p(id) of one id per position, nats, float32, without gradient. Logits are computed in chunks.

    Raises:
        ValueError: mismatched shapes, a temperature or vocab_size out of range, or (on CPU) an id outside the
            vocabulary.
    """
    head = as_head(head)
    check_temperature(temperature)
    check_shape("hidden", hidden, (None, head.weight.shape[1]))
    check_shape("ids", ids, (hidden.shape[0],))
    num_ids = cut_vocabulary(vocab_size, {"head": head.weight.shape[0]})
    check_integers("ids", ids)
    if not ids.is_cuda:
        check_ids("ids", ids, num_ids)
    prepared = prepare_head(head, hidden, num_ids)
    logprobs_N = torch.empty(hidden.shape[0], device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in row_chunks(hidden.shape[0], chunk_rows, num_ids, 2, hidden):
            logits_NV = prepared.logits(hidden[rows].to(prepared.weight_Vd.dtype)).div_(temperature)
            logprobs_N[rows] = log_normalise_(logits_NV).gather(1, ids[rows].long()[:, None])[:, 0].float()
    return logprobs_N


def divergences_(logp_NC: Tensor, logq_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(p||q), KL(q||p) in nats and p (ln p - ln q). Overwrites the inputs with probabilities.

    Sums run in the inputs' dtype; results are clamped at 0. A token that is impossible on only one side gives
    a divergence of order 1e30 instead of infinity.
    """
    ratio_NC = logp_NC - logq_NC
    p_NC, q_NC = logp_NC.exp_(), logq_NC.exp_()
    fkl_N = (q_NC * ratio_NC).sum(1).neg_().clamp_(min=0)
    product_NC = ratio_NC.mul_(p_NC)
    return product_NC.sum(1).clamp_(min=0), fkl_N, product_NC


def over_mixture(ratio_NC: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return (ln p/m, ln q/m) for m = β q + (1 - β) p, given ln p/q. Accurate to rounding even for p ≈ q.

    For the larger of p and q it is -ln(1 + w (e^-|ln p/q| - 1)), where w is the other's weight in m. The two
    differ by ln p/q.
    """
    student_larger_NC = ratio_NC >= 0
    weight_NC = torch.full_like(ratio_NC, 1 - beta).masked_fill_(student_larger_NC, beta)
    larger_NC = ratio_NC.abs().neg_().expm1_().mul_(weight_NC).log1p_().neg_()
    student_NC = torch.where(student_larger_NC, larger_NC, larger_NC + ratio_NC)
    return student_NC, torch.where(student_larger_NC, larger_NC - ratio_NC, larger_NC)


@dataclass(frozen=True, eq=False)
class Bucket:
    """A top-k teacher as K + 1 outcomes. `index_NK` is `ids`, with slot 0's id (or 0) in empty slots."""

    index_NK: Tensor
    kept_NK: Tensor
    filled_N: Tensor
    floored_N: Tensor
    logq_NC: Tensor


def bucket_teacher(teacher: TopKTeacher, num_ids: int, tail_floor: float, dtype: torch.dtype) -> Bucket:
    """Return the teacher's K + 1 logprobs, tail last, floored and renormalised.

    A row that keeps all `num_ids` ids has no tail outcome; any other tail is at least `tail_floor`.
    """
    kept_NK = teacher.ids >= 0
    filled_N = kept_NK.any(1)
    index_NK = torch.where(kept_NK, teacher.ids, teacher.ids[:, :1]).clamp_(min=0).long()
    least = math.log(tail_floor) if tail_floor > 0 else -math.inf
    log_tail_N = torch.where(filled_N, teacher.log_tail_mass.detach().to(dtype), 0)
    has_tail_N = kept_NK.sum(1) < num_ids
    floored_N = has_tail_N & (log_tail_N < least)
    log_tail_N = torch.where(has_tail_N, log_tail_N.clamp(min=least), -torch.inf)
    logq_NK = teacher.logprobs.detach().to(dtype).masked_fill(~kept_NK, -torch.inf)
    logq_NC = torch.cat([logq_NK, log_tail_N[:, None]], dim=1)
    return Bucket(index_NK, kept_NK, filled_N, floored_N, log_normalise_(logq_NC))


@dataclass(frozen=True, eq=False)
class Split:
    """A student's K + 1 logprobs (tail last), and its centred logits outside the kept ids (-inf inside)."""

    logp_NC: Tensor
    outside_NV: Tensor
    lse_N1: Tensor
    lse_tail_N1: Tensor


def split_student_(logits_NV: Tensor, bucket: Bucket) -> Split:
    """Split the student's centred logits at the kept ids, in place. The tail is a log-sum-exp, not 1 - Σ."""
    at_index_NK = logits_NV.gather(1, bucket.index_NK)
    inside_NK = at_index_NK.masked_fill(~bucket.kept_NK, -torch.inf)
    # Without kept ids, index 0 is a placeholder, and its logit stays in place.
    logits_NV.scatter_(1, bucket.index_NK, at_index_NK.masked_fill_(bucket.filled_N[:, None], -torch.inf))
    lse_tail_N1 = logits_NV.logsumexp(1, keepdim=True)
    lse_N1 = torch.logaddexp(lse_tail_N1, inside_NK.logsumexp(1, keepdim=True))
    logp_NC = torch.cat([inside_NK, lse_tail_N1], dim=1).sub_(lse_N1).clamp_(min=LEAST_LOGPROB)
    return Split(logp_NC, logits_NV, lse_N1, lse_tail_N1)
