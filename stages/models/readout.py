"""How a model maps hidden states to logits, measured on one forward.

HyperCLOVA-X multiplies by `logits_scaling`, Granite divides by it, Cohere multiplies by `logit_scale`, Gemma
caps. The constants come from the config; their use is inferred from the model's logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from stages.models.dropout import evaluating
from stages.models.float32 import in_float32, linear_by_parts
from stages.runtime.errors import UserError

EXACT = 1e-3
"""Relative tolerance between two float32 computations of the same logits; rounding is usually below 1e-5."""


@dataclass(frozen=True)
class Readout:
    """logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = softcap tanh(x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        logits = products * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


def readout_of(model: PreTrainedModel) -> Readout:
    """The readout, measured once on a forward of a few tokens; `UserError` if none fits the model."""
    if not hasattr(model, "_readout"):
        ids = check_ids(model, 6)
        with evaluating(model), in_float32():
            hidden, logits = full_forward(model, ids)
            note_readout(model, hidden, logits, *output_weights(model))
    return cast(Readout, model._readout)


@torch.no_grad()
def note_readout(
    model: PreTrainedModel, hidden_Td: Tensor, logits_TV: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """Fit the readout that maps `hidden` to `logits`, and store it for `readout_of`. Errors: `UserError`."""
    if hidden_Td.shape[-1] != weight.shape[1]:
        widths = f"its decoder's states have width {hidden_Td.shape[-1]}, its lm_head takes {weight.shape[1]}"
        raise UserError(_sentence(model, widths))
    products_TV = linear_by_parts(hidden_Td, weight, bias)
    if products_TV.shape != logits_TV.shape:
        raise UserError(
            _sentence(model, f"its logits have {logits_TV.shape[-1]} columns, its lm_head {len(weight)} rows")
        )
    numbers = _numbers(model.config.get_text_config())
    caps = [None, *{value for name, value in numbers if "cap" in name and value > 0}]
    fits = [
        Readout(_scale(products_TV, logits_TV, cap, [value for _, value in numbers]), cap) for cap in caps
    ]
    gaps = [relative_gap(fit(products_TV), logits_TV) for fit in fits]
    best = min(range(len(fits)), key=lambda i: gaps[i])
    if not gaps[best] < EXACT:
        raise UserError(_sentence(model, f"its own logits differ from the best fit by {gaps[best]:.1%}"))
    model._readout = fits[best]  # type: ignore[assignment]  # modules may hold any attribute


def _sentence(model: PreTrainedModel, what: str) -> str:
    return (
        f"a model of type {model.config.model_type} cannot be used: its logits are not its last hidden"
        f" states times its lm_head, scaled or capped ({what}), which the loss requires. Choose a model"
        " of another type."
    )


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself, with its adapted layers but without PEFT's wrapper."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Module that computes the hidden states for the lm_head.

    `get_decoder` returns the whole model for Llama 4, and the head's matrix for ModernBERT's decoder.
    """
    decoder = model.get_decoder()
    if decoder is model:
        return model.model
    return decoder if isinstance(decoder, PreTrainedModel) else cast(PreTrainedModel, model.base_model)


def output_weights(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Weight [V, d] and bias [V] of the lm_head."""
    output = model.get_output_embeddings()
    weight = getattr(output, "weight", None)
    if weight is None or weight.ndim != 2:
        raise UserError(_sentence(model, "it has no lm_head that is one matrix"))
    return weight, getattr(output, "bias", None)


def full_forward(model: PreTrainedModel, ids_BT: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Hidden states [T, d] of the decoder and logits [T, V] of the model for one row, from one forward.

    Errors: `UserError` if the forward does not call the decoder exactly once.
    """
    caught: list[Any] = []
    handle = decoder_of(model).register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        logits = model(input_ids=ids_BT, use_cache=False, **inputs).logits
    finally:
        handle.remove()
    if len(caught) != 1:
        raise UserError(_sentence(model, "its forward does not go through its own get_decoder()"))
    return last_hidden(caught[0])[0], logits[0]


def last_hidden(output: Any) -> Tensor:
    """Last hidden states [B, T, d] of a decoder's output."""
    return output.last_hidden_state


def check_ids(model: PreTrainedModel, length: int, seed: int = 0) -> Tensor:
    """[1, length] random token ids, without the config's special ones (padding, images)."""
    text = model.config.get_text_config()
    special = {
        value
        for config in (model.config, text)
        for name, value in vars(config).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(text.vocab_size, generator=generator)[: length + len(special)].tolist()
    usable = [i for i in ids if i not in special] * length  # repeated if the vocabulary is tiny
    return torch.tensor([usable[:length]], device=next(model.parameters()).device)


def relative_gap(found_TV: Tensor, expected_TV: Tensor) -> float:
    """Largest difference of a position's logits, relative to their spread; ignores constant shifts."""
    expected = expected_TV - expected_TV.mean(-1, keepdim=True)
    found = found_TV - found_TV.mean(-1, keepdim=True)
    gaps = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return float(gaps.max()) if bool(gaps.isfinite().all()) else math.inf


def _numbers(config: Any) -> list[tuple[str, float]]:
    return [
        (name, float(value))
        for name, value in vars(config).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value != 0
    ]


def _scale(products_TV: Tensor, logits_TV: Tensor, softcap: float | None, numbers: list[float]) -> float:
    """Least-squares factor on the products, snapped to a matching number of the config or its inverse."""
    x, y = products_TV.flatten().double(), logits_TV.flatten().double()
    if softcap is not None:
        inside = y.abs() < 0.9 * softcap
        x, y = x[inside], (y[inside] / softcap).atanh() * softcap
    measured = float((x @ y) / (x @ x).clamp(min=1e-300)) if len(x) else math.nan
    named = [1.0, *numbers, *(1 / value for value in numbers)]
    nearest = min(named, key=lambda value: abs(value - measured))
    return nearest if abs(nearest - measured) <= EXACT * abs(measured) else measured
