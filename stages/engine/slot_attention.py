"""Attention of one new token per row over its slot, without expanding K and V for grouped queries.

Registered with transformers as an attention implementation without a mask function: models pass no mask.
On CUDA a kernel reads only the filled places of a row. Elsewhere PyTorch's attention runs with a mask, over
slots cut to the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from stages.engine.slots import SlotCache
from stages.runtime.errors import UserError

NAME = "dualkl_slots"
_SERVED_LAYERS = {"full_attention", "sliding_attention"}
_REFUSED = ("s_aux", "position_bias", "indices")
_REFUSED_ROPE = ("dynamic", "longrope")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slots: SlotCache | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(cap(scaling q k)) v of one query per row [B, heads, 1, D] over `slots.attended` keys.

    `key` and `value` are whole slots [B, H, S, D]. Returns [B, 1, heads, D]; softmax and sums are fp32.
    """
    unserved = [name for name in _REFUSED if others.get(name) is not None]
    if slots is None or attention_mask is not None or unserved:
        found = f"has {', '.join(unserved)}" if unserved else "does not receive what its layers are given"
        config: Any = module.config
        raise UserError(_sentence(config.model_type, f"its attention {found}"))
    slots.num_attended_layers += 1
    query = query.squeeze(2).to(key.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if key.is_cuda:
        from stages.engine import kernels

        assert slots.attended is not None
        out = kernels.decode_attention(query, key, value, slots.attended, scale, sliding_window, softcap)
    else:
        out = plain_attention(query, key, value, slots, scale, sliding_window, softcap)
    return out.unsqueeze(1), None


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: SlotCache,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`attend` in PyTorch, [B, heads, D]. A group's queries become query positions of its K/V head."""
    num_rows, num_heads, width = query.shape
    query = query.reshape(num_rows, key.shape[1], -1, width)
    key, value = key[:, :, : slots.longest], value[:, :, : slots.longest]
    mask = _mask(slots, window)
    if softcap is None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        scores = (query @ key.transpose(2, 3)).float() * scale
        scores = (scores / softcap).tanh() * softcap
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype) @ value
    return out.reshape(num_rows, num_heads, -1)


def _mask(slots: SlotCache, window: int | None) -> Tensor:
    """[B, 1, 1, longest]: the keys visible to each row, built once per step for each kind of layer."""
    if window not in slots.masks:
        assert slots.attended is not None
        place, attended = torch.arange(slots.longest), slots.attended[:, None]
        seen = place < attended
        if window is not None:
            seen &= place >= attended - window
        slots.masks[window] = seen[:, None, None]
    return slots.masks[window]


@contextmanager
def slot_attention(config: PretrainedConfig) -> Iterator[None]:
    """Models that share `config` use `attend` inside this context, and their own attention afterwards."""
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def check_served(model: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Raise UserError, naming the model type, if slots do not support its attention."""
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    reason = ""
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "it attends to an encoder"
    elif kinds - _SERVED_LAYERS:
        reason = f"it has layers of {', '.join(sorted(kinds - _SERVED_LAYERS))}"
    elif getattr(config, "attention_chunk_size", None):
        reason = "it attends in chunks"
    elif not getattr(decoder, "_supports_attention_backend", False):
        reason = "its attention cannot be exchanged through transformers' AttentionInterface"
    elif ropes := [
        name for name in _REFUSED_ROPE if f"'{name}'" in str(getattr(config, "rope_parameters", ""))
    ]:
        reason = f"its {ropes[0]} rotary embedding depends on the longest row of a batch"
    if reason:
        raise UserError(_sentence(config.model_type, reason))


def check_attended(decoder: PreTrainedModel, slots: SlotCache) -> None:
    """After a step, raise UserError unless every layer has used `attend`."""
    num_layers = decoder.config.num_hidden_layers
    if slots.num_attended_layers != num_layers:
        layers = f"only {slots.num_attended_layers} of its {num_layers} layers"
        found = f"{layers} use transformers' AttentionInterface"
        raise UserError(_sentence(decoder.config.model_type, found))


def _sentence(model_type: str, reason: str) -> str:
    return (
        f"the built-in rollout engine does not support models of type {model_type}: {reason}. It supports"
        " decoders with full or sliding-window attention, such as Qwen3, Llama, Mistral and Gemma."
    )


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
