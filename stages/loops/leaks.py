"""Memory between refreshes: what is still allocated without the teacher, with a warning if it grows."""

from __future__ import annotations

import gc

import torch

from stages.runtime import metrics
from stages.runtime.run import Run

TOLERATED_SHARE, TOLERATED_BYTES = 0.05, 64 * 2**20
"""Growth since the first comparable refresh is tolerated up to the larger of these."""


def allocated_bytes(device: torch.device) -> int:
    """Bytes of this process's tensors on `device`: from CUDA's allocator; on a CPU, of all Python tensors."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            if storage.device.type == "cpu":
                storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def memory_after_refresh(run: Run) -> dict[str, int]:
    """Bytes of the fullest process and growth since the first comparable refresh, to log (collective).

    A refresh is comparable if this process has taken a step before it: a step's lasting memory then exists.
    """
    allocated = int(run.world.max([float(allocated_bytes(run.world.device))])[0])
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
    stepped = False
    for record in metrics.read(run.metrics.path) if run.world.is_main else []:
        if record.get("time", 0) < run.clock.started:
            continue
        stepped = stepped or record["kind"] == "step"
        if stepped and record["kind"] == "refresh" and "memory_allocated_bytes" in record:
            return int(record["memory_allocated_bytes"])
    return None
