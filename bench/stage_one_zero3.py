"""Cell `zero3` of `bench/stage_one.py`: a teacher sharded over two processes against a plain copy in each.

    torchrun --nproc_per_node 2 bench/stage_one_zero3.py 8B cuda found.json

plain     both processes at once, each with all weights: the rate that sharding is measured by.
zero3     sharded, whole decoder layers gathered at once, as `teacher_ds_zero3` does it.
modules   sharded, each module's weights gathered by themselves: DeepSpeed's own way.

Rates are tokens a second of both processes together, until the slower one is done, with the head at scored
positions. Each process scores random tokens of its own. Reserved memory is that of all forwards, on the process
that needs more.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.measuring import Record, release, synchronize
from bench.stage_one_teacher import (
    FULL,
    TINY,
    Size,
    forward_batches,
    logprobs_of,
    make_teacher_model,
    unscored_rows,
)
from stages.models import teacher as teachers
from stages.models.teacher import Teacher
from stages.runtime import config as configuration
from stages.runtime import distributed
from stages.runtime.distributed import World

TRACED = 3
"""Forwards before those that count: DeepSpeed fetches ahead once it has seen two alike."""
BY_MODULE = {"leaf_module": {"classes": []}, "stage3_prefetch_bucket_size": 50_000_000}


def measure(shape: str, device: str) -> Record:
    """The cell's figures (collective)."""
    size, world = TINY if shape == "tiny" else FULL, distributed.start(device)
    distributed.ensure_process_group(world)
    config = configuration.parse_arguments(["--student_model", "bench", "--device", device], "")
    settings, packing = teachers.zero3_settings(config), config.train.packing
    by_module = settings | {"zero_optimization": settings["zero_optimization"] | BY_MODULE}

    def sharded(settings: dict[str, Any]) -> Teacher:
        model = make_teacher_model(shape, size, str(world.device))
        return teachers.sharded_teacher(model, settings, world, packing)

    model = make_teacher_model(shape, size, str(world.device))
    found, expected = figures("plain", teachers.plain_teacher(model, world, packing), size, world)
    del model
    for name, chosen in (("zero3", settings), ("modules", by_module)):
        more, logprobs = figures(name, sharded(chosen), size, world)
        gap = world.max([float((logprobs - expected).abs().max())])[0]
        share = more[f"{name}_tokens_per_second"] / found["plain_tokens_per_second"]
        found |= more | {f"{name}_share_of_plain": share, f"max_logprob_gap_{name}_plain": gap}
        if world.is_main:
            print({key: float(f"{value:.4g}") for key, value in found.items()}, flush=True)
    return found | {"processes": world.size, "equality_tokens": size.equality_tokens}


def figures(name: str, teacher: Teacher, size: Size, world: World) -> tuple[Record, Tensor]:
    """Rate and memory of a teacher, which is closed, and the logprobs of this process's tokens."""
    device, rows = world.device.type, unscored_rows(size, seed=world.rank)
    release(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(TRACED):
        forward_batches(teacher, rows[: size.warm_up], size, with_head=True)
    synchronize(device)
    world.barrier()
    started = time.perf_counter()
    tokens = sum(forward_batches(teacher, rows, size, with_head=True) for _ in range(size.repeats))
    synchronize(device)
    seconds = world.max([time.perf_counter() - started])[0]
    record = {f"{name}_tokens_per_second": world.sum([tokens])[0] / seconds}
    if device == "cuda":
        record[f"{name}_reserved_gib"] = world.max([torch.cuda.max_memory_reserved() / 2**30])[0]
    ids = np.random.default_rng(world.rank).integers(0, size.vocabulary, size.equality_tokens)
    logprobs = logprobs_of(teacher, ids)
    teacher.close()
    release(device)
    return record, logprobs


def main(shape: str, device: str, path: str) -> None:
    found = measure(shape, device)
    if torch.distributed.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
