"""Buffers and launches of the top-k selection, the CUDA path of `dualkl.compress`.

Shape suffixes: N positions, W the rows' width, K kept ids, C columns of statistics.
"""

import torch
import triton
from torch import Tensor

from dualkl.heads import PreparedHead
from dualkl.kernels import topk
from dualkl.kernels.common import VECTOR
from dualkl.kernels.fused import activation
from dualkl.kernels.topk import choose_kernel, groups_kernel, pick_kernel
from dualkl.logprobs import LEAST_LOGPROB

LANES = 512
STEPS = 8
"""A group has STEPS * 4 ids; a program of `groups_kernel` reads LANES groups."""


def largest(
    logits_NW: Tensor, num_ids: int, head: PreparedHead | None, temperature: float, sampled_N: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the k largest logits per row, as ids and logprobs, with tail mass and statistics.

    Rows are raw products (logits if `head` is None), of which the first `num_ids` columns count; they are not
    modified. Returns ids [N, K] in descending probability, their logprobs, ln of the mass of all other ids,
    the entropy, and the sampled ids' logprobs (NaN for an id outside the vocabulary). Ties are ordered by id;
    which of several equal logits make the cut is arbitrary but deterministic. Impossible ids have logprob
    LEAST_LOGPROB. A row with NaN or +inf, or without any possible id, is NaN.
    """
    num_rows, (bias_V, inner, outer) = len(logits_NW), activation(head, temperature)
    if logits_NW.stride(1) != 1:
        logits_NW = logits_NW.contiguous()
    per_segment = STEPS * LANES * VECTOR.value
    num_segments = -(-num_ids // per_segment)
    last_segment = num_ids - (num_segments - 1) * per_segment
    num_hits = min(k, (num_segments - 1) * LANES + min(LANES, -(-last_segment // VECTOR.value)))
    maxima = torch.empty(num_rows, num_segments, LANES, device=logits_NW.device)
    sums, parts = torch.empty_like(maxima), maxima.new_empty(num_rows, num_segments, 3)
    hits = torch.empty(num_rows, num_hits, dtype=torch.int32, device=logits_NW.device)
    packed_NK = torch.empty(num_rows, k, dtype=torch.int64, device=logits_NW.device)
    out_CN = maxima.new_empty(topk.LOG_TAIL.value + 1, num_rows)
    source = (logits_NW, logits_NW.stride(0))
    head_arguments, columns = (num_ids, bias_V, inner, outer), (out_CN, num_rows)
    capped = head is not None and head.softcap is not None
    shape = {"LANES": LANES, "STEPS": STEPS, "CAPPED": capped, "enable_fp_fusion": True}
    if num_rows:
        groups_kernel[(num_rows, num_segments)](
            *source,
            logits_NW.shape[1],
            *head_arguments,
            maxima,
            sums,
            parts,
            num_segments,
            **shape,
            num_warps=4,
        )
        choose_kernel[(num_rows,)](
            *(
                *source,
                *head_arguments,
                sampled_N.contiguous(),
                maxima,
                sums,
                parts,
                hits,
                num_hits,
                *columns,
            ),
            num_segments,
            SEGMENTS=triton.next_power_of_2(num_segments),
            **shape,
            num_warps=16,
        )
        slots = triton.next_power_of_2(num_hits)
        pick_kernel[(num_rows,)](
            *(*source, *head_arguments, hits, num_hits, packed_NK, k, *columns),
            HITS=slots,
            **shape,
            num_warps=warps_for(slots * STEPS * VECTOR.value),
        )
    row_max_N, log_total_N, entropy_N, sampled_logprob_N, _, _, log_tail_N = out_CN
    ids_NK, logits_NK = unpack(packed_NK.sort(dim=1, descending=True).values)
    logprobs_NK = (logits_NK - row_max_N[:, None]).sub_(log_total_N[:, None]).clamp_(min=LEAST_LOGPROB)
    return ids_NK, logprobs_NK, log_tail_N, entropy_N, sampled_logprob_N


def warps_for(num_values: int) -> int:
    """Return the number of warps (4 to 16) that hold `num_values` in registers, 16 per thread."""
    return max(4, min(16, num_values // 512))


def unpack(packed_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack keys to (ids, float32 logits)."""
    keys_NK = (packed_NK >> 32).int()
    bits_NK = keys_NK ^ ((keys_NK >> 31) & topk.ID_BITS.value)
    return (packed_NK & topk.ID_BITS.value) ^ topk.ID_BITS.value, bits_NK.view(torch.float32)
