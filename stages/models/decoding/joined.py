"""Linear layers of one input as one product: apart, those of a decode step's few rows leave much of a GPU idle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names that siblings of one input have. Layers of these names with inputs of their own still give what they should."""


class JoinedLinear(nn.Linear):
    """One of several linear layers of one input, its weight a part of theirs.

    The first of them multiplies by all; the others take their columns of that if they are called with the same tensor,
    unchanged (`_state`), and multiply by themselves if not. The last gives the product up. For the engine, which has no
    gradients: with them, and for inference tensors, whose changes are not counted, each multiplies by itself.
    """

    _together: _Together
    _index: int

    def forward(self, input: Tensor) -> Tensor:
        return self._together.columns(input, self._index)


class _Product(NamedTuple):
    """The columns of all layers, and what they are of: this tensor (held, so that no other takes its place), as it was."""

    input: Tensor
    state: tuple[object, ...]
    columns: tuple[Tensor, ...]


class _Together:
    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> None:
        self.weight, self.bias, self.sizes = weight, bias, sizes
        self._product: _Product | None = None  # whole or not at all, whatever goes wrong or runs beside it

    def columns(self, input: Tensor, index: int) -> Tensor:
        if torch.is_grad_enabled() or input.is_inference():
            return self._alone(input, index)
        state = _state(input)
        if index == 0:
            self._product = None  # its memory first
            columns = nn.functional.linear(input, self.weight, self.bias).split(self.sizes, -1)
            self._product = _Product(input, state, columns)
        product = self._product
        if product is None or product.input is not input or product.state != state:
            return self._alone(input, index)
        if index == len(self.sizes) - 1:
            self._product = None
        return product.columns[index]

    def _alone(self, input: Tensor, index: int) -> Tensor:
        bias = None if self.bias is None else self.bias.split(self.sizes)[index]
        return nn.functional.linear(input, self.weight.split(self.sizes)[index], bias)


def _state(input: Tensor) -> tuple[object, ...]:
    """All that a product depends on besides which tensor it is of: writes are counted, views' too, `.data` may be replaced.

    A graph may read only what was made in its capture, and nobody what a capture has not made yet.
    """
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    is_captured = input.is_cuda and torch.cuda.is_current_stream_capturing()
    return input._version, input.data_ptr(), input.shape, input.stride(), dtype, is_captured


def join(layers: list[nn.Module]) -> list[JoinedLinear] | None:
    """The same layers with one weight, or None for layers that are not plain linear ones of one input and dtype."""
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    kinds = {
        (layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in plain
    }
    if len(plain) < len(layers) or len(kinds) != 1:
        return None
    weight = torch.cat([layer.weight.detach() for layer in plain])
    bias = None if plain[0].bias is None else torch.cat([layer.bias.detach() for layer in plain])
    together = _Together(weight, bias, [layer.out_features for layer in plain])
    joined = []
    for index, (layer, part) in enumerate(zip(plain, weight.split(together.sizes), strict=True)):
        own = JoinedLinear(layer.in_features, layer.out_features, bias=False, device="meta")
        own.weight = nn.Parameter(part, requires_grad=False)
        own._together, own._index = together, index
        joined.append(own.eval())
    return joined
