"""What an engine's copies of weights, its slots and its captured steps were made from, to be compared before they are used.

Pointers and counted writes alone would miss writes through `.data`, which is how PEFT's `hotswap_adapter` loads an adapter.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def origin_of(model: nn.Module) -> list[object]:
    """Equal lists: the same weights in the same places under the same adapters. One pass over the weights, one wait.

    Where each parameter lies, how often it was written, the sum of its bits, and which adapters are in force: active,
    disabled, merged, scaled.
    """
    parameters = list(model.parameters())
    places = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
    sums = torch.stack([_sum_of_bits(parameter.detach()) for parameter in parameters]).tolist()
    layers = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    return [places, sums, [_adapters(layer) for layer in layers]]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """0-dimensional int64, on the tensor's device: its memory as integers of 8 bytes, added up modulo 2**64."""
    octets = tensor.reshape(-1).view(torch.uint8)
    if len(octets) % 8 or octets.storage_offset() % 8:
        octets = nn.functional.pad(
            octets, (0, -len(octets) % 8)
        )  # a copy, which begins where its memory does
    return octets.view(torch.int64).sum()


def _adapters(layer: BaseTunerLayer | AuxiliaryTrainingWrapper) -> tuple[object, ...]:
    """Scales may be tensors, written in place, where PEFT has prepared a model for hot-swapping."""
    scales = {name: float(scale) for name, scale in getattr(layer, "scaling", {}).items()}
    merged = list(getattr(layer, "merged_adapters", []))
    return list(layer.active_adapters), layer.disable_adapters, merged, scales
