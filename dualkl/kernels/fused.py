"""Products, buffers and launches: what the loop over chunks calls on CUDA in place of `dualkl.steps.plain_steps`.

Logits stay in the float32 rows that the matrix product wrote. Bias, scale, cap and temperature are applied in
registers, and the gradient overwrites the student's row, in the dtype of the products that follow.

Shape suffixes: N positions of the chunk, V vocabulary after the cut, W the rows' padded width, d width of the hidden
states.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dualkl.config import DualKLConfig
from dualkl.heads import PreparedHead, prepare_head, row_chunks
from dualkl.kernels import common
from dualkl.kernels.dense import dense_kernel
from dualkl.kernels.sparse import sparse_kernel
from dualkl.steps import Positions, Step, StepResult, sampled_columns
from dualkl.targets import HiddenTeacher, LogitsTeacher, Teacher, TopKTeacher

PADDING = 64
"""Columns that a row's width is a multiple of: each row, and the gradient in its upper half, starts at 128 bytes."""
ROW_MULTIPLE = 128
"""Rows that a default chunk is a multiple of: a matrix product's tile would otherwise be partly empty."""


@dataclass
class Launch:
    """How a kernel runs: `lanes` of 4 columns are a tile, walked by `num_warps` warps. A bench may set either."""

    lanes: int
    num_warps: int


DENSE = Launch(lanes=1024, num_warps=16)
SPARSE = Launch(lanes=2048, num_warps=16)


def steps(
    teacher: Teacher,
    head: PreparedHead,
    hidden: Tensor,
    num_ids: int,
    config: DualKLConfig,
    differentiate: bool,
    chunk_rows: int | None,
) -> tuple[Step, Iterable[slice]]:
    """The step over buffers that all chunks share, and the chunks."""
    num_buffers = 2 if isinstance(teacher, HiddenTeacher) else 1
    chunks = fused_chunks(hidden, chunk_rows, num_ids, num_buffers)
    num_rows, width = max((rows.stop - rows.start for rows in chunks), default=0), padded(num_ids)
    student_NW = torch.empty(num_rows, width, dtype=head.dtype, device=hidden.device)
    teacher_head, teacher_NW = None, student_NW
    if isinstance(teacher, HiddenTeacher):
        teacher_head = prepare_head(teacher.lm_head, teacher.hidden, num_ids)
        teacher_NW = torch.empty(num_rows, width, dtype=teacher_head.dtype, device=hidden.device)

    def step(rows: slice, chunk: Positions, hidden_Nd: Tensor) -> tuple[StepResult, Tensor | None]:
        num_rows = len(hidden_Nd)
        logits_NW = student_NW[:num_rows]
        head.products(hidden_Nd, logits_NW[:, :num_ids])
        gradient_NV = gradient_view(logits_NW, num_ids, head.weight_Vd.dtype) if differentiate else None
        if isinstance(teacher, TopKTeacher):
            return topk_rows(logits_NW, head, teacher, rows, chunk, config, gradient_NV, num_ids), gradient_NV
        if teacher_head is not None:
            assert isinstance(teacher, HiddenTeacher)
            target_NV = teacher_NW[:num_rows]
            source_ND = teacher.hidden.detach()[rows].to(teacher_head.weight_Vd.dtype)
            teacher_head.products(source_ND, target_NV[:, :num_ids])
        else:
            assert isinstance(teacher, LogitsTeacher)
            target_NV = teacher.logits.detach()[rows, :num_ids]
        return dense_rows(logits_NW, head, target_NV, teacher_head, chunk, config, gradient_NV, num_ids), gradient_NV

    return step, chunks


def fused_chunks(hidden: Tensor, chunk_rows: int | None, num_ids: int, num_buffers: int) -> list[slice]:
    """Slices of at most `chunk_rows` positions, as `row_chunks`.

    Without it, multiples of ROW_MULTIPLE positions that keep the buffers within 0.94 GiB (student) or 1.4 GiB (student
    and teacher), and within a sixteenth of the device's memory.
    """
    num_rows = hidden.shape[0]
    if chunk_rows is not None or num_rows == 0:
        return list(row_chunks(num_rows, chunk_rows, num_ids, num_buffers, hidden))
    budget = (num_buffers + 1) * 2**30 * 15 // 32
    if hidden.is_cuda:
        budget = min(budget, torch.cuda.get_device_properties(hidden.device).total_memory // 16)
    limit = budget // (num_buffers * 4 * padded(num_ids))
    limit = max(1, limit if limit < ROW_MULTIPLE else limit // ROW_MULTIPLE * ROW_MULTIPLE)
    even = -(-num_rows // -(-num_rows // limit))
    size = min(limit, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def padded(num_ids: int) -> int:
    """Columns of a row that holds `num_ids` logits."""
    return -(-num_ids // PADDING) * PADDING


def gradient_view(logits_NW: Tensor, num_ids: int, dtype: torch.dtype) -> Tensor:
    """Where in a chunk's logits their gradient goes: over them, or (half their size) over the upper half of each row."""
    width = logits_NW.shape[1]
    return logits_NW.view(dtype)[:, -width:][:, :num_ids]


def dense_rows(
    logits_NW: Tensor,
    head: PreparedHead,
    teacher_NV: Tensor,
    teacher_head: PreparedHead | None,
    chunk: Positions,
    config: DualKLConfig,
    gradient_NV: Tensor | None,
    num_ids: int,
) -> StepResult:
    """`dualkl.steps.dense_step` on raw products. Teacher rows without a head are finished logits of any dtype.

    The teacher is not changed; `gradient_NV` is a `gradient_view` of the student's logits.
    """
    if teacher_NV.stride(1) != 1:
        teacher_NV = teacher_NV.contiguous()
    bias_V, inner, outer = _activation(head, config.temperature)
    teacher_bias_V, teacher_inner, teacher_outer = _activation(teacher_head, config.temperature)
    out_CN = torch.empty(common.STUDENT_LOGPROB.value + 1, len(logits_NW), device=logits_NW.device)
    if len(logits_NW):
        dense_kernel[(len(logits_NW),)](
            *(logits_NW, logits_NW.stride(0), logits_NW.shape[1], num_ids, bias_V, inner, outer),
            *(teacher_NV, teacher_NV.stride(0), teacher_NV.shape[1], teacher_bias_V, teacher_inner, teacher_outer),
            *_common_arguments(logits_NW, head, chunk, config, gradient_NV, out_CN),
            LANES=DENSE.lanes,
            STUDENT_CAPPED=head.softcap is not None,
            TEACHER_CAPPED=teacher_head is not None and teacher_head.softcap is not None,
            **_common_constants(logits_NW, config, gradient_NV),
            num_warps=DENSE.num_warps,
            enable_fp_fusion=True,
        )
    return _result(out_CN, chunk)


def topk_rows(
    logits_NW: Tensor,
    head: PreparedHead,
    teacher: TopKTeacher,
    rows: slice,
    chunk: Positions,
    config: DualKLConfig,
    gradient_NV: Tensor | None,
    num_ids: int,
) -> StepResult:
    """`dualkl.steps.topk_step` on raw products, which lose their kept logits even without a gradient."""
    ids_NK, logprobs_NK = teacher.ids[rows].contiguous(), teacher.logprobs.detach()[rows].contiguous()
    bias_V, inner, outer = _activation(head, config.temperature)
    out_CN = torch.empty(common.FLOORED.value + 1, len(logits_NW), device=logits_NW.device)
    if len(logits_NW):
        sparse_kernel[(len(logits_NW),)](
            *(logits_NW, logits_NW.stride(0), logits_NW.shape[1], num_ids, bias_V, inner, outer),
            *(ids_NK, logprobs_NK, teacher.log_tail_mass.detach()[rows].contiguous(), ids_NK.shape[1]),
            math.log(config.tail_floor) if config.tail_floor > 0 else -math.inf,
            *_common_arguments(logits_NW, head, chunk, config, gradient_NV, out_CN),
            LANES=SPARSE.lanes,
            SLOTS=triton.next_power_of_2(ids_NK.shape[1]),
            STUDENT_CAPPED=head.softcap is not None,
            **_common_constants(logits_NW, config, gradient_NV),
            num_warps=SPARSE.num_warps,
            enable_fp_fusion=True,
        )
    return _result(out_CN, chunk)


def _activation(head: PreparedHead | None, temperature: float) -> tuple[Tensor | None, float, float]:
    """(bias, inner, outer) of `common.activate`; no head is the identity."""
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
    sampled = chunk.sampled
    columns = (None, None, None) if sampled is None else [x.contiguous() for x in sampled_columns(sampled)]
    return (
        *(gradient, gradient.stride(0), head.scale / config.temperature, chunk.weights_N.contiguous()),
        *columns,
        *(out_CN, out_CN.stride(0)),
        *(config.tau, config.alpha, config.mix, math.log(config.importance_cap)),
    )


def _common_constants(logits_NW: Tensor, config: DualKLConfig, gradient_NV: Tensor | None) -> dict[str, object]:
    gating = {"soft": common.SOFT, "hard": common.HARD, "fixed": common.FIXED}[config.gating]
    return {
        "GATING": gating.value,
        "MC": config.rkl == "mc",
        "ARGMAX": config.fkl == "argmax",
        "GRADIENT": gradient_NV is not None,
        "HALVED": gradient_NV is not None and gradient_NV.dtype != logits_NW.dtype,
    }


def _result(out_CN: Tensor, chunk: Positions) -> StepResult:
    rkl_N, fkl_N, gate_N, loss_N, logprob_N, *rest = out_CN
    tail_N, floored_N = rest if rest else (None, None)
    return StepResult(rkl_N, fkl_N, gate_N, loss_N, None if chunk.sampled is None else logprob_N, tail_N, floored_N)
