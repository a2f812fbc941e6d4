"""Check that an engine generates with the weights being trained.

Engines may merge, join or cast layers, but outputs stay comparable: a few tokens of each layer's first call
are compared with W x + s B A x in fp32. Rounding errors are not correlated
with the adapter's output; a missing, outdated or wrongly scaled adapter leaves an error along s B A x.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

TOKENS = 64
"""Number of tokens compared per layer, from its first call."""

LEAST_ERROR = 1e-6  # minimum standard error of a share: rounding of fp32 sums


@dataclass(frozen=True)
class Seen:
    """Result of one layer.

    `share`: excess of the adapter's part in the output (-1: the adapter is missing); `error`: its standard
    error. `rounding`: RMS of the remaining difference, relative to that of the layer's own rounding.
    """

    name: str
    share: float
    error: float
    rounding: float


@dataclass(frozen=True)
class _Layer:
    module: nn.Module
    base: nn.Linear
    update: tuple[Tensor, Tensor, float] | None  # A, B (copies), s


class Witness:
    """In `watching`, compare each linear layer's first call in `decoder`, plain or with one plain adapter."""

    def __init__(self, decoder: nn.Module, compute_dtype: torch.dtype) -> None:
        self._decoder, self._dtype = decoder, compute_dtype
        self._layers: dict[str, _Layer] = {}
        for name, module in decoder.named_modules():
            layer = _layer(module)
            if layer is not None and not any(name.startswith(f"{outer}.") for outer in self._layers):
                self._layers[name] = layer
        self._names: dict[nn.Module, str | None] = {}
        self._found: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        hook = nn.modules.module.register_module_forward_hook(self._see)
        try:
            yield
        finally:
            hook.remove()
            self._names = {}

    def seen(self) -> list[Seen]:
        """Results in call order. Synchronises with the device."""
        if not self._found:
            return []
        rows = torch.stack(list(self._found.values())).tolist()
        return [Seen(name, *row) for name, row in zip(self._found, rows, strict=True)]

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if module not in self._names:  # an engine's layers replace the model's own under the same names
            names = {found: name for name, found in self._decoder.named_modules()}
            self._names |= names | {module: names.get(module)}
        name = self._names[module]
        if name in self._layers and name not in self._found and len(inputs) == 1:
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self._found[name] = self._compare(self._layers[name], inputs[0], output)

    def _compare(self, layer: _Layer, x: Tensor, y: Tensor) -> Tensor:
        """[3] float32: share, its error, rounding (see `Seen`)."""
        x_TK, y_TN = (part.detach().reshape(-1, part.shape[-1])[:TOKENS] for part in (x, y))
        weight_NK = layer.base.weight.detach().to(self._dtype)
        bias_N = None if layer.base.bias is None else layer.base.bias.detach()
        exact_TN = nn.functional.linear(
            x_TK.to(self._dtype).float(), weight_NK.float(), None if bias_N is None else bias_N.float()
        )
        own_TN = exact_TN.to(self._dtype).float() - exact_TN
        left_TN = y_TN.float() - exact_TN
        share = error = torch.zeros((), device=y.device)
        if layer.update is not None:
            a_rK, b_Nr, scale = layer.update
            part_TN = scale * (x_TK.float() @ a_rK.float().t()) @ b_Nr.float().t()
            left_TN -= part_TN
            share, error = slope((part_TN * left_TN).sum(0), part_TN.square().sum(0))
            left_TN = left_TN - share * part_TN
        smallest = 1e-6 * exact_TN.square().mean().sqrt() + 1e-30  # the rounding of sums in fp32
        rounding = left_TN.square().mean().sqrt() / (own_TN.square().mean().sqrt() + smallest)
        return torch.stack([share, error, rounding])


def slope(product_G: Tensor, square_G: Tensor) -> tuple[Tensor, Tensor]:
    """Slope c of y = c x + rest and its standard error (jackknife over groups), both 0-dimensional.

    `product_G`, `square_G`: sums of x y and x x over independent groups of samples. The error is large if a
    single group determines c.
    """
    total = square_G.sum()
    if not total:
        return torch.zeros_like(total), torch.zeros_like(total)
    share = product_G.sum() / total
    left_G = (product_G - share * square_G) / (1 - square_G / total).clamp_min(1e-3)
    return share, (left_G.square().sum().sqrt() / total).clamp_min(LEAST_ERROR)


def _layer(module: nn.Module) -> _Layer | None:
    """A plain linear layer, or one with a single plain active adapter; None for other modules."""
    if type(module) is nn.Linear:
        return _Layer(module, module, None)
    if (
        not isinstance(module, LoraLinear)
        or module.disable_adapters
        or module.merged
        or module.fan_in_fan_out
    ):
        return None
    base = module.get_base_layer()
    names = [name for name in module.active_adapters if name in module.lora_A]
    if type(base) is not nn.Linear or len(names) != 1 or names[0] in module.lora_variant:
        return None
    a, b = (cast(nn.Linear, side[names[0]]) for side in (module.lora_A, module.lora_B))
    if b.bias is not None:
        return None
    return _Layer(
        module, base, (a.weight.detach().clone(), b.weight.detach().clone(), float(module.scaling[names[0]]))
    )
