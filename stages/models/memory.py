"""Memory of a model that is not loaded, in bytes, from its transformers configuration.

Symbols: V vocabulary, d width, I MLP width, C width of all key heads, L layers, P parameters, T trained
parameters, b bytes of a compute number, n GPUs. Figures for activations are rounded: tests keep them within
25 % of a measured count on the real modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from stages.models.sharding import layer_elements
from stages.runtime.config import LoraSection
from stages.runtime.errors import UserError

GIB = 2**30
BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `linears`: (name, inputs, outputs) of each linear layer except the head.

    `used`: parameters that a token is multiplied by, without the embedding and experts that are not selected.
    `layer`: parameters that ZeRO-3 gathers at once, of the largest decoder layer.
    """

    parameters: int
    used: int
    head: int
    layer: int
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    key: int
    linears: tuple[tuple[str, int, int], ...]


def shape_of(config: Any) -> Shape:
    """Sizes of the model described by a transformers `config`, built on the meta device.

    Errors: `UserError` if it is no causal language model with query, key and value heads.
    """
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        heads, hidden, layers = text.num_attention_heads, text.hidden_size, text.num_hidden_layers
    except (AttributeError, ValueError, KeyError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise UserError(f"a model of type {config.model_type} cannot be planned: {line}") from error
    sizes = [(name, p.numel()) for name, p in model.named_parameters()]
    parameters, experts = sum(n for _, n in sizes), sum(n for name, n in sizes if ".experts." in name)
    num_experts = next((n for k in ("num_experts", "num_local_experts") if (n := getattr(text, k, None))), 1)
    selected = getattr(text, "num_experts_per_tok", None) or num_experts
    width = (getattr(text, "moe_intermediate_size", None) or 0) * selected if experts else 0
    output = model.get_output_embeddings()
    is_tied = output.weight is model.get_input_embeddings().weight
    idle = experts * (num_experts - selected) // num_experts
    return Shape(
        parameters=parameters,
        used=parameters - idle - (0 if is_tied else output.weight.numel()),
        head=output.weight.numel(),
        layer=layer_elements(model) or max(n for _, n in sizes),
        vocab_size=output.weight.shape[0],
        hidden=hidden,
        intermediate=width or getattr(text, "intermediate_size", None) or 4 * hidden,
        layers=layers,
        key=(getattr(text, "num_key_value_heads", None) or heads)
        * (getattr(text, "head_dim", None) or hidden // heads),
        linears=tuple(
            (name, m.in_features, m.out_features)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and m is not output
        ),
    )


def adapted(shape: Shape, targets: str) -> list[tuple[str, int, int]]:
    """Linear layers that LoRA adapts; `targets`: the key lora_targets. UserError if a name matches none."""
    if targets == "all-linear":
        return list(shape.linears)
    names = [name.strip() for name in targets.split(",")]
    for name in names:
        if not any(f".{x[0]}".endswith(f".{name}") for x in shape.linears):
            raise UserError(f"lora_targets {targets}: the student has no linear layer named {name}.")
    return [x for x in shape.linears if any(f".{x[0]}".endswith(f".{name}") for name in names)]


def trained_parameters(shape: Shape, lora: LoraSection) -> int:
    """r (inputs + outputs) over the layers that LoRA adapts; all parameters in full fine-tuning."""
    if not lora.use_lora:
        return shape.parameters
    return sum(lora.lora_r * (inputs + outputs) for _, inputs, outputs in adapted(shape, lora.lora_targets))


def layer_kv_bytes(shape: Shape, itemsize: int) -> int:
    """2 C b: keys and values of one token in one layer."""
    return 2 * shape.key * itemsize


def kv_bytes(shape: Shape, itemsize: int) -> int:
    """2 L C b: keys and values of one token in all layers (sliding windows are counted in full)."""
    return shape.layers * layer_kv_bytes(shape, itemsize)


def forward_bytes(shape: Shape, itemsize: int) -> int:
    """(4 d + 3 I) b: activations of one token in a forward without gradients, at their peak in an MLP."""
    return (4 * shape.hidden + 3 * shape.intermediate) * itemsize


def training_bytes(shape: Shape, itemsize: int, checkpointing: bool, frozen: bool) -> tuple[int, int]:
    """Activations of one token: kept by the forward, and added by the backward.

    A layer takes about 8 (3 d + I) b, a third of it only in its backward. With checkpointing it keeps its d
    inputs alone, in fp32 unless the weights are `frozen`.
    """
    layer = 8 * (3 * shape.hidden + shape.intermediate) * itemsize
    if checkpointing:
        return shape.layers * shape.hidden * (itemsize if frozen else 4), layer
    return 2 * shape.layers * layer // 3, layer // 3


def state_bytes(trained: int, num_gpus: int, zero2: bool) -> tuple[int, int]:
    """AdamW's state, and gradients, of T trained weights in fp32.

    One GPU: 8 T and 4 T. DDP adds 4 T of gradient buckets. ZeRO-2: moments and master weights, 12 T / n;
    gradients, 4 T / n and one bucket.
    """
    if zero2:
        return 12 * trained // num_gpus, 4 * trained // num_gpus + 4 * min(trained, BUCKET_ELEMENTS)
    return 8 * trained, (8 if num_gpus > 1 else 4) * trained


def gathered_bytes(shape: Shape, itemsize: int) -> int:
    """Weights that ZeRO-3 has gathered at a time: the embedding and the first layer, or four layers.

    Of those the GPU runs one, one is queued, and one is fetched into a buffer of its own.
    """
    return max(shape.head + shape.layer, 4 * shape.layer) * itemsize
