"""Linear layers with the same input as one matmul: each alone leaves much of a GPU idle when decoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of siblings that share an input. Layers with these names but other inputs still work."""


class JoinedLinear(nn.Linear):
    """One of several linear layers with the same input; its weight is a slice of the joined weight.

    Calling the first runs the joined matmul; the others return their columns of it, and the last frees it. A
    layer runs its own matmul if its input is not the tensor of the joined one or has changed since
    (`_state`), if gradients are on, and for inference tensors, which have no version counter.
    """

    _together: _Together
    _index: int

    def forward(self, input: Tensor) -> Tensor:
        return self._together.columns(input, self._index)


class _Product(NamedTuple):
    """Columns of all layers, their input (kept alive so that its identity stays unique) and its state."""

    input: Tensor
    state: tuple[object, ...]
    columns: tuple[Tensor, ...]


class _Together:
    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> None:
        self.weight, self.bias, self.sizes = weight, bias, sizes
        self._product: _Product | None = None  # replaced as a whole: safe under errors and threads

    def columns(self, input: Tensor, index: int) -> Tensor:
        if torch.is_grad_enabled() or input.is_inference():
            return self._alone(input, index)
        state = _state(input)
        if index == 0:
            self._product = None  # frees its memory first
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
    """Everything a product depends on besides the identity of its input.

    The version counts writes, also through views; the address changes if `.data` is replaced. A graph may
    only read products of its own capture, and code outside must not read those.
    """
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    is_captured = input.is_cuda and torch.cuda.is_current_stream_capturing()
    return input._version, input.data_ptr(), input.shape, input.stride(), dtype, is_captured


def join(layers: list[nn.Module]) -> list[JoinedLinear] | None:
    """The layers with one joined weight; None unless all are plain linear layers of one width and dtype."""
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
