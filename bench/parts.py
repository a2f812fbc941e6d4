"""Where a step's time goes: seconds of a device's kernels by what they do, from one profiled step.

A product counts as short where it takes less time than the least of the frozen weights' products would,
nearly, at the rate of a large one: those are the adapters'. Names decide the rest. Idle is the step's time,
measured without the profiler, less the time in which any kernel ran.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Record = dict[str, Any]
NUM_NAMES = 12
SHORT = 0.9  # of the least frozen product's time
KINDS = {  # the first that is found in a kernel's name
    "fused": r"^triton_",
    "attention": r"flash|fmha|attention|attn",
    "loss": r"^(dense|sparse|groups|choose|pick)_kernel",
    "copies": r"memcpy|memset|copy|\bfill|FillFunctor",
    "optimizer": r"adam|multi_tensor|foreach",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|xmma|::(add)?mm\b|::bmm\b",
    "elementwise": r"elementwise|reduce|softmax|index|Cat",
}


@dataclass(frozen=True)
class Event:
    """One run of a kernel (on a CPU: of an operator without its callees), seconds on the profiler's clock."""

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """The kernels of one step, and what the least of its frozen products multiplies: weights, and tokens on
    average.
    """

    events: list[Event]
    least_weights: int
    num_forwards: int

    def parts(self, num_tokens: float, step_seconds: float, flops_per_second: float) -> Record:
        """Seconds by class, idle seconds, and the longest kernels, each with seconds and number of runs."""
        least = 2 * self.least_weights * num_tokens / self.num_forwards / flops_per_second
        return parts(self.events, step_seconds, SHORT * least)


def profiled(step: Callable[[], None], device: str) -> list[Event]:
    """The kernels that `step` runs; it must wait for the device before it returns."""
    on_cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        step()
    return [
        Event(
            event.name,
            event.time_range.start / 1e6,
            (event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total) / 1e6,
        )
        for event in profiler.events() or ()
        if event.device_type == (DeviceType.CUDA if on_cuda else DeviceType.CPU)
    ]


def kind_of(event: Event, shortest: float) -> str:
    """The class of a kernel; `shortest`: seconds below which a product is short."""
    found = next(
        (kind for kind, pattern in KINDS.items() if re.search(pattern, event.name, re.IGNORECASE)), "other"
    )
    if found == "products":
        return "long_products" if event.seconds >= shortest else "short_products"
    return found


def busy_seconds(events: Iterable[Event]) -> float:
    """Seconds in which at least one of them ran."""
    total = end = 0.0
    for event in sorted(events, key=lambda event: event.start):
        stop = event.start + event.seconds
        total += max(0.0, stop - max(end, event.start))
        end = max(end, stop)
    return total


def parts(events: list[Event], step_seconds: float, shortest: float) -> Record:
    """Seconds by class, idle ones, and the `NUM_NAMES` kernels that take most, each with seconds and number
    of runs.
    """
    by_kind, by_name, runs = defaultdict[str, float](float), defaultdict[str, float](float), Counter[str]()
    for event in events:
        by_kind[kind_of(event, shortest)] += event.seconds
        by_name[event.name] += event.seconds
        runs[event.name] += 1
    rounded = {kind: round(seconds, 4) for kind, seconds in sorted(by_kind.items())}
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:NUM_NAMES]
    names = [[round(seconds, 4), runs[name], name[:90]] for name, seconds in longest]
    return rounded | {"idle": round(max(0.0, step_seconds - busy_seconds(events)), 4), "kernels": names}


def least_weights(decoder: nn.Module) -> int:
    """Numbers in the least weight matrix of the decoder's layers, adapters left out."""
    return min(
        p.numel() for name, p in decoder.layers.named_parameters() if p.ndim == 2 and "lora_" not in name
    )
