"""Forwards in float32 for any model dtype, with short attention windows, to compare two computations.

In float32, differences are either rounding (about 1e-6) or a real error. Weights are upcast one at a time
when used, so there is no second copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

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


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Module that computes the hidden states for the lm_head.

    `get_decoder` returns the whole model for Llama 4, and the head's matrix for ModernBERT's decoder.
    """
    decoder = model.get_decoder()
    if decoder is model:
        return model.model
    return decoder if isinstance(decoder, PreTrainedModel) else cast(PreTrainedModel, model.base_model)


@contextmanager
def float32_attention(model: PreTrainedModel) -> Iterator[None]:
    """Disable flash attention, which needs half precision."""
    own = model.config._attn_implementation
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
