"""A model's forward in fp32 without a second copy: each module's weights are upcast while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@contextmanager
def in_fp32(model: nn.Module, read_as: torch.dtype) -> Iterator[None]:
    """Run forwards of `model` in fp32 with the weights that training uses. Autocast must be off.

    `read_as`: dtype to which autocast rounds the matrices of frozen and fully trained layers. Adapter weights
    are merged unrounded, so they are not rounded here. Embeddings are looked up in their own dtype.
    """
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")
        stack.enter_context(_attention_in_fp32(model))
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                hooks = [module.register_forward_hook(lambda _m, _i, output: _upcast(output))]
            elif any(p is not None and p.is_floating_point() for p in module._parameters.values()):
                swap = _Swap(None if "lora_" in name else read_as)
                stack.callback(swap.undo, module)
                hooks = [
                    module.register_forward_pre_hook(swap.begin, with_kwargs=True),
                    module.register_forward_hook(lambda m, _i, _o, swap=swap: swap.undo(m)),
                ]
            else:
                continue
            for hook in hooks:
                stack.callback(hook.remove)
        yield


@contextmanager
def _attention_in_fp32(model: Any) -> Iterator[None]:
    """Replace flash attention, which needs half precision, with SDPA, which is equivalent in fp32."""
    own = model.config._attn_implementation
    if "flash" not in (own or ""):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _upcast(tree: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


class _Swap:
    """Replace a module's parameters with fp32 ones while it runs."""

    def __init__(self, read_as: torch.dtype | None) -> None:
        self._read_as = read_as
        self._own: dict[str, Any] = {}

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.undo(module)
        self._own = dict(module._parameters)
        for name, parameter in self._own.items():
            if parameter is not None and parameter.is_floating_point():
                weight = parameter.detach()
                if self._read_as is not None and weight.ndim > 1:
                    weight = weight.to(self._read_as)
                module._parameters[name] = nn.Parameter(weight.float(), requires_grad=False)
        return _upcast(args), _upcast(kwargs)

    def undo(self, module: nn.Module) -> None:
        module._parameters.update(self._own)
        self._own = {}
