"""What DeepSpeed ZeRO-3 gathers at a time: a whole decoder layer, while the layer before it runs.

Left alone, DeepSpeed runs hooks around each of a layer's fifteen or so modules, gathers each module's weights
by itself, and fetches a quarter of a layer ahead.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from stages.runtime import distributed

MOST_AHEAD = 1_000_000_000
"""Elements fetched ahead at most: of larger layers, with many experts, only a part."""
_CHOICES = ("leaf_module", "stage3_module_granularity_threshold")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost layers that transformers can recompute one by one; empty for models of other code."""
    if isinstance(model, GradientCheckpointingLayer):
        return [model]
    return [layer for child in model.children() for layer in decoder_layers(child)]


def layer_elements(model: nn.Module) -> int:
    """Elements of the largest decoder layer, whole or partitioned; 0 without such layers."""
    return max((_elements(layer) for layer in decoder_layers(model)), default=0)


def gather_by_layers(
    model: PreTrainedModel, settings: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """DeepSpeed `settings` that fetch one decoder layer ahead; marks the layers to be gathered whole.

    To be called before `deepspeed.initialize`. Settings that choose the modules (`leaf_module`,
    `stage3_module_granularity_threshold`) and models without known layers are left as they are. The threshold
    is no substitute: with it, DeepSpeed 0.19 frees gathered weights without waiting for the GPU to use them.
    """
    from deepspeed.utils import set_z3_leaf_module

    layers, zero = decoder_layers(model), dict(settings["zero_optimization"])
    if any(zero.get(key) for key in _CHOICES):
        return settings
    if not layers:
        distributed.say_once(
            f"the weights of a sharded {model.config.model_type} are gathered in small parts"
        )
        return settings
    pace = _Pace()
    for layer in layers:
        set_z3_leaf_module(layer, True)
        if device.type == "cuda":
            layer.register_forward_pre_hook(pace)
    largest = layer_elements(model)
    zero.setdefault("stage3_prefetch_bucket_size", min(largest, MOST_AHEAD))
    zero.setdefault("stage3_max_live_parameters", 2 * largest)  # every hook fetches, and some have no weights
    return settings | {"zero_optimization": zero}


class _Pace:
    """Let the host queue at most one layer ahead of the GPU.

    Weights of a layer are freed when the GPU has used them. A host that runs ahead gathers more layers
    meanwhile, in the end all of them.
    """

    def __init__(self) -> None:
        self._begun: deque[torch.cuda.Event] = deque()

    def __call__(self, *_: Any) -> None:
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._begun.append(event)
        if len(self._begun) > 1:
            self._begun.popleft().synchronize()


def _elements(module: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
