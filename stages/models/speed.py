"""Time estimates in seconds: 2 FLOP per parameter and token, at a measured share of the card's data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from stages.models.memory import Shape, kv_bytes
from stages.runtime.errors import UserError

# Shares of the data sheet, docs/performance.md, measured on one H200.
DECODE_SHARE = 0.4  # 27,550 tokens/s, 4B shape, 256 slots, prefill and sampling included
FORWARD_SHARE = 0.48  # 29,935 tokens/s, 8B shape; 7,664, 32B
TRAIN_SHARE = {True: 0.49, False: 0.32}  # compiled or not: 20,226 and 13,162 tokens/s, 4B shape
LAYER_SECONDS = 28e-6  # at least, in a decode step of any size: launching 12 kernels, 2.3 µs each


@dataclass(frozen=True)
class Gpu:
    """Data sheet of one GPU: reported GiB, dense bf16 FLOP/s and memory bytes/s."""

    name: str
    gib: float
    flops: float
    bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79.1, 312e12, 2.04e12),
        Gpu("a100-40", 39.4, 312e12, 1.56e12),
        Gpu("a800", 79.1, 312e12, 2.04e12),
        Gpu("h100", 79.1, 989e12, 3.35e12),
        Gpu("h200", 139.8, 989e12, 4.8e12),
    )
}


def gpu_for(name: str, gib: float | None) -> Gpu:
    """The GPU of this name, or the slowest with this memory size; UserError for an unknown name."""
    if name:
        if name not in GPUS:
            raise UserError(
                f"gpu {name} is not known here; choose one of {', '.join(GPUS)}, or give gpu_memory alone."
            )
        return GPUS[name]
    assert gib is not None
    fitting = [gpu for gpu in GPUS.values() if gpu.gib >= 0.95 * gib]
    return min(fitting or [GPUS["h200"]], key=lambda gpu: (gpu.flops, gpu.gib))


def decode_seconds(shape: Shape, itemsize: int, gpu: Gpu, slots: int, mean_tokens: float) -> float:
    """A decode step in all slots, which hold `mean_tokens` tokens each: read weights and cache, multiply."""
    read = shape.parameters * itemsize + slots * mean_tokens * kv_bytes(shape, itemsize)
    least = max(read / gpu.bandwidth, 2 * shape.used * slots / gpu.flops)
    return max(least / DECODE_SHARE, shape.layers * LAYER_SECONDS)


def forward_seconds(shape: Shape, gpu: Gpu) -> float:
    """One token of a scoring forward."""
    return 2 * shape.used / gpu.flops / FORWARD_SHARE


def train_seconds(shape: Shape, gpu: Gpu, frozen: bool, checkpointing: bool, compiled: bool) -> float:
    """One token of a forward and backward: 4 FLOP per parameter if frozen, else 6, and 2 to recompute."""
    each = (4 if frozen else 6) + (2 if checkpointing else 0)
    return each * shape.used / gpu.flops / TRAIN_SHARE[compiled]
