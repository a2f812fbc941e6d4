"""Kernels of `dualkl.kernels.selection`: exact top-k of each row in little more than one read.

A row is split into groups of STEPS * 4 ids, those that one lane reads in one segment. `groups_kernel` reads
the row and stores each group's maximum and sum. The k largest ids lie in the k groups with the largest
maxima: the maximum of any other group is at most equal to k maxima already. `choose_kernel` selects these
groups, and `pick_kernel` rereads only their ids. The tail is a log-sum-exp over the unselected groups and the
rest of the selected ones, not 1 - Σ. Both selections find the k-th largest key by bitwise search; results do
not depend on thread order.
"""

import triton
import triton.language as tl

from dualkl.kernels.common import LEAST, VECTOR, activate, at_least

ROW_MAX = tl.constexpr(0)
LOG_TOTAL = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
SAMPLED_LOGPROB = tl.constexpr(3)
OUTSIDE_MAX = tl.constexpr(4)
OUTSIDE_SUM = tl.constexpr(5)
LOG_TAIL = tl.constexpr(6)
ID_BITS = tl.constexpr(0x7FFFFFFF)
"""A packed key's low half is an id with these bits inverted: among equal logits the lower id sorts first."""


@triton.jit
def order_key(z):
    """Map a float32 to an int32 with the same order (-0 before 0)."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def take_largest(keys, valid, k):
    """Mask of the k largest valid keys (all, if there are fewer). Among equal keys the first are taken."""
    threshold = tl.full([], -2147483648, tl.int64)
    step = tl.full([], 2147483648, tl.int64)
    for _ in range(32):
        raised = threshold + step
        count = tl.sum((valid & (keys >= raised.to(tl.int32))).to(tl.int32), 0)
        threshold = tl.where(count >= k, raised, threshold)
        step = step >> 1
    bound = threshold.to(tl.int32)
    above = valid & (keys > bound)
    equal = valid & (keys == bound)
    missing = k - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))


@triton.jit
def groups_kernel(
    logits_ptr,
    stride,
    width,
    num_ids,
    bias_ptr,
    inner,
    outer,
    maxima_ptr,
    sums_ptr,
    parts_ptr,
    num_segments,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Per group: maximum and Σ exp(z - maximum). Per segment: maximum, Σ e^u and Σ e^u u, u = z - maximum."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    TILE: tl.constexpr = LANES * VECTOR
    lane = tl.arange(0, LANES)
    columns = lane[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    max_z = tl.full([LANES], LEAST, tl.float32)
    sum_z = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    for step in range(STEPS):
        j = (segment * STEPS + step) * TILE + columns
        known = j < num_ids
        raw = tl.load(logits_ptr + row * stride + j, mask=j < width, other=0.0).to(tl.float32)
        z, _slope = activate(raw, bias_ptr, j, known, inner, outer, CAPPED)
        z = tl.where(known, at_least(z, LEAST), LEAST)
        new_max_z = tl.maximum(max_z, tl.max(z, 1))
        shift = max_z - new_max_z
        shrink = tl.exp(shift)
        u = z - new_max_z[:, None]
        exp_u = tl.exp(u)
        moment = shrink * (moment + sum_z * shift) + tl.sum(exp_u * u, 1)
        sum_z = shrink * sum_z + tl.sum(exp_u, 1)
        max_z = new_max_z
    part = row * num_segments + segment
    tl.store(maxima_ptr + part * LANES + lane, max_z)
    tl.store(sums_ptr + part * LANES + lane, sum_z)
    part_max = tl.max(max_z, 0)
    shift = max_z - part_max
    shrink = tl.exp(shift)
    tl.store(parts_ptr + part * 3, part_max)
    tl.store(parts_ptr + part * 3 + 1, tl.sum((shrink * sum_z).to(tl.float64), 0).to(tl.float32))
    tl.store(
        parts_ptr + part * 3 + 2, tl.sum((shrink * (moment + sum_z * shift)).to(tl.float64), 0).to(tl.float32)
    )


@triton.jit
def choose_kernel(
    logits_ptr,
    stride,
    num_ids,
    bias_ptr,
    inner,
    outer,
    sampled_ptr,
    maxima_ptr,
    sums_ptr,
    parts_ptr,
    hits_ptr,
    num_hits,
    out_ptr,
    out_stride,
    num_segments,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Row statistics, the groups that hold the row's largest logits, and the mass of all other groups."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SEGMENTS)
    real = part < num_segments
    parts_ptr += (row * num_segments + part) * 3
    part_max = tl.load(parts_ptr, mask=real, other=LEAST)
    row_max = tl.max(part_max, 0)
    shift = part_max - row_max
    shrink = tl.exp(shift)
    part_sum = tl.load(parts_ptr + 1, mask=real, other=0.0)
    part_moment = tl.load(parts_ptr + 2, mask=real, other=0.0)
    total = tl.sum((shrink * part_sum).to(tl.float64), 0).to(tl.float32)
    moment = tl.sum((shrink * (part_moment + part_sum * shift)).to(tl.float64), 0).to(tl.float32)
    total = tl.where(row_max == LEAST, float("nan"), total)  # no possible id
    log_total = tl.log(total)
    y = tl.load(sampled_ptr + row)
    legal = (y >= 0) & (y < num_ids)
    z_y = tl.load(logits_ptr + row * stride + y, mask=legal, other=float("nan")).to(tl.float32)
    z_y, _slope = activate(z_y, bias_ptr, y, legal, inner, outer, CAPPED)
    tl.store(out_ptr + ROW_MAX * out_stride + row, row_max)
    tl.store(out_ptr + LOG_TOTAL * out_stride + row, log_total)
    tl.store(out_ptr + ENTROPY * out_stride + row, log_total - moment / total)
    tl.store(out_ptr + SAMPLED_LOGPROB * out_stride + row, at_least(z_y - row_max - log_total, LEAST))

    group = tl.arange(0, SEGMENTS * LANES)
    first = (group // LANES) * (STEPS * LANES * VECTOR) + (group % LANES) * VECTOR
    valid = first < num_ids
    max_z = tl.load(maxima_ptr + row * num_segments * LANES + group, mask=valid, other=LEAST)
    hit = take_largest(order_key(max_z), valid, num_hits)
    tl.store(hits_ptr + row * num_hits + tl.cumsum(hit.to(tl.int32), 0) - 1, group, mask=hit)
    outside = valid & (hit == 0) & (max_z > LEAST)
    outside_max = tl.max(tl.where(outside, max_z, LEAST), 0)
    sum_z = tl.load(sums_ptr + row * num_segments * LANES + group, mask=outside, other=0.0)
    outside_sum = tl.sum(tl.where(outside, sum_z * tl.exp(max_z - outside_max), 0.0), 0)
    tl.store(out_ptr + OUTSIDE_MAX * out_stride + row, outside_max)
    tl.store(out_ptr + OUTSIDE_SUM * out_stride + row, outside_sum)


@triton.jit
def pick_kernel(
    logits_ptr,
    stride,
    num_ids,
    bias_ptr,
    inner,
    outer,
    hits_ptr,
    num_hits,
    packed_ptr,
    k,
    out_ptr,
    out_stride,
    HITS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """The k largest logits of the chosen groups, as unordered int64 (key, id); ln of the remaining mass."""
    row = tl.program_id(0).to(tl.int64)
    GROUP: tl.constexpr = STEPS * VECTOR
    index = tl.arange(0, HITS * GROUP)
    slot = index // GROUP
    within = index % GROUP
    group = tl.load(hits_ptr + row * num_hits + slot, mask=slot < num_hits, other=0)
    step = (group // LANES) * STEPS + within // VECTOR
    j = (step * LANES + group % LANES) * VECTOR + within % VECTOR
    valid = (slot < num_hits) & (j < num_ids)
    raw = tl.load(logits_ptr + row * stride + j, mask=valid, other=0.0).to(tl.float32)
    z, _slope = activate(raw, bias_ptr, j, valid, inner, outer, CAPPED)
    keys = order_key(z)
    taken = take_largest(keys, valid, k)
    packed = (keys.to(tl.int64) << 32) | (j ^ ID_BITS).to(tl.int64)
    tl.store(packed_ptr + row * k + tl.cumsum(taken.to(tl.int32), 0) - 1, packed, mask=taken)

    left = valid & (taken == 0) & (z > LEAST)
    outside_max = tl.load(out_ptr + OUTSIDE_MAX * out_stride + row)
    outside_sum = tl.load(out_ptr + OUTSIDE_SUM * out_stride + row)
    tail_max = tl.maximum(outside_max, tl.max(tl.where(left, z, LEAST), 0))
    tail_sum = outside_sum * tl.exp(outside_max - tail_max) + tl.sum(
        tl.where(left, tl.exp(z - tail_max), 0.0), 0
    )
    row_max = tl.load(out_ptr + ROW_MAX * out_stride + row)
    log_total = tl.load(out_ptr + LOG_TOTAL * out_stride + row)
    tl.store(out_ptr + LOG_TAIL * out_stride + row, (tail_max - row_max) + tl.log(tail_sum) - log_total)
