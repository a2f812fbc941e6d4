"""Attention over packed rows: each sequence attends only to itself, as if it were in its own row.

`PACKED` is an attention function registered with transformers. Called with packed boundaries
(`model_inputs`), it computes causal attention per sequence: with PyTorch's variable-length flash kernel on
CUDA, else with one SDPA call per group of sequences of similar length. All other calls (generation, padded
rows) use transformers' SDPA, so one model object serves both. transformers' flash attention supports packing
itself, but not sequences that share a prompt.

A shared prompt runs through the model once, its keys and values are copied to each sequence (`with_copies`):
its completions are then queries at the end of longer sequences, where causal masks and windows of the kernel
are aligned. Copies cost 2 h G numbers per key and layer, less than merging the parts of an attention would.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import PreTrainedModel

from stages.data.alignment import Aligned, Packing, Shared
from stages.models.readout import decoder_of
from stages.runtime.errors import UserError

PACKED = "dualkl_packed"
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
VARLEN_WIDEST_HEAD = 256
LAYER_TYPES = {"full_attention", "sliding_attention"}
UNSERVED = (
    "softcap",
    "s_aux",
    "position_bias",
    "cache",
)  # optional arguments of attention functions that packing does not support


def enable_packing(model: PreTrainedModel, wanted: bool | str) -> str:
    """Prepare `model` for packed rows; return "", or why rows must be padded instead.

    `wanted`: the config key `packing`: on (True), off (False) or `auto`, which packs if the result is exact.
    Errors: `UserError` if packing is on and the model does not support it.
    """
    reason = "packing is off" if wanted is False else refusal(model)
    refuse_padding(model, wanted, reason)
    if not reason and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(PACKED)
        _mark_windows(model)
    return reason


def unshared_because(model: PreTrainedModel, padded_because: str) -> str:
    """Why sequences cannot share prompts in packed rows of this model, or ""."""
    implementation = model.config._attn_implementation
    if padded_because:
        return f"rows are padded: {padded_because}"
    if implementation != PACKED:
        return f"attn_implementation {implementation} reads every sequence's own keys"
    return ""


def refuse_padding(model: PreTrainedModel, wanted: bool | str, reason: str) -> None:
    """`UserError` if packing is on and there is a `reason` to pad."""
    if reason and wanted is True:
        raise UserError(
            f"packing: on, but {model.config._name_or_path} cannot be packed: {reason}. Use packing: auto."
        )


def _mark_windows(model: PreTrainedModel) -> None:
    """Mark sliding attention layers; looking up the layer index instead would recompile every layer."""
    for module in model.modules():
        types = getattr(getattr(module, "config", None), "layer_types", None)
        if types and isinstance(number := getattr(module, "layer_idx", None), int):
            module.slides = types[number] == "sliding_attention"


def refusal(model: PreTrainedModel) -> str:
    """Reason why packed rows would not be exact for this model, or ""."""
    config = model.config.get_text_config()
    implementation = model.config._attn_implementation
    other_layers = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if implementation not in ("sdpa", PACKED) and "flash" not in implementation:
        return f"attn_implementation {implementation} does not keep packed sequences apart"
    if other_layers:
        return f"it has layers of type {', '.join(sorted(other_layers))}"
    if not model._supports_attention_backend or getattr(model, "_is_stateful", False):
        return "it has custom attention or recurrent state"
    if "flash" not in implementation and getattr(config, "attn_logit_softcapping", None):
        return "its attention logits are soft-capped"
    return ""


def model_inputs(aligned: Aligned, implementation: str) -> dict[str, Any]:
    """Keyword arguments for calling a decoder with attention `implementation` on `aligned`."""
    packing = aligned.packing
    if packing is None:
        return {"input_ids": aligned.input_ids, "attention_mask": aligned.attention_mask}
    shared = {"input_ids": aligned.input_ids, "position_ids": aligned.position_ids}
    if implementation == PACKED:
        # transformers passes an empty mask on unchanged, and any other attention function fails on it.
        nothing = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=aligned.input_ids.device)
        return shared | {"attention_mask": nothing, "packing": packing}
    assert packing.shared is None, f"attention {implementation} cannot share prompts"
    bounds = {"cu_seq_lens_q": packing.bounds, "cu_seq_lens_k": packing.bounds}
    return shared | bounds | {"max_length_q": packing.longest, "max_length_k": packing.longest}


def decoder_states(model: PreTrainedModel, aligned: Aligned) -> Tensor:
    """Last hidden states [B, T, d] after the final norm."""
    inputs = model_inputs(aligned, model.config._attn_implementation)
    return decoder_of(model)(**inputs, use_cache=False).last_hidden_state


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, T, h], key and value [B, G, T, h] -> [B, T, H, h]."""
    if packing is None:
        assert attention_mask is None or attention_mask.numel(), (
            "the model does not hand `packing` to its attention"
        )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    for name in UNSERVED:
        if kwargs.get(name) is not None:
            raise UserError(
                f"packing is not supported: the model's attention uses {name}; use --packing off."
            )
    _check_window(module, sliding_window)
    q_THh, k_TGh, v_TGh = (states[0].transpose(0, 1) for states in (query, key, value))
    dtype = _computed_in(query)
    if dropout == 0 and varlen_usable(query, value, dtype):
        q_THh, k_TGh, v_TGh = (states.to(dtype) for states in (q_THh, k_TGh, v_TGh))
        out = _varlen(q_THh, k_TGh, v_TGh, packing, scaling, sliding_window)
    else:
        out = _by_groups(q_THh, k_TGh, v_TGh, packing, scaling, sliding_window, dropout)
    return out[None], None


def _check_window(module: nn.Module, sliding_window: int | None) -> None:
    """Reject a model whose window is only in its masks, which packed attention ignores."""
    if getattr(module, "slides", False) and sliding_window is None:
        raise UserError(
            "packing is not supported: this model does not pass its sliding window to the attention function;"
            " use --packing off."
        )


def _find_varlen() -> tuple[Any, bool]:
    """PyTorch's variable-length attention if it has windows and scales; whether it has grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, False
    known = inspect.signature(varlen_attn).parameters
    return (varlen_attn if {"scale", "window_size"} <= known.keys() else None), "enable_gqa" in known


_varlen_attn, _varlen_groups = _find_varlen()


def _computed_in(query: Tensor) -> torch.dtype:
    """The dtype of attention: autocast's, as for PyTorch's own; rotated queries of fp32 weights are fp32."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def varlen_usable(query: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the flash kernel supports them in `dtype`: CUDA, half precision, one supported head width."""
    width = query.shape[-1]
    served = width == value.shape[-1] and width <= VARLEN_WIDEST_HEAD and width % 8 == 0
    return _varlen_attn is not None and query.is_cuda and dtype in VARLEN_DTYPES and served


def _varlen(
    q_THh: Tensor, k_TGh: Tensor, v_TGh: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    shared = packing.shared
    bounds, longest = packing.bounds, packing.longest
    key_bounds, longest_keys = (bounds, longest) if shared is None else (shared.bounds, shared.longest)
    if shared is not None:
        k_TGh, v_TGh = (with_copies(states, shared) for states in (k_TGh, v_TGh))
    num_groups = q_THh.shape[1] // k_TGh.shape[1]
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if num_groups > 1 and _varlen_groups:
        options["enable_gqa"] = True
    elif num_groups > 1:
        k_TGh, v_TGh = (states.repeat_interleave(num_groups, dim=1) for states in (k_TGh, v_TGh))
    q, k, v = (states.contiguous() for states in (q_THh, k_TGh, v_TGh))
    return _varlen_attn(q, k, v, bounds, key_bounds, longest, longest_keys, **options)


def with_copies(states_TGh: Tensor, shared: Shared) -> Tensor:
    """Keys or values [S, G, h] of each whole sequence; gradients of copies are summed in float32."""
    return _copied(states_TGh, shared.places, shared.copies, shared.firsts)


@torch.library.custom_op("dualkl::copied", mutates_args=())
def _copied(states_TGh: Tensor, places_S: Tensor, copies_S: Tensor, firsts_T: Tensor) -> Tensor:
    return states_TGh.index_select(0, places_S)


@_copied.register_fake
def _(states_TGh: Tensor, places_S: Tensor, copies_S: Tensor, firsts_T: Tensor) -> Tensor:
    return states_TGh.new_empty((places_S.shape[0], *states_TGh.shape[1:]))


@torch.library.custom_op("dualkl::summed", mutates_args=())
def _summed(states_SGh: Tensor, copies_S: Tensor, firsts_T: Tensor) -> Tensor:
    """[T, G, h]: for each packed position the sum over its copies, always in the same order."""
    sums_TC = embedding_bag(copies_S, states_SGh.flatten(1), firsts_T, mode="sum")
    return sums_TC.view(-1, *states_SGh.shape[1:])


@_summed.register_fake
def _(states_SGh: Tensor, copies_S: Tensor, firsts_T: Tensor) -> Tensor:
    return states_SGh.new_empty((firsts_T.shape[0], *states_SGh.shape[1:]))


def _keep_copies(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward_of_copies(ctx: Any, grad_SGh: Tensor) -> tuple[Tensor | None, ...]:
    return _summed(grad_SGh.contiguous(), *ctx.saved_tensors), None, None, None


_copied.register_autograd(_backward_of_copies, setup_context=_keep_copies)


@torch.compiler.disable  # lengths differ in every batch and would cause recompilation
def _by_groups(
    q_THh: Tensor,
    k_TGh: Tensor,
    v_TGh: Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """One SDPA call per group of sequences of similar length; causal attention never sees right padding."""
    heads = [states.shape[1] for states in (q_THh, k_TGh, v_TGh)]
    one_width = q_THh.shape[-1] == v_TGh.shape[-1]
    together = [torch.cat([q_THh, k_TGh, v_TGh], dim=1)] if one_width else [q_THh, k_TGh, v_TGh]
    parts = []
    for grid in packing.groups.grids:
        taken = [
            states.index_select(0, grid.flatten()).unflatten(0, grid.shape).transpose(1, 2)
            for states in together
        ]
        q, k, v = taken[0].split(heads, dim=1) if one_width else taken
        length = grid.shape[1]
        mask = None if window is None or length <= window else _window_mask(length, window, grid.device)
        if mask is not None:  # no fused kernel supports a mask with grouped heads
            k, v = (repeat_kv(states, heads[0] // heads[1]) for states in (k, v))
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, packing.groups.places)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[T, T], True where a position attends to another: itself and the `window` - 1 before it."""
    position = torch.arange(length, device=device)
    behind = position[:, None] - position
    return (behind >= 0) & (behind < window)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
