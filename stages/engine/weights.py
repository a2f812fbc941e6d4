"""The engine's versions of a model's layers: merged, cast, joined, fused. The model stays untouched."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from stages.engine.fused_layers import fused_mlp, fused_norm, fused_rotaries
from stages.engine.joined import JOINED, join


@dataclass(frozen=True)
class _Swap:
    parent: nn.Module
    name: str
    own: nn.Module
    fast: nn.Module


class DecodingWeights:
    """Replaces a decoder's adapted layers, and under autocast its fp32 ones, by plain ones inside `swapped`.

    On CUDA, layers with the same input are joined into one matmul, and the small operations between matmuls
    are fused. W + s B A is summed in fp32 and rounded once, stochastically (`_rounded`). Variants such as
    DoRA or LoRA with a bias are not merged; they decode through their adapter.
    """

    def __init__(self, decoder: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        """`autocast_dtype`: autocast's dtype, None without autocast."""
        self._decoder, self._swaps = decoder, dict[str, _Swap]()
        self._fused = _on_cuda(decoder)
        adapted = ""
        for name, module in decoder.named_modules():
            if adapted and name.startswith(adapted):
                continue
            fast: nn.Module | None = None
            if isinstance(module, LoraLinear):
                adapted = f"{name}."
                fast = merged(module, autocast_dtype, seed=seed_of(name))
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
        """Join only layers that are copied anyway; others would take their memory twice."""
        for name, _ in self._decoder.named_modules():
            for leaves in JOINED:
                places = [f"{name}.{leaf}" for leaf in leaves]
                if all(place in self._swaps for place in places):
                    joined = join([self._swaps[place].fast for place in places]) or []
                    for place, fast in zip(places, joined, strict=False):
                        self._swaps[place] = replace(self._swaps[place], fast=fast)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put these layers into the decoder; restore its own on exit, also after an error."""
        with ExitStack() as stack:
            for swap in self._swaps.values():
                stack.callback(setattr, swap.parent, swap.name, swap.own)
                setattr(swap.parent, swap.name, swap.fast)
            if self._fused:
                stack.enter_context(fused_rotaries(self._decoder))
            yield


def _on_cuda(module: nn.Module) -> bool:
    return next(module.parameters()).is_cuda


def seed_of(name: str) -> int:
    """Seed of the rounding of the layer called `name` in its decoder."""
    return zlib.crc32(name.encode())


def merged(module: LoraLinear, autocast_dtype: torch.dtype | None, seed: int) -> nn.Linear | None:
    """The adapted layer as one linear layer; None unless it computes W + s B A."""
    base = module.get_base_layer()
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    plain = all(name not in module.lora_variant and module.lora_B[name].bias is None for name in adapters)
    switched = module.disable_adapters or module.merged or module.fan_in_fan_out
    if type(base) is not nn.Linear or not plain or switched:
        return None
    dtype = autocast_dtype or base.weight.dtype
    weight = base.weight.detach().to(dtype).to(torch.float32, copy=True)  # W as read by training's matmuls
    with torch.autocast(weight.device.type, enabled=False), torch.no_grad():
        for name in adapters:
            a, b = (cast(nn.Linear, side[name]).weight.float() for side in (module.lora_A, module.lora_B))
            weight.addmm_(b, a, alpha=module.scaling[name])
    return _linear(_rounded(weight, dtype, seed), base.bias)


def _rounded(weight: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """`weight` (fp32, overwritten) in `dtype`; rounding to bfloat16 is random, with exact mean.

    W is on bfloat16's grid, and an early update is a small fraction of a grid step. Rounding to nearest would
    drop it from nearly every weight, and the rollouts would be an older student's. Equal `seed`s give equal
    weights.
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
