"""Memory of one GPU: what is free, what a piece of work takes, and the most this process has used."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import torch

_highest: dict[int, int] = {}  # by device: the peak before the last reset


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate; None on a CPU.

    Includes what torch holds in reserve, except in private pools of captured steps.
    """
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + _reserve(device, private=False)


def peak_bytes(device: torch.device, work: Callable[[], object], *, collective: bool = False) -> float:
    """Bytes that `work` allocates at its peak; infinite if the memory does not suffice.

    Includes private pools that `work` leaves behind. `highest_bytes` takes no notice of `work`. With
    `collective`, out of memory is an error, because the other processes would wait for this one.
    """
    index = _settled(device)
    _highest[index] = max(_highest.get(index, 0), torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    before, pools = torch.cuda.memory_allocated(device), _reserve(device, private=True)
    try:
        work()
        torch.cuda.synchronize(device)
        added = _reserve(device, private=True) - pools
        return float(torch.cuda.max_memory_allocated(device) - before + max(0, added))
    except torch.OutOfMemoryError:
        if collective:
            raise
        return math.inf
    finally:
        _settled(device)
        torch.cuda.reset_peak_memory_stats(device)


def highest_bytes(device: torch.device) -> int:
    """The most bytes that tensors of this process have taken so far; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    return max(_highest.get(_index(device), 0), torch.cuda.max_memory_allocated(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _settled(device: torch.device) -> int:
    """Finish all work and return unused memory to the device; the device's index."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return _index(device)


def _reserve(device: torch.device, *, private: bool) -> int:
    """Bytes reserved by torch without a tensor in them, in private pools or outside them."""
    return sum(
        segment["total_size"] - segment["active_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == _index(device) and (tuple(segment["segment_pool_id"]) != (0, 0)) == private
    )
