"""Quantised teachers, through transformers: bitsandbytes in 4 or 8 bits, and FP8 in blocks.

Linear layers but the head are stored in few bits and multiplied in the dtype of their inputs. `dualkl doctor`
measures how far such a teacher is from the one in teacher_dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, FineGrainedFP8Config
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.modeling_utils import PreTrainedModel

from stages.runtime.errors import UserError

BYTES = {"bnb-4bit": 0.53, "bnb-8bit": 1.0, "fp8": 1.0}
"""Bytes of a quantised weight, scales included."""
FP8_SINCE = (8, 9)  # compute capability
ADVICE = "set teacher_quantization: none, or run where it is"


def check_available(kind: str, device: torch.device) -> None:
    """Raise UserError if the quantisation cannot be computed on `device`."""
    if kind.startswith("bnb") and find_spec("bitsandbytes") is None:
        raise UserError(
            f"teacher_quantization {kind} needs bitsandbytes, which is not installed here: pip install"
            f" bitsandbytes; or {ADVICE}."
        )
    if kind == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_SINCE):
        raise UserError(
            f"teacher_quantization fp8 needs a GPU of compute capability 8.9 or newer (RTX 4090, L40, H100),"
            f" this is {device.type}; use bnb-8bit, or {ADVICE}."
        )


def loading_settings(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained`; empty for none. Layers are quantised on `device`, where they stay."""
    if kind == "none":
        return {}
    check_available(kind, device)
    found: Any = FineGrainedFP8Config() if kind == "fp8" else None
    if kind == "bnb-4bit":
        found = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if kind == "bnb-8bit":
        found = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": found, "device_map": {"": device}}


def compute_plainly(model: PreTrainedModel) -> None:
    """Make quantised layers multiply by their weights as rounded, in the dtype of their inputs.

    The libraries' 8-bit kernels round the inputs too: that is most of their error (measured: 0.05 of 0.06
    nats for a model of 135M), and makes a row's logits depend on the rows beside it.
    """
    for module in model.modules():
        weight_of = _WEIGHTS.get(type(module).__name__)
        if weight_of is not None:
            module.forward = partial(_forward, module, weight_of)


def _forward(module: nn.Module, weight_of: Callable[[Any], Tensor], x: Tensor) -> Tensor:
    bias: Any = module.bias
    return linear(x, weight_of(module).to(x.dtype), None if bias is None else bias.to(x.dtype))


def _bnb_weight(module: Any) -> Tensor:
    return dequantize_bnb_weight(module.weight, getattr(module, "state", None))


def _fp8_weight(module: Any) -> Tensor:
    """Each block of the weight times its scale."""
    scale = module.weight_scale_inv.float()
    if module.block_size is not None:
        rows, columns = module.weight.shape
        scale = scale.repeat_interleave(module.block_size[0], 0)[:rows]
        scale = scale.repeat_interleave(module.block_size[1], 1)[:, :columns]
    return module.weight.float() * scale


_WEIGHTS = {"Linear4bit": _bnb_weight, "Linear8bitLt": _bnb_weight, "FP8Linear": _fp8_weight}
