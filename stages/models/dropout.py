"""Disable a checkpoint's dropout and router noise: distillation trains the student without randomness.

`evaluating` puts a model into evaluation mode temporarily.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.modeling_utils import PreTrainedModel

RANDOM = "drop"  # in the names of probabilities: resid_pdrop, layerdrop
NOISE = "jitter"  # of routers: router_jitter_noise, which some models (Phi-MoE) also use in evaluation


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode again afterwards, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def switch_off(model: PreTrainedModel) -> None:
    """Set dropout to 0 in layers, modules and configs, and pin noisy routers to evaluation mode.

    Call before adding adapters, to keep their `lora_dropout`. `own_dropout` temporarily restores the config.
    """
    if any(_numbers(holder, NOISE) for holder in [*model.modules(), *_configs(model)]):
        pin_to_evaluation(model)
    kept: list[tuple[Any, str, float]] = []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, _ in _numbers(module, RANDOM):
            setattr(module, name, 0.0)
    for config in _configs(model):
        for name, value in _numbers(config, RANDOM):
            kept.append((config, name, value))
            setattr(config, name, 0.0)
    model._own_dropout = kept  # type: ignore[assignment]  # modules may hold any attribute


@contextmanager
def own_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Restore the checkpoint's dropout in the config while the model is saved."""
    kept = getattr(model, "_own_dropout", [])
    for config, name, value in kept:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in kept:
            setattr(config, name, 0.0)


def pin_to_evaluation(model: PreTrainedModel) -> None:
    """Keep modules in evaluation mode permanently, except those with gradient checkpointing.

    For models without a setting for their training-mode randomness (PhiMoE samples its experts).
    """
    adapters = {
        id(each) for module in model.modules() for each in getattr(module, "lora_dropout", {}).values()
    }
    for module in model.modules():
        if (
            module is not model
            and id(module) not in adapters
            and not hasattr(module, "gradient_checkpointing")
        ):
            module.training = False
            module.train = _stays(module)  # type: ignore[method-assign]


def _stays(module: nn.Module) -> Any:
    def train(mode: bool = True) -> nn.Module:
        for child in module.children():
            child.train(mode)
        return module

    return train


def _numbers(holder: Any, word: str) -> list[tuple[str, float]]:
    return [
        (name, value)
        for name, value in vars(holder).items()
        if isinstance(value, float) and value != 0 and word in name
    ]


def _configs(model: nn.Module) -> list[Any]:
    """Distinct config objects of the model's modules."""
    found = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    return list(found.values())
