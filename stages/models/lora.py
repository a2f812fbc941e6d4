"""LoRA on a linear layer with a minimal number of passes over memory: y = x W' + s (x A') B'.

PEFT writes (x A') B', then s times it, then the sum with x W'; autograd does the same in reverse. Here s is
folded into B, x W' is accumulated in place (`addmm_`), and the gradient of x is computed the same way.

CUDA rounds x W' to bfloat16 before adding, which loses most of an early update (`bench/early_updates.py`).
Without gradients (the probe of a refresh, evaluation) the sum is therefore in fp32. Training uses the cheaper
sum, whose output lags behind the adapter while updates are that small.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def make_lean(model: nn.Module) -> None:
    """Replace the forward of PEFT's LoRA layers on linear layers by `LeanLinear`, a `LoraLinear` subclass."""
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = LeanLinear


class LeanLinear(LoraLinear):
    """Fast path for one active plain adapter without dropout, on a frozen `nn.Linear` in the compute dtype.

    All other cases use PEFT's forward: DoRA, LoRA with a bias, quantised weights, several adapters, and
    merged or disabled ones.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x [..., K] to [..., N] in the dtype of the weights."""
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        adapter = self._alone(dtype)
        if args or kwargs or adapter is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        down: Any = self.lora_A[adapter]
        up: Any = self.lora_B[adapter]
        bias = None if base.bias is None else base.bias.to(dtype)
        return adapted(x.to(dtype), base.weight, bias, down.weight, up.weight, self.scaling[adapter])

    def _alone(self, dtype: torch.dtype) -> str | None:
        """Name of the adapter if the fast path applies, else None."""
        base = self.get_base_layer()
        if self.disable_adapters or self.merged or self.fan_in_fan_out or type(base) is not nn.Linear:
            return None
        if base.weight.dtype != dtype or any(p.requires_grad for p in base.parameters()):
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or names[0] in self.lora_variant or self.lora_B[names[0]].bias is not None:
            return None
        dropout = self.lora_dropout[names[0]]
        return names[0] if isinstance(dropout, nn.Identity) or not dropout.training else None


def adapted(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, a_rK: Tensor, b_Nr: Tensor, scale: float
) -> Tensor:
    """x W' + bias + x A' (s B)' for x [..., K], products in x's dtype; W and bias take no gradient."""
    if torch.compiler.is_compiling():  # the compiler fuses the sum itself
        low = linear(linear(x, a_rK.to(x.dtype)), (scale * b_Nr).to(x.dtype))
        return linear(x, weight_NK, bias_N) + low
    x_TK = x.reshape(-1, x.shape[-1])
    if x.is_cuda and x.dtype != torch.float32 and not torch.is_grad_enabled():
        out_TN = _summed_in_fp32(x_TK, weight_NK, bias_N, a_rK, b_Nr, scale)
        return out_TN.view(*x.shape[:-1], -1)
    out_TN = _Update.apply(x_TK, weight_NK, bias_N, a_rK, b_Nr, scale)
    # Outside `_Update`, which has saved its tensors: checkpoint recomputation then stops before the layer's
    # last product, which no gradient needs. `_Update.backward` includes this product's gradient.
    with torch.no_grad():
        out_TN.addmm_(x_TK, weight_NK.t())
    return out_TN.view(*x.shape[:-1], -1)


def _summed_in_fp32(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, a_rK: Tensor, b_Nr: Tensor, scale: float
) -> Tensor:
    """`adapted` with a single rounding at the end; half-precision products on CUDA."""
    out_TN = torch.mm(x_TK, weight_NK.t(), out_dtype=torch.float32)
    out_TN += linear(linear(x_TK, a_rK.to(x_TK.dtype)), (scale * b_Nr).to(x_TK.dtype))
    if bias_N is not None:
        out_TN += bias_N
    return out_TN.to(x_TK.dtype)


class _Update(torch.autograd.Function):
    """bias + x A' (s B)', with the gradients of x W' + bias + x A' (s B)'."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        a_rK: Tensor,
        b_Nr: Tensor,
        scale: float,
    ) -> Tensor:
        a, b = a_rK.to(x_TK.dtype), (scale * b_Nr).to(x_TK.dtype)
        z_Tr = linear(x_TK, a)
        ctx.save_for_backward(x_TK, z_Tr, weight_NK, a, b)
        ctx.scale, ctx.dtypes = scale, (a_rK.dtype, b_Nr.dtype)
        return linear(z_Tr, b, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, z_Tr, weight_NK, a_rK, b_Nr = ctx.saved_tensors
        by_x, _, _, by_a, by_b, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        if by_x or by_a:
            grad_z_Tr = grad_TN @ b_Nr
        if by_x:
            grad_x = (grad_z_Tr @ a_rK).addmm_(grad_TN, weight_NK)
        if by_a:
            grad_a = _product(grad_z_Tr.t(), x_TK, ctx.dtypes[0])
        if by_b:
            grad_b = _product(grad_TN.t(), z_Tr, ctx.dtypes[1]).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; on CUDA, without first rounding to the dtype of the factors."""
    if a.is_cuda and a.dtype != dtype and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
