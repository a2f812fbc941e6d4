"""Matrix products, buffers and kernel launches: the CUDA counterpart of `dualkl.chunks.plain_steps`.

Kernels read the float32 logits as written by the matrix product, and apply bias, scale, cap and temperature
in registers. Gradients go to separate buffers, in the dtype of the products that consume them.

Shape suffixes: N positions of the chunk, V vocabulary after the cut, W the rows' padded width, d width of the
hidden states.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dualkl.chunks import Positions, Step, StepResult, sampled_columns, select_sampled
from dualkl.config import DualKLConfig
from dualkl.heads import PreparedHead, prepare_head, row_chunks
from dualkl.kernels import common
from dualkl.kernels.dense import dense_kernel
from dualkl.kernels.sparse import sparse_kernel
from dualkl.targets import HiddenTeacher, LogitsTeacher, Teacher, TopKTeacher

PADDING = 64
"""Row widths are a multiple of this, so each row of logits and gradients is aligned to 128 bytes."""
ROW_MULTIPLE = 256
"""Default chunks and groups are multiples of this many rows, to fill the matrix product's tiles."""
BUFFER_BYTES = 2**30 * 3 // 10
"""Size of a chunk's logits, per model: 512 rows of 151,936 ids.

A group's gradients take twice that: 2,048 rows.
"""


@dataclass
class Launch:
    """Launch parameters: a tile has `lanes` of 4 columns and is processed by `num_warps` warps. Tunable."""

    lanes: int
    num_warps: int


DENSE = Launch(lanes=1024, num_warps=16)
SPARSE = Launch(lanes=512, num_warps=8)


def steps(
    teacher: Teacher,
    head: PreparedHead,
    hidden: Tensor,
    num_ids: int,
    config: DualKLConfig,
    differentiate: bool,
    chunk_rows: int | None,
) -> tuple[Step, Iterable[slice]]:
    """Return the step for a group of positions, with buffers shared by all groups, and the groups.

    Within a group, logits are computed and turned into gradients chunk by chunk. float32 logits are large and
    bfloat16 gradients are not, and the gradient's matrix products are efficient with many rows (each adds to
    the head's gradient in float32).
    """
    num_buffers = 2 if isinstance(teacher, HiddenTeacher) else 1
    groups, chunk_size = groups_of(hidden, chunk_rows, num_ids, num_buffers, head.weight_Vd.dtype)
    group_size, width = max((rows.stop - rows.start for rows in groups), default=0), padded(num_ids)
    student_NW = torch.empty(min(chunk_size, group_size), width, dtype=head.dtype, device=hidden.device)
    gradient_NW = student_NW.new_empty(group_size if differentiate else 0, width, dtype=head.weight_Vd.dtype)
    teacher_head, teacher_NW = None, student_NW
    if isinstance(teacher, HiddenTeacher):
        teacher_head = prepare_head(teacher.lm_head, teacher.hidden, num_ids)
        teacher_NW = torch.empty_like(student_NW, dtype=teacher_head.dtype)

    def chunk_step(rows: slice, part: Positions, gradient_NV: Tensor | None, out_CN: Tensor) -> None:
        logits_NW = student_NW[: len(part.hidden_Nd)]
        head.products(part.hidden_Nd, logits_NW[:, :num_ids])
        if isinstance(teacher, TopKTeacher):
            return topk_rows(logits_NW, head, teacher, rows, part, config, gradient_NV, num_ids, out_CN)
        if teacher_head is not None:
            assert isinstance(teacher, HiddenTeacher)
            target_NV = teacher_NW[: len(logits_NW)]
            source_ND = teacher.hidden.detach()[rows].to(teacher_head.weight_Vd.dtype)
            teacher_head.products(source_ND, target_NV[:, :num_ids])
        else:
            assert isinstance(teacher, LogitsTeacher)
            target_NV = teacher.logits.detach()[rows, :num_ids]
        return dense_rows(
            logits_NW, head, target_NV, teacher_head, part, config, gradient_NV, num_ids, out_CN
        )

    def step(rows: slice, group: Positions, hidden_Nd: Tensor) -> tuple[StepResult, Tensor | None]:
        num_rows = len(hidden_Nd)
        num_columns = (
            common.FLOORED if isinstance(teacher, TopKTeacher) else common.STUDENT_LOGPROB
        ).value + 1
        out_CN = torch.empty(num_columns, num_rows, device=hidden.device)
        gradient_NV = gradient_NW[:num_rows, :num_ids] if differentiate else None
        for start in range(0, num_rows, chunk_size):
            own = slice(start, min(start + chunk_size, num_rows))
            sampled, gate_inputs = select_sampled(group.sampled, own), group.gate_inputs.select(own)
            part = Positions(hidden_Nd[own], group.weights_N[own], None, sampled, gate_inputs)
            chunk = slice(rows.start + own.start, rows.start + own.stop)
            chunk_step(chunk, part, None if gradient_NV is None else gradient_NV[own], out_CN[:, own])
        return _result(out_CN, group), gradient_NV

    return step, groups


def groups_of(
    hidden: Tensor, chunk_rows: int | None, num_ids: int, num_buffers: int, dtype: torch.dtype
) -> tuple[list[slice], int]:
    """Return groups of positions whose gradients (in `dtype`) coexist, and the chunk size in positions.

    With `chunk_rows`, both have at most that many positions. By default they are multiples of ROW_MULTIPLE:
    each of `num_buffers` logits buffers fits BUFFER_BYTES and the gradients twice that, or less on a small
    device, so that all buffers fit 1/16 of its memory.
    """
    num_rows = hidden.shape[0]
    if chunk_rows is not None or num_rows == 0:
        return list(row_chunks(num_rows, chunk_rows, num_ids, num_buffers, hidden)), chunk_rows or 1
    unit = BUFFER_BYTES
    if hidden.is_cuda:
        memory = torch.cuda.get_device_properties(hidden.device).total_memory
        unit = min(unit, memory // 16 // (num_buffers + 2))
    chunk = _multiple(unit // (4 * padded(num_ids)))
    limit = max(chunk, _multiple(2 * unit // (dtype.itemsize * padded(num_ids))))
    even = -(-num_rows // -(-num_rows // limit))
    size = min(limit, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)], chunk


def _multiple(num_rows: int) -> int:
    return max(1, num_rows if num_rows < ROW_MULTIPLE else num_rows // ROW_MULTIPLE * ROW_MULTIPLE)


def padded(num_ids: int) -> int:
    """Return the padded width of a row of `num_ids` logits."""
    return -(-num_ids // PADDING) * PADDING


def dense_rows(
    logits_NW: Tensor,
    head: PreparedHead,
    teacher_NV: Tensor,
    teacher_head: PreparedHead | None,
    chunk: Positions,
    config: DualKLConfig,
    gradient_NV: Tensor | None,
    num_ids: int,
    out_CN: Tensor,
) -> None:
    """`dualkl.chunks.dense_step` on raw products. Without a teacher head, teacher rows are logits.

    Such logits may have any dtype. Inputs are not modified. Fills `gradient_NV`, of any floating dtype, and
    `out_CN`, by the columns of `common`.
    """
    if teacher_NV.stride(1) != 1:
        teacher_NV = teacher_NV.contiguous()
    bias_V, inner, outer = activation(head, config.temperature)
    teacher_bias_V, teacher_inner, teacher_outer = activation(teacher_head, config.temperature)
    if len(logits_NW):
        dense_kernel[(len(logits_NW),)](
            *(logits_NW, logits_NW.stride(0), logits_NW.shape[1], num_ids, bias_V, inner, outer),
            *(
                teacher_NV,
                teacher_NV.stride(0),
                teacher_NV.shape[1],
                teacher_bias_V,
                teacher_inner,
                teacher_outer,
            ),
            *_common_arguments(logits_NW, head, chunk, config, gradient_NV, out_CN),
            LANES=DENSE.lanes,
            STUDENT_CAPPED=head.softcap is not None,
            TEACHER_CAPPED=teacher_head is not None and teacher_head.softcap is not None,
            **_common_constants(config, gradient_NV),
            num_warps=DENSE.num_warps,
            enable_fp_fusion=True,
        )


def topk_rows(
    logits_NW: Tensor,
    head: PreparedHead,
    teacher: TopKTeacher,
    rows: slice,
    chunk: Positions,
    config: DualKLConfig,
    gradient_NV: Tensor | None,
    num_ids: int,
    out_CN: Tensor,
) -> None:
    """`dualkl.chunks.topk_step` on raw products. Overwrites the kept logits; outputs as `dense_rows`."""
    ids_NK, logprobs_NK = teacher.ids[rows].contiguous(), teacher.logprobs.detach()[rows].contiguous()
    bias_V, inner, outer = activation(head, config.temperature)
    if len(logits_NW):
        sparse_kernel[(len(logits_NW),)](
            *(logits_NW, logits_NW.stride(0), logits_NW.shape[1], num_ids, bias_V, inner, outer),
            *(ids_NK, logprobs_NK, teacher.log_tail_mass.detach()[rows].contiguous(), ids_NK.shape[1]),
            math.log(config.tail_floor) if config.tail_floor > 0 else -math.inf,
            *_common_arguments(logits_NW, head, chunk, config, gradient_NV, out_CN),
            LANES=SPARSE.lanes,
            SLOTS=triton.next_power_of_2(ids_NK.shape[1]),
            STUDENT_CAPPED=head.softcap is not None,
            **_common_constants(config, gradient_NV),
            num_warps=SPARSE.num_warps,
            enable_fp_fusion=True,
        )


def activation(head: PreparedHead | None, temperature: float) -> tuple[Tensor | None, float, float]:
    """Return (bias, inner, outer) for `common.activate`; the identity if `head` is None."""
    if head is None:
        return None, 1 / temperature, 1.0
    if head.softcap is None:
        return head.bias_V, head.scale / temperature, 1.0
    return head.bias_V, head.scale / head.softcap, head.softcap / temperature


def _common_arguments(
    logits_NW: Tensor,
    head: PreparedHead,
    chunk: Positions,
    config: DualKLConfig,
    gradient_NV: Tensor | None,
    out_CN: Tensor,
) -> tuple[object, ...]:
    gradient = logits_NW if gradient_NV is None else gradient_NV
    sampled, tau_N = chunk.sampled, chunk.gate_inputs.tau_N
    columns = (None, None, None) if sampled is None else [x.contiguous() for x in sampled_columns(sampled)]
    return (
        *(gradient, gradient.stride(0), head.scale / config.temperature, chunk.weights_N.contiguous()),
        *columns,
        *(out_CN, out_CN.stride(0)),
        *(config.tau, None if tau_N is None else tau_N.contiguous()),
        *(config.alpha, config.mix, math.log(config.importance_cap)),
    )


def _common_constants(config: DualKLConfig, gradient_NV: Tensor | None) -> dict[str, object]:
    gating = {"soft": common.SOFT, "hard": common.HARD, "fixed": common.FIXED}[config.gating]
    return {
        "GATING": gating.value,
        "MC": config.rkl == "mc",
        "ARGMAX": config.fkl == "argmax",
        "GRADIENT": gradient_NV is not None,
    }


def _result(out_CN: Tensor, chunk: Positions) -> StepResult:
    rkl_N, fkl_N, gate_N, loss_N, logprob_N, *rest = out_CN
    tail_N, floored_N = rest if rest else (None, None)
    return StepResult(
        rkl_N, fkl_N, gate_N, loss_N, None if chunk.sampled is None else logprob_N, tail_N, floored_N
    )
