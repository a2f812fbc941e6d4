"""Triton kernels of the engine, for sm_80 and newer.

They cover attention over slots, storing K and V, logits statistics, and small operations between matmuls.

The attention grid is rows × K/V heads × splits of the keys. The queries of a K/V head's group are padded to
the 16 rows of a tensor-core tile: K and V are read once per group.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = tl.constexpr(-3.4028234663852886e38)
TILE_BYTES = 16_384
"""Size of a block of keys: K and V in three stages then fit the shared memory of an sm_86."""
NORM_TILE = 1024
"""Elements per program of short norms."""
HEADS_TILE = 8
PROGRAMS_PER_PROCESSOR = 4
MAX_SPLITS = 16


@triton.jit
def decode_kernel(
    query_ptr,
    query_row,
    query_head,
    keys_ptr,
    keys_row,
    keys_head,
    keys_place,
    values_ptr,
    values_row,
    values_head,
    values_place,
    attended_ptr,
    out_ptr,
    partial_ptr,
    log_mass_ptr,
    scale,
    cap,
    window,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one row and K/V head over one split of its keys.

    `scale` and `cap` are in units of ln 2 without a cap, else of 1. A single split writes
    [rows, heads, VALUE_WIDTH] to `out`; several write fp32 averages and their log masses.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    attended = tl.load(attended_ptr + row)
    start = 0
    if WINDOWED:
        start = tl.maximum(attended - window, 0)
    share = tl.cdiv(tl.cdiv(attended - start, BLOCK), SPLITS) * BLOCK
    first = start + split * share
    last = tl.minimum(first + share, attended)

    lane = tl.arange(0, LANES)
    column = tl.arange(0, WIDTH_PADDED)
    value_column = tl.arange(0, VALUE_PADDED)
    in_group = lane < GROUP
    query_ptr += row * query_row + (head * GROUP + lane[:, None]) * query_head + column[None, :]
    query = tl.load(query_ptr, mask=in_group[:, None] & (column < WIDTH)[None, :], other=0.0)
    keys_ptr += row * keys_row + head * keys_head
    values_ptr += row * values_row + head * values_head

    peak = tl.full([LANES], LEAST, tl.float32)
    mass = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES, VALUE_PADDED], tl.float32)
    for at in range(first, last, BLOCK):
        place = at + tl.arange(0, BLOCK)
        seen = place < last
        keys = tl.load(
            keys_ptr + place[None, :] * keys_place + column[:, None],
            mask=seen[None, :] & (column < WIDTH)[:, None],
            other=0.0,
        )
        values = tl.load(
            values_ptr + place[:, None] * values_place + value_column[None, :],
            mask=seen[:, None] & (value_column < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        scores = tl.dot(query, keys, input_precision=PRECISION) * scale
        if CAPPED:
            decay = tl.exp(-2.0 * tl.abs(scores))
            bent = (1.0 - decay) / (1.0 + decay)
            scores = cap * tl.where(scores < 0, -bent, bent)
        scores = tl.where(seen[None, :], scores, LEAST)
        higher = tl.maximum(peak, tl.max(scores, 1))
        fade = tl.exp2(peak - higher)
        p = tl.exp2(scores - higher[:, None])
        mass = mass * fade + tl.sum(p, 1)
        total = total * fade[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        peak = higher

    average = total / tl.where(mass > 0, mass, 1.0)[:, None]
    at = (row * tl.num_programs(1) + head) * GROUP + lane
    kept = in_group[:, None] & (value_column < VALUE_WIDTH)[None, :]
    if SPLITS == 1:
        target = out_ptr + at[:, None] * VALUE_WIDTH + value_column[None, :]
        tl.store(target, average.to(out_ptr.dtype.element_ty), mask=kept)
    else:
        at = at * SPLITS + split
        tl.store(partial_ptr + at[:, None] * VALUE_WIDTH + value_column[None, :], average, mask=kept)
        tl.store(log_mass_ptr + at, tl.where(mass > 0, peak + tl.log2(mass), LEAST), mask=in_group)


@triton.jit
def combine_kernel(
    partial_ptr,
    log_mass_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Average of the splits, weighted by their masses. One program per query head."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    log_mass = tl.load(log_mass_ptr + head * SPLITS + split, mask=split < SPLITS, other=LEAST)
    mass = tl.exp2(log_mass - tl.max(log_mass, 0))
    partial = tl.load(
        partial_ptr + (head * SPLITS + split)[:, None] * WIDTH + column[None, :],
        mask=(split < SPLITS)[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )
    out = tl.sum(partial * mass[:, None], 0) / tl.sum(mass, 0)
    tl.store(out_ptr + head * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def store_kernel(
    key_ptr,
    key_row,
    key_head,
    value_ptr,
    value_row,
    value_head,
    keys_ptr,
    keys_row,
    keys_head,
    keys_place,
    values_ptr,
    values_row,
    values_head,
    values_place,
    places_ptr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Write the new K and V of one row and head, cast, to the row's place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = tl.load(places_ptr + row)
    column = tl.arange(0, PADDED)
    key = tl.load(key_ptr + row * key_row + head * key_head + column, mask=column < WIDTH)
    value = tl.load(value_ptr + row * value_row + head * value_head + column, mask=column < VALUE_WIDTH)
    keys_ptr += row * keys_row + head * keys_head + place * keys_place
    values_ptr += row * values_row + head * values_head + place * values_place
    tl.store(keys_ptr + column, key.to(keys_ptr.dtype.element_ty), mask=column < WIDTH)
    tl.store(values_ptr + column, value.to(values_ptr.dtype.element_ty), mask=column < VALUE_WIDTH)


@triton.jit
def blocks_kernel(
    logits_ptr,
    logits_row,
    num_ids,
    num_blocks,
    peak_ptr,
    mass_ptr,
    moment_ptr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """`sampling.block_statistics` of one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    lane = tl.arange(0, PADDED)
    ids = block * SIZE + lane
    inside = (lane < SIZE) & (ids < num_ids)
    logits = tl.load(logits_ptr + row * logits_row + ids, mask=inside, other=float("-inf"))
    broken = tl.max((logits != logits).to(tl.int32), 0) > 0
    peak = tl.maximum(tl.max(logits, 0), LEAST)
    peak = tl.where(broken, float("nan"), peak)
    gap = logits - peak
    gap = tl.where(gap < LEAST, LEAST, gap)
    p = tl.exp(gap)
    at = row * num_blocks + block
    tl.store(peak_ptr + at, peak.to(tl.float64))
    tl.store(mass_ptr + at, tl.sum(p.to(tl.float64), 0))
    tl.store(moment_ptr + at, tl.sum((p * gap).to(tl.float64), 0))


@triton.jit
def norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    inner,
    outer_stride,
    inner_stride,
    size,
    eps,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    ONE_CENTRED: tl.constexpr,
):
    """RMS norms of several rows, rounded as in `fused_layers.rms_norm`.

    Row r starts at (r // inner) * outer_stride + (r % inner) * inner_stride; the output is dense.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = (row < num_rows)[:, None] & (column < size)[None, :]
    source = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    x *= tl.rsqrt(tl.sum(x * x, 1) / size + eps)[:, None]
    if ONE_CENTRED:
        x *= 1.0 + weight
    else:
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32) * weight
    target = row.to(tl.int64)[:, None] * size + column[None, :]
    tl.store(out_ptr + target, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    query_ptr,
    query_row,
    query_place,
    query_head,
    key_ptr,
    key_row,
    key_place,
    key_head,
    cos_ptr,
    cos_row,
    cos_place,
    sin_ptr,
    sin_row,
    sin_place,
    query_out_ptr,
    key_out_ptr,
    num_places,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rotate several heads at one place: x cos + (−x₂, x₁) sin, each product rounded as in PyTorch."""
    at = tl.program_id(0)
    row, place = (at // num_places).to(tl.int64), (at % num_places).to(tl.int64)
    tile = tl.program_id(1)
    is_key = tile >= QUERY_TILES
    source = query_ptr + row * query_row + place * query_place
    target = query_out_ptr + at.to(tl.int64) * HEADS * 2 * HALF
    if is_key:
        source = key_ptr + row * key_row + place * key_place
        target = key_out_ptr + at.to(tl.int64) * KV_HEADS * 2 * HALF
    head = tl.where(is_key, tile - QUERY_TILES, tile) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, PADDED)
    inside = column < HALF
    kept = (head < tl.where(is_key, KV_HEADS, HEADS))[:, None] & inside[None, :]
    source += head[:, None] * tl.where(is_key, key_head, query_head) + column[None, :]
    target += head[:, None] * 2 * HALF + column[None, :]
    cos_ptr += row * cos_row + place * cos_place + column
    sin_ptr += row * sin_row + place * sin_place + column
    kind = query_out_ptr.dtype.element_ty
    first = tl.load(source, mask=kept, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=kept, other=0.0).to(tl.float32)
    low_cos = tl.load(cos_ptr, mask=inside, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos_ptr + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin_ptr, mask=inside, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin_ptr + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    low = (first * low_cos).to(kind).to(tl.float32) - (second * low_sin).to(kind).to(tl.float32)
    high = (second * high_cos).to(kind).to(tl.float32) + (first * high_sin).to(kind).to(tl.float32)
    tl.store(target, low.to(kind), mask=kept)
    tl.store(target + HALF, high.to(kind), mask=kept)


@triton.jit
def gated_kernel(gate_ptr, gate_row, up_ptr, up_row, out_ptr, size, BLOCK: tl.constexpr):
    """silu(gate) up for a part of one row, with PyTorch's intermediate rounding."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(gate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * size + column, (gate * up).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_centred: bool) -> Tensor:
    """`fused_layers.rms_norm` of x [..., rows, size] in one launch."""
    rows = _dense(x).reshape(-1, x.shape[-2], x.shape[-1])  # a view, even for joined heads
    outer, inner, size = rows.shape
    dtype = x.dtype if one_centred else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    padded = triton.next_power_of_2(size)
    at_once = max(1, NORM_TILE // padded)
    norm_kernel[(triton.cdiv(outer * inner, at_once),)](
        *(rows, weight, out, outer * inner, inner, rows.stride(0), rows.stride(1), size, eps),
        ROWS=at_once,
        PADDED=padded,
        ONE_CENTRED=one_centred,
        num_warps=max(1, min(8, at_once * padded // 256)),
    )
    return out


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, T, D] rotated by cos and sin [B or 1, T, D]; dtypes as PyTorch promotes them.

    The results are laid out in memory as [B, T, H, D].
    """
    query, key, cos, sin = (_dense(x) for x in (query, key, cos, sin))
    (num_rows, heads, places, width), kv_heads = query.shape, key.shape[1]
    cos, sin = cos.expand(num_rows, -1, -1), sin.expand(num_rows, -1, -1)
    dtype = torch.promote_types(query.dtype, cos.dtype)
    turned = [
        torch.empty((num_rows, places, n, width), dtype=dtype, device=query.device) for n in (heads, kv_heads)
    ]
    tile = min(HEADS_TILE, triton.next_power_of_2(heads))
    tiles = triton.cdiv(heads, tile)
    rotary_kernel[(num_rows * places, tiles + triton.cdiv(kv_heads, tile))](
        *(*_placed(query, 0, 2, 1), *_placed(key, 0, 2, 1), *_placed(cos, 0, 1), *_placed(sin, 0, 1)),
        *turned,
        places,
        HEADS=heads,
        KV_HEADS=kv_heads,
        TILE=tile,
        QUERY_TILES=tiles,
        HALF=width // 2,
        PADDED=triton.next_power_of_2(width // 2),
        num_warps=4,
        enable_fp_fusion=False,  # fusing would skip the rounding of bfloat16 products
    )
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up for two tensors [..., size] of the same shape."""
    size = gate.shape[-1]
    gates, ups = (_dense(x).reshape(-1, size) for x in (gate, up))  # views, even for joined columns
    out = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    block = min(2048, triton.next_power_of_2(size))
    gated_kernel[(len(gates), triton.cdiv(size, block))](
        gates, gates.stride(0), ups, ups.stride(0), out, size, BLOCK=block, num_warps=4
    )
    return out


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attended: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    splits: int | None = None,
) -> Tensor:
    """softmax(cap(scale q k)) v of `query` [B, heads, D] over `keys` and `values` [B, H, S, D].

    Row b sees the last `window` of its `attended[b]` keys. Returns [B, heads, width of V] in the keys' dtype.
    `splits`: programs that share a row's keys; None: chosen for the device.
    """
    query = _dense(query)
    num_rows, num_heads, width = query.shape
    kv_heads, value_width = keys.shape[1], values.shape[3]
    padded, value_padded = (triton.next_power_of_2(max(16, size)) for size in (width, value_width))
    block = max(16, min(128, TILE_BYTES // (max(padded, value_padded) * keys.element_size())))
    if splits is None:
        splits = _splits(query.device, num_rows * kv_heads, triton.cdiv(keys.shape[2], block))
    group = num_heads // kv_heads
    out = torch.empty((num_rows, num_heads, value_width), dtype=keys.dtype, device=keys.device)
    partial, log_mass = out, out
    if splits > 1:
        partial = torch.empty(
            (num_rows, num_heads, splits, value_width), dtype=torch.float32, device=keys.device
        )
        log_mass = torch.empty((num_rows, num_heads, splits), dtype=torch.float32, device=keys.device)
    log2e = 1.4426950408889634
    decode_kernel[(num_rows, kv_heads, splits)](
        *(*_placed(query, 0, 1), *_placed(keys, 0, 1, 2), *_placed(values, 0, 1, 2)),
        *(attended, out, partial, log_mass),
        scale * log2e if softcap is None else scale / softcap,
        (softcap or 0.0) * log2e,
        window or 0,
        GROUP=group,
        LANES=max(16, triton.next_power_of_2(group)),
        WIDTH=width,
        WIDTH_PADDED=padded,
        VALUE_WIDTH=value_width,
        VALUE_PADDED=value_padded,
        BLOCK=block,
        SPLITS=splits,
        CAPPED=softcap is not None,
        WINDOWED=window is not None,
        PRECISION="ieee",
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        combine_kernel[(num_rows * num_heads,)](
            *(partial, log_mass, out),
            WIDTH=value_width,
            WIDTH_PADDED=value_padded,
            SPLITS=splits,
            SPLITS_PADDED=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return out


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """Write key and value [B, H, 1, D] to place `places` [B] of each row of keys and values [B, H, S, D]."""
    key, value, width, value_width = _dense(key), _dense(value), keys.shape[3], values.shape[3]
    store_kernel[(keys.shape[0], keys.shape[1])](
        *(*_placed(key, 0, 1), *_placed(value, 0, 1), *_placed(keys, 0, 1, 2), *_placed(values, 0, 1, 2)),
        places,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        PADDED=triton.next_power_of_2(max(width, value_width)),
        num_warps=1,
    )


def block_statistics(logits: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(peak, mass, moment) of each block of `size` ids of float32 logits [B, V], float64 [B, V / size]."""
    num_rows, num_ids = logits.shape
    size = min(size, num_ids)
    num_blocks = triton.cdiv(num_ids, size)
    peak, mass, moment = (
        torch.empty((num_rows, num_blocks), dtype=torch.float64, device=logits.device) for _ in range(3)
    )
    blocks_kernel[(num_rows, num_blocks)](
        *(logits, logits.stride(0), num_ids, num_blocks, peak, mass, moment),
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        num_warps=4,
    )
    return peak, mass, moment


def _placed(tensor: Tensor, *dims: int) -> tuple[object, ...]:
    """A tensor and its strides along `dims`, as kernel arguments."""
    return tensor, *(tensor.stride(dim) for dim in dims)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor with stride 1 in its last dimension, as the kernels require."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _splits(device: torch.device, num_programs: int, num_blocks: int) -> int:
    """Splits per row and K/V head: enough to fill the device, one if the rows already do."""
    wanted = PROGRAMS_PER_PROCESSOR * _processors(device)
    return max(1, min(MAX_SPLITS, num_blocks, wanted // num_programs))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
