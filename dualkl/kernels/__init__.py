"""Triton kernels for the loss and for top-k selection, on float32 logits as written by the matrix product.

Loss: `fused` holds buffers and launches, `dense` and `sparse` one kernel per kind of teacher. Selection:
`selection` launches the kernels of `topk`, which find a teacher's most likely ids for `dualkl.compress`.
`common` holds code shared by the loss kernels. Triton is imported on first use. Without Triton or a GPU, and
for objective="jsd", teacher smoothing and gate_on other than "rkl", the loss runs in plain PyTorch
(`dualkl.chunks`). `compress` has its own plain path. The plain paths are the kernels' test oracles.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from dualkl.config import DualKLConfig
from dualkl.targets import Teacher, TopKTeacher

MAX_SLOTS = 4096
"""Maximum kept ids of a top-k teacher in the sparse kernel's registers; larger K runs in plain PyTorch."""

MAX_SELECTED = 1024
"""Maximum ids per position in the selection's registers; larger k runs in plain PyTorch."""


def usable(hidden: Tensor, teacher: Teacher, config: DualKLConfig) -> bool:
    """Return whether the kernels support this loss.

    They support objective="gated" with gate_on="rkl" and no teacher smoothing, for bfloat16 or float32 hidden
    states on CUDA and at most MAX_SLOTS kept ids. Everything else runs in plain PyTorch.
    """
    slots = teacher.ids.shape[1] if isinstance(teacher, TopKTeacher) else 0
    gated_on_rkl = config.objective == "gated" and config.gate_on == "rkl" and config.teacher_smoothing == 0
    on_device = hidden.is_cuda and hidden.dtype != torch.float64 and _has_triton()
    return gated_on_rkl and on_device and slots <= MAX_SLOTS


def selectable(values: Tensor, k: int) -> bool:
    """Return whether the selection kernels support this input: CUDA, not float64, k <= MAX_SELECTED."""
    return values.is_cuda and values.dtype != torch.float64 and k <= MAX_SELECTED and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
