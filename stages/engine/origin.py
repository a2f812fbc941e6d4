"""Detect model changes that invalidate the engine's merged weights and captured steps.

Pointers and version counters alone miss writes through `.data`, which is how PEFT's `hotswap_adapter` loads
an adapter.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def origin_of(model: nn.Module) -> list[object]:
    """A list that changes if the weights, their addresses or the adapters change.

    It holds each parameter's address, version counter and sum of bits, and each adapted layer's active,
    disabled, merged and scaled adapters. Reads the weights and waits for the device once.
    """
    parameters = list(model.parameters())
    places = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
    sums = torch.stack([_sum_of_bits(parameter.detach()) for parameter in parameters]).tolist()
    layers = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    return [places, sums, [_adapters(layer) for layer in layers]]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Sum of the tensor's memory as 8-byte integers, modulo 2**64: a scalar int64 on its device."""
    octets = tensor.reshape(-1).view(torch.uint8)
    if len(octets) % 8 or octets.storage_offset() % 8:
        octets = nn.functional.pad(octets, (0, -len(octets) % 8))  # a copy, hence aligned
    return octets.view(torch.int64).sum()


def _adapters(layer: BaseTunerLayer | AuxiliaryTrainingWrapper) -> tuple[object, ...]:
    """Active, disabled and merged adapters, and scales: tensors in models prepared for hot-swapping."""
    scales = {name: float(scale) for name, scale in getattr(layer, "scaling", {}).items()}
    merged = list(getattr(layer, "merged_adapters", []))
    return list(layer.active_adapters), layer.disable_adapters, merged, scales
