"""Time estimates in seconds: hardware lower bounds, divided by the measured share of the peak rate.

Unless noted, shares and times are from docs/performance.md, measured on one H200.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.models.memory import Shape, kv_bytes_per_token
from stages.runtime.errors import UserError

# Matrix products run at 685 TFLOP/s; the data sheet says 989.
MATMUL_SHARE = 685 / 989
# A copy runs at 4.24 TB/s of 4.8.
COPY_SHARE = 4.24 / 4.8
# Of the lower bound: 27,550 tokens/s, 4B shape, 256 slots, prefill and sampling included.
DECODE_SHARE = 0.565
# A captured kernel with little work: storing K and V of 256 rows, 36 times in 0.082 ms.
KERNEL_SECONDS = 2.3e-6
# Minimum per layer of a decode step: 2 norms, 4 products, rotary, K and V, attention, gate, 2 sums.
LAYER_KERNELS = 12
# Share of the matrix rate in a teacher's forward: between 0.78 (32B shape) and 0.68 (8B).
FORWARD_SHARE = 0.73
# Share of the matrix rate: 2.07 s computed, 2.13 s measured, 4B shape (bench/results/stage_two.json).
TRAIN_SHARE = 0.97
# Compiled or not: bytes of all other work of a step, per token, layer and unit of width.
TRAIN_BYTES = {
    True: 700,
    False: 1900,
}
# Per scored token beyond the forward: 29,935 of 30,531 tokens/s, 8B shape, two in three scored.
SCORE_SECONDS = 1e-6
# DeepSpeed's hooks: a forward of 4,096 tokens through 12 layers took 82.7 ms on one H200.
ZERO3_LAYER_SECONDS = 6.9e-3


@dataclass(frozen=True)
class Gpu:
    """Specifications of one GPU: reported GiB, dense bf16 FLOP/s, memory bytes/s, bytes/s to its peers."""

    name: str
    gib: float
    peak_flops: float
    peak_bandwidth: float
    link: float

    @property
    def flops(self) -> float:
        return self.peak_flops * MATMUL_SHARE

    @property
    def bandwidth(self) -> float:
        return self.peak_bandwidth * COPY_SHARE


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79.1, 312e12, 2.04e12, 300e9),
        Gpu("a100-40", 39.4, 312e12, 1.56e12, 300e9),
        Gpu("a800", 79.1, 312e12, 2.04e12, 200e9),
        Gpu("h100", 79.1, 989e12, 3.35e12, 450e9),
        Gpu("h200", 139.8, 989e12, 4.8e12, 450e9),
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
    return min(fitting or [GPUS["h200"]], key=lambda gpu: (gpu.peak_flops, gpu.gib, gpu.link))


def launch_seconds(shape: Shape) -> float:
    """Lower bound of a captured decode step for any model size: its kernels launch one after the other."""
    return LAYER_KERNELS * shape.layers * KERNEL_SECONDS


def decode_seconds(shape: Shape, itemsize: int, gpu: Gpu, slots: int, mean_tokens: float) -> float:
    """A decode step in each of B slots: lower bound / DECODE_SHARE, or `launch_seconds` if longer.

    The lower bound is max(P b / bandwidth, 2 P B / flops) + B KV bytes / bandwidth.
    """
    weights = max(
        shape.parameters * itemsize / gpu.bandwidth, 2 * (shape.body + shape.head) * slots / gpu.flops
    )
    cached = slots * mean_tokens * kv_bytes_per_token(shape, itemsize) / gpu.bandwidth
    return max((weights + cached) / DECODE_SHARE, launch_seconds(shape))


def forward_seconds(
    shape: Shape, itemsize: int, gpu: Gpu, tokens: float, scored: float, zero3: bool, num_gpus: int
) -> float:
    """One scoring forward: the slowest of products, weight gathering between ranks, and DeepSpeed's hooks."""
    products = 2 * (shape.body * tokens + shape.head * scored) / gpu.flops / FORWARD_SHARE
    if zero3:
        gather = shape.parameters * itemsize * (num_gpus - 1) / num_gpus / gpu.link
        products = max(products, gather, ZERO3_LAYER_SECONDS * shape.layers)
    return products + SCORE_SECONDS * scored


def train_seconds(
    shape: Shape, gpu: Gpu, tokens: float, scored: float, *, frozen: bool, checkpointing: bool, compiled: bool
) -> float:
    """Forward and backward: 4 P FLOP per token with frozen weights, else 6; recomputation adds 2.

    The head counts scored tokens only. Attention and elementwise work are bound by memory bandwidth.
    """
    each = (4 if frozen else 6) + (2 if checkpointing else 0)
    flops = each * shape.body * tokens + (4 if frozen else 6) * shape.head * scored
    return (
        flops / gpu.flops / TRAIN_SHARE
        + TRAIN_BYTES[compiled] * tokens * shape.layers * shape.hidden / gpu.bandwidth
    )
