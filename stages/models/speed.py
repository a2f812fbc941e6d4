"""Seconds that a model's work takes: floors from a card's rates, and the measured share of them that is reached."""

from __future__ import annotations

from dataclasses import dataclass

from stages.models.memory import Shape, kv_bytes_per_token
from stages.runtime.errors import UserError

MATMUL_SHARE = (
    685 / 989
)  # docs/performance.md: products on an H200 run at 685 TFLOP/s; its data sheet says 989
COPY_SHARE = 4.24 / 4.8  # docs/performance.md: a copy at 4.24 TB/s of 4.8
# Shares and seconds up to the last line are from docs/performance.md, one H200.
DECODE_SHARE = 0.565  # of the floor: 27,550 tokens/s, 4B shape, 256 slots, prefill and sampling included
KERNEL_SECONDS = (
    2.3e-6  # a captured kernel with little work: storing K and V of 256 rows, 36 times in 0.082 ms
)
LAYER_KERNELS = (
    12  # of a decode step, at least: 2 norms, 4 products, rotary, K and V, attention, gate, 2 sums
)
FORWARD_SHARE = 0.73  # a teacher's forward, of the products' rate: between 0.78 (32B shape) and 0.68 (8B)
TRAIN_SHARE = 0.97  # of the products' rate: 2.07 s counted in 2.13 s of products, 4B shape (bench/results/stage_two.json)
TRAIN_BYTES = {
    True: 700,
    False: 1900,
}  # compiled or not: all else of a step, for each token, layer and unit of width
SCORE_SECONDS = (
    1e-6  # a scored token beside the forward: 29,935 of 30,531 tokens/s, 8B shape, two in three scored
)
ZERO3_LAYER_SECONDS = (
    6.9e-3  # DeepSpeed's hooks: a forward of 4,096 tokens by 12 layers took 82.7 ms, one H200
)


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of one card: GiB that it reports, dense bf16 FLOP/s, memory bytes/s, bytes/s to its peers."""

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
    """The card of this name, or for a memory size alone the slowest card that has it; UserError for an unknown name."""
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
    """What a captured decode step takes at least, however small the model: its kernels begin one after the other."""
    return LAYER_KERNELS * shape.layers * KERNEL_SECONDS


def decode_seconds(shape: Shape, itemsize: int, gpu: Gpu, slots: int, mean_tokens: float) -> float:
    """A step that writes a token in each of B slots: its floor / DECODE_SHARE, or `launch_seconds` where that is more.

    The floor is max(P b / bandwidth, 2 P B / flops) + B KV bytes / bandwidth. Launches are a bound, not an estimate.
    """
    weights = max(
        shape.parameters * itemsize / gpu.bandwidth, 2 * (shape.body + shape.head) * slots / gpu.flops
    )
    cached = slots * mean_tokens * kv_bytes_per_token(shape, itemsize) / gpu.bandwidth
    return max((weights + cached) / DECODE_SHARE, launch_seconds(shape))


def forward_seconds(
    shape: Shape, itemsize: int, gpu: Gpu, tokens: float, scored: float, zero3: bool, num_gpus: int
) -> float:
    """One scoring forward: the slowest of products, gathering the weights from the other ranks, and DeepSpeed's hooks."""
    products = 2 * (shape.body * tokens + shape.head * scored) / gpu.flops / FORWARD_SHARE
    if zero3:
        gather = shape.parameters * itemsize * (num_gpus - 1) / num_gpus / gpu.link
        products = max(products, gather, ZERO3_LAYER_SECONDS * shape.layers)
    return products + SCORE_SECONDS * scored


def train_seconds(
    shape: Shape, gpu: Gpu, tokens: float, scored: float, *, frozen: bool, checkpointing: bool, compiled: bool
) -> float:
    """Forward and backward: 4 P FLOP a token with frozen weights, else 6; 2 more for recomputation; the head on scored ones.

    Attention and all that passes over memory besides goes at the memory's rate.
    """
    each = (4 if frozen else 6) + (2 if checkpointing else 0)
    flops = each * shape.body * tokens + (4 if frozen else 6) * shape.head * scored
    return (
        flops / gpu.flops / TRAIN_SHARE
        + TRAIN_BYTES[compiled] * tokens * shape.layers * shape.hidden / gpu.bandwidth
    )
