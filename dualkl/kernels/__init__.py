"""The loss and the selection on CUDA, in Triton, reading float32 logits as the matrix product left them.

The loss: `fused` holds the buffers and launches, `dense` and `sparse` the kernels, one for each kind of teacher.
`selection` launches the kernels of `topk`, which find a teacher's most likely ids for `dualkl.compress`. `common`
is what they share. Triton is imported on first use. Without it or without a GPU, and for objective="jsd", teacher
smoothing and gate_on other than "rkl", the loss runs in the plain PyTorch of `dualkl.chunks`. `compress` has its own
plain path. Both are also the kernels' oracles.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from dualkl.config import DualKLConfig
from dualkl.targets import Teacher, TopKTeacher

MAX_SLOTS = 4096
"""Most kept ids of a top-k teacher that the sparse kernel holds in registers; more run in plain PyTorch."""

MAX_SELECTED = 1024
"""Most ids per position that the selection keeps in registers; more run in plain PyTorch."""


def usable(hidden: Tensor, teacher: Teacher, config: DualKLConfig) -> bool:
    """Whether the kernels compute this loss.

    They compute objective="gated" with gate_on="rkl" and no teacher smoothing, for bfloat16 or float32 hidden states
    on CUDA and at most MAX_SLOTS kept ids. Everything else runs in plain PyTorch.
    """
    slots = teacher.ids.shape[1] if isinstance(teacher, TopKTeacher) else 0
    gated_on_rkl = config.objective == "gated" and config.gate_on == "rkl" and config.teacher_smoothing == 0
    on_device = hidden.is_cuda and hidden.dtype != torch.float64 and _has_triton()
    return gated_on_rkl and on_device and slots <= MAX_SLOTS


def selectable(values: Tensor, k: int) -> bool:
    """Whether the kernels select these rows' `k` most likely ids: on CUDA, not float64, at most MAX_SELECTED ids."""
    return values.is_cuda and values.dtype != torch.float64 and k <= MAX_SELECTED and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
