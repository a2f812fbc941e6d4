"""Memory between refreshes: what is still allocated without the teacher, with a warning if it grows."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stages.runtime.run import Run

TOLERATED_SHARE, TOLERATED_BYTES = 0.05, 64 * 2**20
"""Growth since the first comparable refresh is tolerated up to the larger of these."""


@contextmanager
def old_objects_kept(device: torch.device) -> Iterator[None]:
    """Inside, collections skip the objects that exist now, and take milliseconds, not tenths of a second.

    Not on a CPU, where `allocated_bytes` looks at all objects.
    """
    if device.type == "cpu":
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def allocated_bytes(device: torch.device, apart: Iterable[Tensor] = ()) -> int:
    """Bytes of this process's tensors on `device`: from CUDA's allocator; on a CPU, of all Python tensors.

    `apart`: tensors in host memory that are not counted.
    """
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages, skipped = {}, {tensor.untyped_storage()._cdata for tensor in apart}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            if storage.device.type == "cpu":
                storages[storage._cdata] = storage.nbytes()
    return sum(size for address, size in storages.items() if address not in skipped)


def memory_after_refresh(run: Run, apart: Iterable[Tensor] = ()) -> dict[str, int]:
    """Bytes of the fullest process and growth since the first comparable refresh, to log (collective).

    A refresh is comparable if this process has taken a step before it: a step's lasting memory then exists.
    `apart`: what is kept in host memory only while there is room.
    """
    allocated = int(run.world.max([float(allocated_bytes(run.world.device, apart))])[0])
    first = _first_comparable(run)
    growth = 0 if first is None else allocated - first
    if first is not None and growth > max(TOLERATED_SHARE * first, TOLERATED_BYTES):
        run.metrics.say(
            f"warning: {allocated:,} bytes are allocated after this refresh, {growth:,} more than the"
            f" {first:,} after the first one of this process: something is kept that should be freed. A run"
            " of many refreshes may run out of memory; it can be stopped and started again at any time."
            " Please report this with the run's metrics.jsonl."
        )
    return {"memory_allocated_bytes": allocated, "memory_growth_bytes": growth}


def _first_comparable(run: Run) -> int | None:
    """Bytes in this process's first refresh record after a step; None if none yet, or not the main rank."""
    found = run.metrics.first_refresh.get("memory_allocated_bytes")
    return None if found is None else int(found)
