"""Forwards in float32 of a model in any dtype, without a second copy of its weights.

Between two float32 computations, differences are either rounding (about 1e-6) or a real error. `in_float32`
widens every torch function, whatever the model computes: for the checks at load. `upcast_weights` only gives
modules fp32 weights, rounded as in training, and leaves other code alone: for the probe, whose loss kernels
read tensors by address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers.modeling_utils import PreTrainedModel

NARROW = (torch.bfloat16, torch.float16)
# rows of a weight upcast at a time; a whole lm_head of 152,064 rows would take gigabytes
LINEAR_ROWS = 32_768
WINDOW = 8
# names in configs and attention modules
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
)
_MOVERS = {
    "__getitem__",
    "view",
    "reshape",
    "transpose",
    "permute",
    "t",
    "unbind",
    "chunk",
    "split",
    "expand",
    "detach",
    "unsqueeze",
    "squeeze",
    "narrow",
    "select",
    "flatten",
    "unflatten",
    "data_ptr",
    "size",
    "numel",
    "dim",
    "__len__",
}
"""These only view or describe a tensor; the function that computes with the result upcasts it."""


class _Widening(TorchFunctionMode):
    """Make every torch function compute in float32: upcast half-precision inputs, override given dtypes."""

    active = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.active or name in _MOVERS:
            return func(*args, **kwargs)
        if name == "__get__":
            found = func(*args, **kwargs)
            return torch.float32 if isinstance(found, torch.dtype) and found in NARROW else found
        if func is linear and len(args[1]) > LINEAR_ROWS and args[1].dtype in NARROW:
            return linear_by_parts(*args, **kwargs)
        if func is embedding:
            return _wide(func(*args, **kwargs))
        if (name.endswith("_") and not name.startswith("__")) or name in ("__set__", "__setitem__"):
            return func(args[0], *tree_map(_wide, args[1:]), **tree_map(_wide, kwargs))
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in NARROW else value
    return torch.float32 if isinstance(value, torch.dtype) and value in NARROW else value


def linear_by_parts(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in float32."""
    out = torch.cat([linear(x.float(), part.float()) for part in weight.split(LINEAR_ROWS)], dim=-1)
    return out if bias is None else out + bias.float()


@contextmanager
def in_float32(sharded: nn.Module | None = None) -> Iterator[None]:
    """Disable gradients and autocast, and compute everything in float32.

    `sharded`: the module of a ZeRO-3 engine, whose hooks must see the weights unchanged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mode = _Widening()
    with ExitStack() as stack:
        for module in sharded.modules() if sharded is not None else ():
            _pause_around_hooks(module, mode, stack)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(mode)
        yield


@contextmanager
def float32_attention(model: PreTrainedModel) -> Iterator[None]:
    """Disable flash attention, which needs half precision."""
    own = model.config._attn_implementation or ""
    if "flash" in own:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        if "flash" in own:
            model.set_attn_implementation(own)


def _pause_around_hooks(module: nn.Module, mode: _Widening, stack: ExitStack) -> None:
    """Turn the mode off while the module's pre-forward and forward hooks run."""

    def set_to(active: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            mode.active = active

        return hook

    for register in (module.register_forward_pre_hook, module.register_forward_hook):
        stack.callback(register(set_to(False), prepend=True).remove)
        stack.callback(register(set_to(True)).remove)


@contextmanager
def short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Set attention windows and chunks in configs and modules to `WINDOW`, so that short rows exceed them."""
    holders: list[Any] = list(model.modules())
    holders += list(
        {id(c): c for module in holders if (c := getattr(module, "config", None)) is not None}.values()
    )
    with ExitStack() as stack:
        for holder in holders:
            for name in WINDOWS:
                value = vars(holder).get(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
                    stack.callback(setattr, holder, name, value)
                    setattr(holder, name, WINDOW)
        yield


@contextmanager
def upcast_weights(model: PreTrainedModel, read_as: torch.dtype) -> Iterator[None]:
    """Each module's weights are fp32 while it runs: those that training uses. Autocast must be off.

    `read_as`: dtype to which autocast rounds the matrices of frozen and fully trained layers. Adapter weights
    are merged unrounded, so they are not rounded here. Embeddings are looked up in their own dtype.
    """
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")
        stack.enter_context(float32_attention(model))
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                hooks = [module.register_forward_hook(lambda _m, _i, output: tree_map(_wide, output))]
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
        return tree_map(_wide, args), tree_map(_wide, kwargs)

    def undo(self, module: nn.Module) -> None:
        module._parameters.update(self._own)
        self._own = {}
