"""What the engine reads in place of a model's own layers, which stay untouched: merged, cast once, joined, fused."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from stages.models.decoding.fused import fused_mlp, fused_norm, fused_rotaries
from stages.models.decoding.joined import JOINED, join


@dataclass(frozen=True)
class _Swap:
    parent: nn.Module
    name: str
    own: nn.Module
    fast: nn.Module


class DecodingWeights:
    """Plain linear layers in place of a decoder's adapted or fp32-under-autocast ones, for as long as `swapped` lasts.

    On CUDA layers of one input as one product (`joined`), what lies between products in fewer launches (`fused`).
    W + s B A is summed in fp32 and rounded once, stochastically (`_rounded`). LoRA layers of another kind than plain LoRA
    on a linear layer (DoRA, LoRA with a bias) stay as they are: they decode right, through their adapter.
    """

    def __init__(self, decoder: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        """`autocast_dtype`: the dtype in which autocast multiplies, None without autocast."""
        self._decoder, self._swaps = decoder, dict[str, _Swap]()
        self._fused = _on_cuda(decoder)
        adapted = ""
        for name, module in decoder.named_modules():
            if adapted and name.startswith(adapted):
                continue
            fast: nn.Module | None = None
            if isinstance(module, LoraLinear):
                adapted = f"{name}."
                fast = _merged(module, autocast_dtype, seed=zlib.crc32(name.encode()))
            elif type(module) is nn.Linear and autocast_dtype not in (None, module.weight.dtype):
                fast = _linear(module.weight.detach().to(autocast_dtype), module.bias)
            elif self._fused:
                fast = fused_norm(module) or fused_mlp(module, next(decoder.parameters()))
            if fast is not None:
                parent, _, leaf = name.rpartition(".")
                self._swaps[name] = _Swap(decoder.get_submodule(parent), leaf, module, fast)
        if self._fused:
            self._join()

    def _join(self) -> None:
        """Layers that are copied anyway: others would be held twice."""
        for name, _ in self._decoder.named_modules():
            for leaves in JOINED:
                places = [f"{name}.{leaf}" for leaf in leaves]
                if all(place in self._swaps for place in places):
                    apart = [self._swaps[place] for place in places]
                    for place, swap, fast in zip(
                        places, apart, join([s.fast for s in apart]) or [], strict=False
                    ):
                        self._swaps[place] = replace(swap, fast=fast)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The decoder with these weights; its own modules are back afterwards, whatever happens."""
        with ExitStack() as stack:
            for swap in self._swaps.values():
                stack.callback(setattr, swap.parent, swap.name, swap.own)
                setattr(swap.parent, swap.name, swap.fast)
            if self._fused:
                stack.enter_context(fused_rotaries(self._decoder))
            yield


def _on_cuda(module: nn.Module) -> bool:
    return next(module.parameters()).is_cuda


def _merged(module: LoraLinear, autocast_dtype: torch.dtype | None, seed: int) -> nn.Linear | None:
    """The adapted layer as one linear layer, or None where that is not W + s B A."""
    base = module.get_base_layer()
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    plain = all(name not in module.lora_variant and module.lora_B[name].bias is None for name in adapters)
    if (
        type(base) is not nn.Linear
        or not plain
        or module.disable_adapters
        or module.merged
        or module.fan_in_fan_out
    ):
        return None
    dtype = autocast_dtype or base.weight.dtype
    weight = (
        base.weight.detach().to(dtype).to(torch.float32, copy=True)
    )  # W as the products of training read it
    with torch.autocast(weight.device.type, enabled=False), torch.no_grad():
        for name in adapters:
            a, b = (cast(nn.Linear, side[name]).weight.float() for side in (module.lora_A, module.lora_B))
            weight.addmm_(b, a, alpha=module.scaling[name])
    return _linear(_rounded(weight, dtype, seed), base.bias)


def _rounded(weight: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """`weight` (fp32, overwritten) in `dtype`; bfloat16 is rounded up or down at random, so that the mean is exact.

    W lies on bfloat16's grid and an early update is a small part of its step: rounded to nearest it would vanish from
    nearly every weight, and rollouts would be those of a student some updates ago. A seed gives the same weights each time.
    """
    if dtype != torch.bfloat16:
        return weight.to(dtype)
    bits = weight.view(torch.int32)
    generator = torch.Generator(weight.device).manual_seed(seed)
    bits += torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=weight.device)
    bits &= -(1 << 16)
    return weight.to(dtype)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return layer.eval()
