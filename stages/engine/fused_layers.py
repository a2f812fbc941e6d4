"""RMS norms, rotary embeddings and gated MLPs in one CUDA launch each: most of a step's small kernels.

Models are not recognised by name. A norm, rotary function or MLP is replaced only if its output on a probe
input equals the formula here bit for bit. The kernels round where the formula does.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"
_NOT_THIS = (AttributeError, LookupError, TypeError, RuntimeError, ValueError)
"""Errors raised by modules or functions with other inputs, outputs or submodules than expected."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_centred: bool) -> Tensor:
    """x / rms(x) times the weight in x's dtype (Llama, Qwen) or times 1 + weight in fp32 (Gemma)."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).type_as(x) if one_centred else weight * normed.to(x.dtype)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + (−x₂, x₁) sin with x = (x₁, x₂) a query or key [B, H, T, D]; cos and sin are [B, T, D]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turn(query), turn(key)


class FusedNorm(nn.Module):
    """An RMS norm as one kernel."""

    def __init__(self, weight: nn.Parameter, eps: float, one_centred: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.one_centred = weight, eps, one_centred

    def forward(self, x: Tensor) -> Tensor:
        from stages.engine import kernels

        return kernels.rms_norm(x, self.weight, self.eps, self.one_centred)


@torch.no_grad()
def fused_norm(module: nn.Module) -> FusedNorm | None:
    """The module as one kernel; None unless it is an RMS norm."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    lone = len(list(module.parameters())) == 1 and not list(module.buffers())
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float) or not lone:
        return None
    x = _probe(3, len(weight), like=weight)
    try:
        found = module(x)
    except _NOT_THIS:
        return None
    if not isinstance(found, Tensor):
        return None
    for one_centred in (False, True):
        wanted = rms_norm(x, weight, eps, one_centred)
        if found.dtype == wanted.dtype and torch.equal(found, wanted):
            return FusedNorm(weight, eps, one_centred)
    return None


class FusedMLP(nn.Module):
    """down(silu(gate x) up x), with the linear layers that `mlp` has at call time."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self._mlp: tuple[Any] = (mlp,)  # hidden from named_modules(): its layers already have names

    def forward(self, x: Tensor) -> Tensor:
        from stages.engine import kernels

        (mlp,) = self._mlp
        return mlp.down_proj(kernels.gated(mlp.gate_proj(x), mlp.up_proj(x)))


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@torch.no_grad()
def fused_mlp(module: nn.Module, like: Tensor) -> FusedMLP | None:
    """The MLP with one kernel between its matmuls; None unless it is gated. `like`: see `_probe`."""
    factors = {"gate_proj": 1.5, "up_proj": 0.7, "down_proj": -0.6}
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in factors):
        return None
    probe = copy.copy(module)
    probe._modules = module._modules | {name: _Scale(factor) for name, factor in factors.items()}
    x = _probe(3, 8, like=like)
    wanted = -0.6 * (nn.functional.silu(1.5 * x) * (0.7 * x))
    try:
        found = probe(x)
    except _NOT_THIS:
        return None
    return FusedMLP(module) if isinstance(found, Tensor) and torch.equal(found, wanted) else None


@torch.no_grad()
def fused_rotary(original: Callable[..., Any], like: Tensor) -> Callable[..., Any] | None:
    """`original` as one kernel; None if it computes a different rotation."""
    query, key = _probe(2, 3, 1, 8, like=like), _probe(2, 1, 1, 8, like=like)
    cos, sin = _probe(2, 1, 8, like=like).cos(), _probe(2, 1, 8, like=like).sin()
    try:
        found, wanted = original(query, key, cos, sin), rotary(query, key, cos, sin)
        is_same = isinstance(found, tuple) and all(
            torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
        )
    except _NOT_THIS:
        return None
    if not is_same:
        return None

    def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        from stages.engine import kernels

        (num_rows, _, places, width) = query.shape
        if unsqueeze_dim == 1 and tuple(cos.shape) in ((num_rows, places, width), (1, places, width)):
            return kernels.rotary(query, key, cos, sin)
        return original(query, key, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return turn


@contextmanager
def fused_rotaries(decoder: nn.Module) -> Iterator[None]:
    """Replace the rotary functions in the decoder's modeling files; restore them on exit."""
    files = {sys.modules[type(module).__module__] for module in decoder.modules()}
    own = {file: getattr(file, ROTARY) for file in files if hasattr(file, ROTARY)}
    like = next(decoder.parameters())
    try:
        for file, original in own.items():
            setattr(file, ROTARY, fused_rotary(original, like) or original)
        yield
    finally:
        for file, original in own.items():
            setattr(file, ROTARY, original)


def _probe(*shape: int, like: Tensor) -> Tensor:
    """Irregular numbers of both signs, in the dtype and on the device of `like`."""
    count = torch.arange(torch.Size(shape).numel(), device=like.device, dtype=torch.float32)
    return (3 * torch.sin(count * count + 0.7 * count)).view(shape).to(like.dtype)
