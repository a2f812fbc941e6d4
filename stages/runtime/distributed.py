"""The current process, its device, and the few reductions that the stages need."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from cache.plain import plain
from stages.runtime.errors import UserError

# Ranks without a unit wait for those that generate, longer than the libraries' default of ten minutes. The
# launcher detects dead ranks.
PATIENCE = timedelta(hours=6)
_said: set[str] = set()


@dataclass(frozen=True)
class World:
    """One of `size` processes. Reductions are collective (all ranks call them), and free when alone."""

    rank: int
    size: int
    device: torch.device
    accelerator: Accelerator

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def student_is_deepspeed(self) -> bool:
        return self.accelerator.distributed_type == "DEEPSPEED"

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Gather `value` (picklable) from every rank, in rank order."""
        gathered = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def _reduce(self, values: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return tensor.tolist()


def start(device: str) -> World:
    """Join the processes launched by torchrun or accelerate, or run alone.

    Errors: `UserError` if a GPU is requested and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU here; use --device cpu or auto.")
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
            raise UserError(
                "DeepSpeed for the student needs GPUs (accelerate falls back to plain DDP on a CPU); use"
                " torchrun."
            )
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=use_cpu, step_scheduler_with_optimizer=False, kwargs_handlers=[patience])
    return World(accelerator.process_index, accelerator.num_processes, accelerator.device, accelerator)


def say_once(line: str) -> None:
    """Print `line` on the main process, the first time only."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if is_main and line not in _said:
        print(plain(line), flush=True)
    _said.add(line)


def ensure_process_group(world: World) -> None:
    """Create the process group and environment variables that DeepSpeed needs, even without a launcher.

    On a CPU, also stop DeepSpeed from compiling its collective.
    """
    if not dist.is_initialized():
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        backend = "gloo" if world.device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    if world.device.type == "cpu":
        _skip_compiled_shared_memory_op()


def _skip_compiled_shared_memory_op() -> None:
    """Skip compiling DeepSpeed's CPU collective (20 s, needs g++); gloo is used instead."""
    # the attribute of that name is torch itself
    module: Any = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None
