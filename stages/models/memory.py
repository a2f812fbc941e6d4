"""Memory of models, caches, activations and optimizers in bytes, computed from transformers configurations.

Symbols: M tokens of a forward, N scored tokens, V vocabulary, d width, I MLP width, Q / C width of all query
/ all key heads, L layers, P parameters, T trained parameters, r rank, b bytes of a compute number, n GPUs.
Activation coefficients are bytes per token, counted on the real modules by `bench/counted_memory.py`
(tests/stages/loops/test_plan.py repeats the count).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from stages.runtime.errors import UserError

GIB = 2**30
# Per slot and vocabulary id while sampling: fp32 logits and logprobs, fp64 probabilities and their sums.
LOGIT_BYTES = 32
PREFETCH_ELEMENTS = 50_000_000  # DeepSpeed's stage3_prefetch_bucket_size
LOSS_BUFFER = GIB * 3 // 10  # dualkl.kernels.fused.BUFFER_BYTES
COMPRESS_BUDGET = 4 * GIB  # dualkl.heads, at most a sixteenth of the device


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `linears`: (name, inputs, outputs) of each linear layer except the head.

    `active`: parameters used for each token, without experts that are not selected.
    """

    parameters: int
    active: int
    head: int
    is_tied: bool
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    query: int
    key: int
    largest_module: int
    layer: int
    linears: tuple[tuple[str, int, int], ...]

    @property
    def body(self) -> int:
        """Parameters multiplied with each token, without embedding and head."""
        return self.active - self.head * (1 if self.is_tied else 2)


def shape_of(config: Any) -> Shape:
    """Sizes of the model described by a transformers `config`, built on the meta device.

    Errors: `UserError` if it is no causal language model with query, key and value heads.
    """
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        heads, hidden, layers = text.num_attention_heads, text.hidden_size, text.num_hidden_layers
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
    except (AttributeError, ValueError, KeyError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise UserError(f"a model of type {config.model_type} cannot be planned: {line}") from error
    sizes = [(name, p.numel()) for name, p in model.named_parameters()]
    experts = sum(size for name, size in sizes if ".experts." in name)
    num_experts = next((v for k in ("num_experts", "num_local_experts") if (v := getattr(text, k, None))), 1)
    used = getattr(text, "num_experts_per_tok", None) or num_experts
    output = model.get_output_embeddings()
    width = getattr(text, "moe_intermediate_size", None) if experts else None
    return Shape(
        parameters=sum(size for _, size in sizes),
        active=sum(size for _, size in sizes) - experts * (num_experts - used) // num_experts,
        head=output.weight.numel(),
        is_tied=output.weight is model.get_input_embeddings().weight,
        vocab_size=output.weight.shape[0],
        hidden=hidden,
        intermediate=width * used if width else getattr(text, "intermediate_size", None) or 4 * hidden,
        layers=layers,
        query=heads * head_dim,
        key=key_heads * head_dim,
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        layer=max(sum(p.numel() for p in block.parameters()) for block in _blocks(model, layers)),
        linears=tuple(
            (name, m.in_features, m.out_features)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and m is not output
        ),
    )


def _blocks(model: nn.Module, layers: int) -> nn.ModuleList:
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not found:
        kind = getattr(model.config, "model_type", "unknown")
        raise UserError(f"a model of type {kind} cannot be planned: its layers are not in a ModuleList.")
    return found[0]


def adapted(shape: Shape, targets: str) -> list[tuple[str, int, int]]:
    """Linear layers that LoRA adapts; `targets`: the key lora_targets. UserError if a name matches none."""
    if targets == "all-linear":
        return list(shape.linears)
    names = [name.strip() for name in targets.split(",")]
    for name in names:
        if not any(linear == name or linear.endswith(f".{name}") for linear, _, _ in shape.linears):
            raise UserError(f"lora_targets {targets}: the student has no linear layer named {name}.")
    return [x for x in shape.linears if any(x[0] == name or x[0].endswith(f".{name}") for name in names)]


def lora_parameters(shape: Shape, rank: int, targets: str) -> int:
    """Sum of r (inputs + outputs) over the adapted layers."""
    return sum(rank * (inputs + outputs) for _, inputs, outputs in adapted(shape, targets))


def kv_bytes_per_token(shape: Shape, itemsize: int) -> int:
    """2 L C b: keys and values of one token in all layers (sliding windows are counted in full)."""
    return 2 * shape.layers * shape.key * itemsize


def zero3_shard_bytes(shape: Shape, itemsize: int, num_gpus: int) -> int:
    """P b / n; rounding up each parameter (less than 0.01 %) is ignored."""
    return -(-shape.parameters * itemsize // num_gpus)


def gather_bytes(shape: Shape, itemsize: int, num_gpus: int, prefetch: int = PREFETCH_ELEMENTS) -> int:
    """(largest module + largest layer's share + prefetch) b: weights ZeRO-3 gathers at once; 0 on one GPU."""
    if num_gpus == 1:
        return 0
    largest_linear = max((inputs * outputs for _, inputs, outputs in shape.linears), default=0)
    return (shape.largest_module + largest_linear + prefetch) * itemsize


def head_bytes(shape: Shape, itemsize: int) -> int:
    """V d b: the head, which each rank keeps whole in addition to its shard."""
    return shape.head * itemsize


def forward_bytes_per_token(shape: Shape, itemsize: int) -> int:
    """max(3 I + 4 d, 4 d + 5 Q + 4 C) b: peak of one layer without gradients, in the MLP or attention."""
    mlp = 3 * shape.intermediate
    return (4 * shape.hidden + max(mlp, 5 * shape.query + 4 * shape.key)) * itemsize


def activation_bytes_per_token(
    shape: Shape, itemsize: int, *, checkpointing: bool, lora_rank: int
) -> tuple[float, float]:
    """Bytes per token kept by a training forward, and temporary in its backward.

    `lora_rank` 0: full fine-tuning.

    With checkpointing: L d s kept (layer inputs; s = b, fp32 in full fine-tuning); recomputation and backward
    of one layer: LoRA 32 d + 14 I + 14.5 Q + 4.5 C + 40 r, full 36 d + 12 I + 14.5 Q + 6 C.
    Without: autograd keeps L times LoRA 18.7 d + 8.1 I + 14.6 Q + 4.3 C + 23 r, full 28 d + 8 I + 14.5 Q +
    6.3 C; temporary: 22 d. The coefficients hold for bf16 autocast; fp32 compute takes at most twice as much,
    which is assumed.
    """
    sizes = (shape.hidden, shape.intermediate, shape.query, shape.key, lora_rank)

    def layer(*coefficients: float) -> float:
        return sum(c * size for c, size in zip(coefficients, sizes, strict=True)) * itemsize / 2

    if checkpointing:
        inputs = shape.layers * shape.hidden * (itemsize if lora_rank else 4)
        return inputs, layer(32, 14, 14.5, 4.5, 40) if lora_rank else layer(36, 12, 14.5, 6, 0)
    kept = layer(18.7, 8.1, 14.6, 4.3, 23) if lora_rank else layer(28, 8, 14.5, 6.3, 0)
    return shape.layers * kept, 22 * shape.hidden * itemsize / 2


def optimizer_bytes(trained: int, num_gpus: int, zero2: bool) -> int:
    """AdamW's two fp32 moments, 8 T; ZeRO-2: this rank's moments and fp32 master weights, (8 + 4) T / n."""
    return 12 * trained // num_gpus if zero2 else 8 * trained


def update_bytes(trained: int, num_gpus: int, zero2: bool) -> int:
    """4 T (ZeRO-2: / n): square roots in AdamW's update, after the activations are freed."""
    return 4 * trained // num_gpus if zero2 else 4 * trained


def gradient_bytes(trained: int, num_gpus: int, zero2: bool) -> int:
    """4 T; under DDP 8 T (gradients and buckets); ZeRO-2: 4 T / n and a bucket of at most 2 GB."""
    if zero2:
        return 4 * trained // num_gpus + min(4 * trained, 2 * 10**9)
    return (8 if num_gpus > 1 else 4) * trained


def loss_bytes(
    num_scored: int, shape: Shape, signal: str, device_bytes: float, *, trains_head: bool, in_kernels: bool
) -> tuple[float, float]:
    """Memory that stays after the loss, and its chunks (fp32 logits, bf16 gradients).

    Staying: hidden states and their gradients; 4 V d for a trained head; 6 N V for the logits of `full`.
    `in_kernels`: the loss runs in `dualkl.kernels`; else in plain PyTorch, whose chunks fill the budget of
    `dualkl.heads.row_chunks`. Chunks of the kernels, with u = 0.3 GiB: u for topk, nucleus and full, 2 u for
    hidden; the same again plus u for gradients; in total at most a sixteenth of the device, and less for few
    tokens.
    """
    buffers = 2 if signal == "hidden" else 1
    if in_kernels:
        unit = min(LOSS_BUFFER, device_bytes / 16 / (2 * buffers + 1))
        chunks = min((2 * buffers + 1) * unit, num_scored * shape.vocab_size * (4 * buffers + 2))
    else:
        arrays = 2 if signal in ("topk", "nucleus") else 7
        chunks = min(4.0 * arrays * num_scored * shape.vocab_size, COMPRESS_BUDGET, device_bytes / 16)
    given = 6.0 * num_scored * shape.vocab_size if signal == "full" else 0.0
    head = 4 * shape.head if trains_head else 0
    return given + head + 4 * num_scored * shape.hidden, chunks


def compress_bytes(num_scored: int, shape: Shape, device_bytes: float) -> float:
    """One fp32 array [rows, V] of `dualkl.compress`, which sizes its rows for three; its kernels need one."""
    return min(12.0 * num_scored * shape.vocab_size, COMPRESS_BUDGET, device_bytes / 16) / 3
