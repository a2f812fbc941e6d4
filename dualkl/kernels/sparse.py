"""Loss kernel for top-k teachers with a tail bucket: `dualkl.chunks.topk_step` in one launch.

The kept logits are gathered and replaced by a marker, so the pass over the row covers only ids outside K. The
tail is thus a log-sum-exp over those ids, not 1 - Σ. They share the bucket's gradient in proportion to the
student's probabilities; the kept ids' own gradients are scattered in at the end.
"""

import triton
import triton.language as tl

from dualkl.kernels.common import (
    FKL,
    FLOORED,
    GATE,
    LEAST,
    LOSS,
    RKL,
    STUDENT_LOG_TAIL,
    STUDENT_LOGPROB,
    VECTOR,
    activate,
    at_least,
    mix,
    outcome_gradient,
)

MARK = tl.constexpr(-3.4028234663852886e38)
"""Marker for a kept logit: the lowest finite float32. -inf fails, because a capped head maps it to -cap."""


@triton.jit
def sparse_kernel(
    student_ptr,
    student_stride,
    width,
    num_ids,
    student_bias_ptr,
    student_inner,
    student_outer,
    ids_ptr,
    logprobs_ptr,
    log_tail_ptr,
    num_slots,
    log_floor,
    gradient_ptr,
    gradient_stride,
    gradient_factor,
    weights_ptr,
    sampled_ptr,
    teacher_logprobs_ptr,
    behaviour_logprobs_ptr,
    out_ptr,
    out_stride,
    tau,
    tau_ptr,
    alpha,
    fixed,
    log_cap,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    GATING: tl.constexpr,
    MC: tl.constexpr,
    ARGMAX: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Reads rows of raw logits; writes `out` columns and the gradient with respect to hidden @ weight.T."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    weight = tl.load(weights_ptr + row)
    num_live = tl.where(weight != 0, num_ids, 0)  # skip rows of weight 0
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    TILE: tl.constexpr = LANES * VECTOR

    # The teacher's K + 1 outcomes, floored and renormalised. An id outside the vocabulary gives a NaN row.
    slot = tl.arange(0, SLOTS)
    ids = tl.load(ids_ptr + row * num_slots + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    kept = (ids >= 0) & (ids < num_live)
    num_kept = tl.sum(kept.to(tl.int32), 0)
    filled = num_kept > 0
    raw_logq = tl.load(logprobs_ptr + row * num_slots + slot, mask=kept, other=float("-inf")).to(tl.float32)
    raw_logq = tl.where((ids >= num_ids) & (num_live > 0), float("nan"), raw_logq)
    raw_tail = tl.where(filled, tl.load(log_tail_ptr + row).to(tl.float32), 0.0)
    has_tail = num_kept < num_ids
    floored = has_tail & (raw_tail < log_floor)
    raw_tail = tl.where(has_tail, at_least(raw_tail, log_floor), float("-inf"))
    max_q = tl.maximum(tl.max(raw_logq, 0), raw_tail)
    log_total_q = tl.log(tl.sum(tl.exp(raw_logq - max_q), 0) + tl.exp(raw_tail - max_q))
    logq = at_least(raw_logq - max_q - log_total_q, LEAST)
    logq_tail = at_least(raw_tail - max_q - log_total_q, LEAST)

    # Load the student's kept and sampled logits, then overwrite the kept ones with markers.
    z_kept = tl.load(student_ptr + ids, mask=kept, other=0.0)
    z_kept, slope_kept = activate(
        z_kept, student_bias_ptr, ids, kept, student_inner, student_outer, STUDENT_CAPPED
    )
    z_kept = tl.where(kept, z_kept, float("-inf"))
    y = 0
    z_y = 0.0
    if sampled_ptr is not None:
        y = tl.load(sampled_ptr + row)
        legal = (y >= 0) & (y < num_ids)
        z_y = tl.load(student_ptr + y, mask=legal, other=float("nan"))
        z_y, _y_slope = activate(
            z_y, student_bias_ptr, y, legal, student_inner, student_outer, STUDENT_CAPPED
        )
    tl.debug_barrier()
    tl.store(student_ptr + ids, tl.full([SLOTS], MARK, tl.float32), mask=kept)
    tl.debug_barrier()

    max_z = tl.full([LANES], LEAST, tl.float32)
    sum_z = tl.zeros([LANES], tl.float32)
    for start in range(0, width, TILE):
        j = start + columns
        known = j < num_ids
        raw = tl.load(student_ptr + j, mask=j < width, other=0.0)
        z, slope = activate(raw, student_bias_ptr, j, known, student_inner, student_outer, STUDENT_CAPPED)
        z = tl.where((j < num_live) & (raw != MARK), z, float("-inf"))
        new_max_z = tl.maximum(max_z, tl.max(z, 1))
        sum_z = sum_z * tl.exp(max_z - new_max_z) + tl.sum(tl.exp(z - new_max_z[:, None]), 1)
        max_z = new_max_z
    max_out = tl.max(max_z, 0)
    total_out = tl.sum((sum_z * tl.exp(max_z - max_out)).to(tl.float64), 0).to(tl.float32)

    max_all = tl.maximum(max_out, tl.max(z_kept, 0))
    exp_kept = tl.exp(z_kept - max_all)
    total = tl.sum(exp_kept, 0) + total_out * tl.exp(max_out - max_all)
    log_total = tl.log(total)
    logp = at_least(z_kept - max_all - log_total, LEAST)
    logp_tail = (max_out - max_all) + tl.log(total_out / total)
    logp_tail = tl.where(total_out == 0.0, LEAST, at_least(logp_tail, LEAST))
    p = exp_kept / total
    q = tl.exp(logq)
    p_tail = tl.exp(logp_tail)
    q_tail = tl.exp(logq_tail)
    l = logp - logq  # noqa: E741
    l_tail = logp_tail - logq_tail
    rkl = at_least(tl.sum(p * l, 0) + p_tail * l_tail, 0.0)
    fkl = at_least(-(tl.sum(q * l, 0) + q_tail * l_tail), 0.0)

    cross_entropy = -tl.sum(tl.where(slot == 0, logp, 0.0), 0)
    logp_y = 0.0
    teacher_logp_y = 0.0
    behaviour_logp_y = 0.0
    if sampled_ptr is not None:
        logp_y = at_least(z_y - max_all - log_total, LEAST)
        teacher_logp_y = tl.load(teacher_logprobs_ptr + row)
        behaviour_logp_y = tl.load(behaviour_logprobs_ptr + row)
        tl.store(out_ptr + STUDENT_LOGPROB * out_stride + row, logp_y)
    if tau_ptr is not None:
        tau = tl.load(tau_ptr + row)
    gate, loss, advantage = mix(
        rkl,
        fkl,
        cross_entropy,
        logp_y,
        teacher_logp_y,
        behaviour_logp_y,
        tau,
        alpha,
        fixed,
        log_cap,
        GATING,
        MC,
        ARGMAX,
    )
    tl.store(out_ptr + RKL * out_stride + row, rkl)
    tl.store(out_ptr + FKL * out_stride + row, fkl)
    tl.store(out_ptr + GATE * out_stride + row, gate)
    tl.store(out_ptr + LOSS * out_stride + row, tl.where(filled, loss, 0.0))
    tl.store(out_ptr + STUDENT_LOG_TAIL * out_stride + row, logp_tail)
    tl.store(out_ptr + FLOORED * out_stride + row, tl.where(floored, 1.0, 0.0))

    if GRADIENT:
        gradient_ptr += row * gradient_stride
        scale = tl.where(filled, weight * gradient_factor, 0.0)
        reverse = scale * gate
        forward = scale * (1.0 - gate)
        onehot = reverse * advantage
        g_kept = outcome_gradient(p, q, l - rkl, slot == 0, reverse, forward, onehot, MC, ARGMAX)
        g_tail = outcome_gradient(p_tail, q_tail, l_tail - rkl, False, reverse, forward, onehot, MC, ARGMAX)
        if MC:
            g_kept += tl.where(ids == y, onehot, 0.0)
        share = tl.where(total_out == 0.0, 0.0, g_tail / total_out)
        num_tiles = tl.cdiv(width, TILE)
        for i in range(num_tiles):
            start = (num_tiles - 1 - i) * TILE  # backwards: the end of the row may still be cached
            j = start + columns
            known = j < num_ids
            raw = tl.load(student_ptr + j, mask=j < width, other=0.0, eviction_policy="evict_first")
            z, slope = activate(raw, student_bias_ptr, j, known, student_inner, student_outer, STUDENT_CAPPED)
            g = share * tl.exp(z - max_out)
            if MC:
                g += tl.where(j == y, onehot, 0.0)
            g = tl.where((j < num_live) & (raw != MARK), g * slope, 0.0)
            tl.store(gradient_ptr + j, g.to(gradient_ptr.dtype.element_ty), mask=j < width)
        tl.debug_barrier()
        g_kept *= slope_kept
        tl.store(gradient_ptr + ids, g_kept.to(gradient_ptr.dtype.element_ty), mask=kept)
