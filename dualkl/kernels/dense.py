"""Loss kernel for dense teachers: `dualkl.chunks.dense_step` in one launch.

With the shifted logits u = z - max z, v = t - max t, d = u - v, S_z = Σ e^u, S_t = Σ e^v:
    R = (Σ e^u d) / S_z + ln (S_t / S_z),  F = -(Σ e^v d) / S_t - ln (S_t / S_z).
One read of both rows is enough. No large numbers cancel: each side is shifted by its own maximum, and only
the quotient of the sums enters a logarithm. When a running maximum changes, the sums of d are rescaled
accordingly.
"""

import triton
import triton.language as tl

from dualkl.kernels.common import (
    FKL,
    GATE,
    LEAST,
    LOSS,
    RKL,
    STUDENT_LOGPROB,
    VECTOR,
    activate,
    at_least,
    mix,
    outcome_gradient,
)


@triton.jit
def dense_kernel(
    student_ptr,
    student_stride,
    width,
    num_ids,
    student_bias_ptr,
    student_inner,
    student_outer,
    teacher_ptr,
    teacher_stride,
    teacher_width,
    teacher_bias_ptr,
    teacher_inner,
    teacher_outer,
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
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    GATING: tl.constexpr,
    MC: tl.constexpr,
    ARGMAX: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Reads rows of raw logits; writes `out` columns and the gradient with respect to hidden @ weight.T."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    weight = tl.load(weights_ptr + row)
    num_live = tl.where(weight != 0, num_ids, 0)  # skip rows of weight 0
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    TILE: tl.constexpr = LANES * VECTOR

    max_z = tl.full([LANES], LEAST, tl.float32)
    max_t = tl.full([LANES], LEAST, tl.float32)
    sum_z = tl.zeros([LANES], tl.float32)
    sum_t = tl.zeros([LANES], tl.float32)
    moment_z = tl.zeros([LANES], tl.float32)  # Σ e^u d
    moment_t = tl.zeros([LANES], tl.float32)  # Σ e^v d
    top = tl.zeros([LANES], tl.int32)
    for start in range(0, width, TILE):
        j = start + columns
        known = j < num_ids
        z_raw = tl.load(student_ptr + j, mask=j < width, other=0.0)
        t_raw = tl.load(teacher_ptr + j, mask=j < teacher_width, other=0.0).to(tl.float32)
        z, slope = activate(z_raw, student_bias_ptr, j, known, student_inner, student_outer, STUDENT_CAPPED)
        t, _t_slope = activate(
            t_raw, teacher_bias_ptr, j, known, teacher_inner, teacher_outer, TEACHER_CAPPED
        )
        z = tl.where(j < num_live, at_least(z, LEAST), LEAST)
        t = tl.where(j < num_live, at_least(t, LEAST), LEAST)
        tile_max_t = tl.max(t, 1)
        new_max_z = tl.maximum(max_z, tl.max(z, 1))
        new_max_t = tl.maximum(max_t, tile_max_t)
        if ARGMAX:
            first = tl.min(tl.where(t == tile_max_t[:, None], j, num_ids), 1)
            top = tl.where(tile_max_t > max_t, first, top)
        shift_z = max_z - new_max_z
        shift_t = max_t - new_max_t
        shrink_z = tl.exp(shift_z)
        shrink_t = tl.exp(shift_t)
        u = z - new_max_z[:, None]
        v = t - new_max_t[:, None]
        d = u - v
        exp_u = tl.exp(u)
        exp_v = tl.exp(v)
        moment_z = shrink_z * (moment_z + sum_z * (shift_z - shift_t)) + tl.sum(exp_u * d, 1)
        moment_t = shrink_t * (moment_t + sum_t * (shift_z - shift_t)) + tl.sum(exp_v * d, 1)
        sum_z = shrink_z * sum_z + tl.sum(exp_u, 1)
        sum_t = shrink_t * sum_t + tl.sum(exp_v, 1)
        max_z = new_max_z
        max_t = new_max_t

    row_max_z = tl.max(max_z, 0)
    row_max_t = tl.max(max_t, 0)
    shift_z = max_z - row_max_z
    shift_t = max_t - row_max_t
    shrink_z = tl.exp(shift_z)
    shrink_t = tl.exp(shift_t)
    moment_z = shrink_z * (moment_z + sum_z * (shift_z - shift_t))
    moment_t = shrink_t * (moment_t + sum_t * (shift_z - shift_t))
    total_z = tl.sum((shrink_z * sum_z).to(tl.float64), 0).to(tl.float32)
    total_t = tl.sum((shrink_t * sum_t).to(tl.float64), 0).to(tl.float32)
    mean_z = tl.sum(moment_z.to(tl.float64), 0).to(tl.float32) / total_z
    mean_t = tl.sum(moment_t.to(tl.float64), 0).to(tl.float32) / total_t
    log_quotient = tl.log(total_t / total_z)
    log_total_z = tl.log(total_z)
    rkl = at_least(mean_z + log_quotient, 0.0)
    fkl = at_least(-mean_t - log_quotient, 0.0)

    cross_entropy = 0.0
    row_top = 0
    if ARGMAX:
        row_top = tl.min(tl.where(max_t == row_max_t, top, num_ids - 1), 0)
        z_top, _top_slope = activate(
            tl.load(student_ptr + row_top),
            student_bias_ptr,
            row_top,
            True,
            student_inner,
            student_outer,
            STUDENT_CAPPED,
        )
        cross_entropy = -at_least(z_top - row_max_z - log_total_z, LEAST)
    logp_y = 0.0
    teacher_logp_y = 0.0
    behaviour_logp_y = 0.0
    y = 0
    if sampled_ptr is not None:
        y = tl.load(sampled_ptr + row)
        legal = (y >= 0) & (y < num_ids)
        z_y = tl.load(student_ptr + y, mask=legal, other=float("nan"))
        z_y, _y_slope = activate(
            z_y, student_bias_ptr, y, legal, student_inner, student_outer, STUDENT_CAPPED
        )
        logp_y = at_least(z_y - row_max_z - log_total_z, LEAST)
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
    tl.store(out_ptr + LOSS * out_stride + row, loss)

    if GRADIENT:
        gradient_ptr += row * gradient_stride
        scale = weight * gradient_factor
        reverse = scale * gate
        forward = scale * (1.0 - gate)
        onehot = reverse * advantage
        over_total_z = 1.0 / total_z
        over_total_t = 1.0 / total_t
        centre = rkl - log_quotient  # l - R = d - centre
        num_tiles = tl.cdiv(width, TILE)
        for i in range(num_tiles):
            start = (num_tiles - 1 - i) * TILE  # backwards: the end of the row may still be cached
            j = start + columns
            known = j < num_ids
            z_raw = tl.load(student_ptr + j, mask=j < width, other=0.0, eviction_policy="evict_first")
            t_raw = tl.load(teacher_ptr + j, mask=j < teacher_width, other=0.0, eviction_policy="evict_first")
            z, slope = activate(
                z_raw, student_bias_ptr, j, known, student_inner, student_outer, STUDENT_CAPPED
            )
            t, _t_slope = activate(
                t_raw.to(tl.float32), teacher_bias_ptr, j, known, teacher_inner, teacher_outer, TEACHER_CAPPED
            )
            u = at_least(z, LEAST) - row_max_z
            v = at_least(t, LEAST) - row_max_t
            p = tl.exp(u) * over_total_z
            q = tl.exp(v) * over_total_t
            g = outcome_gradient(p, q, (u - v) - centre, j == row_top, reverse, forward, onehot, MC, ARGMAX)
            if MC:
                g += tl.where(j == y, onehot, 0.0)
            g = tl.where(j < num_live, g * slope, 0.0)
            tl.store(gradient_ptr + j, g.to(gradient_ptr.dtype.element_ty), mask=j < width)
