"""Checks of the machine for `dualkl doctor`: processes, disk, memory, Weights & Biases."""

from __future__ import annotations

import netrc
import os
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from stages.loops.planning import Machine, Plan, make_plan
from stages.models import pretrained
from stages.models.memory import GIB, shape_of
from stages.models.speed import gpu_for
from stages.runtime import host_memory
from stages.runtime.config import Config
from stages.runtime.distributed import World
from stages.runtime.errors import UserError, one_line

PATIENCE = 30.0  # seconds for a sum over all processes
SITE_PATIENCE = 5.0
STATE_COPIES = 3  # fp32 copies of the trained weights in a checkpoint: weights, and Adam's two moments


def processes(world: World) -> str:
    """Sum a number over all processes. Raises UserError if that takes more than `PATIENCE` seconds."""
    if world.size == 1:
        return "not needed: one process"
    sums: list[float] = []
    thread = threading.Thread(target=lambda: sums.extend(world.sum([1.0])), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    backend = dist.get_backend()
    if sums != [float(world.size)]:
        raise UserError(
            f"{world.size} processes did not reach each other through {backend} within {PATIENCE:.0f} s;"
            " check MASTER_ADDR, the firewall and, for NCCL, NCCL_SOCKET_IFNAME (NCCL_DEBUG=INFO shows what"
            " it tries)."
        )
    return f"{world.size} processes reach each other through {backend}"


def disk(config: Config, plan: Plan | None) -> str:
    """Write a MiB where the run and its cache will be, and compare free space with what they need at most."""
    places = {"runs_dir": (Path(config.run.runs_dir), _checkpoint_bytes(config))}
    cached = plan.cache_bytes if plan is not None else 0.0
    if "://" not in config.cache_root:
        places["cache_dir"] = (Path(config.cache_root), cached)
    needed: dict[int, float] = {}
    told = []
    for key, (path, size) in places.items():
        there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{there} cannot be written ({error.strerror}); choose another {key}.") from error
        device = there.stat().st_dev
        needed[device] = needed.get(device, 0.0) + size
        free = shutil.disk_usage(there).free
        if free < needed[device]:
            raise UserError(
                f"{there} has {free / 1e9:.1f} GB free, but the run needs up to {needed[device] / 1e9:.1f} GB"
                f" of it; make room, choose another {key}, or lower keep_checkpoints or signal_k."
            )
        told.append(f"{key} up to {size / 1e9:.2g} of {free / 1e9:.0f} GB free")
    remote = [] if "://" not in config.cache_root else [f"{config.cache_root}: free space unknown"]
    return ", ".join([*told, *remote])


def _checkpoint_bytes(config: Config) -> float:
    """Bytes of all kept checkpoints, one being written, and the exported student."""
    shape = shape_of(pretrained.load_config(config.models.student_model))
    trained = shape.parameters
    if config.lora.use_lora:
        trained = sum(config.lora.lora_r * (inputs + outputs) for _, inputs, outputs in shape.linears)
    return 4.0 * trained * (STATE_COPIES * (config.train.keep_checkpoints + 1) + 1)


def plan_of(config: Config, world: World) -> Plan | None:
    """The plan for this machine's GPUs. On a CPU, plans for an H100; only the disk sizes are used.

    None for models that cannot be planned or read, which other checks report.
    """
    try:
        if world.device.type == "cuda":
            gib = torch.cuda.get_device_properties(world.device).total_memory / GIB
            return make_plan(config, Machine(gpu_for("", gib), world.size, gib))
        return make_plan(config, Machine(gpu_for("h100", None), world.size, 80.0))
    except UserError:
        return None


def memory(config: Config, world: World, plan: Plan | None) -> str:
    """Compare what the models need with the free memory of this machine."""
    if world.device.type == "cpu":
        return _host_memory(config, world)
    free, total = torch.cuda.mem_get_info(world.device)
    if plan is None:
        return f"{free / GIB:.1f} of {total / GIB:.1f} GiB free; models of this type cannot be planned"
    worst = plan.worst
    if not plan.fits:
        raise UserError(
            f"phase {worst.name} needs {worst.peak / GIB:.1f} GiB of a card with {total / GIB:.1f} GiB;"
            " `dualkl plan` with the same configuration suggests settings to lower."
        )
    if worst.peak > free:
        raise UserError(
            f"phase {worst.name} needs {worst.peak / GIB:.1f} GiB, but only {free / GIB:.1f} of"
            f" {total / GIB:.1f} GiB are free; end the other programs on this GPU (nvidia-smi)."
        )
    return f"planned peak {worst.peak / GIB:.1f} GiB ({worst.name}), {free / GIB:.1f} GiB free"


def _host_memory(config: Config, world: World) -> str:
    """On a CPU: weights of both models, gradients and optimizer, without activations."""
    models = config.models
    student = shape_of(pretrained.load_config(models.student_model))
    trained = 0 if config.lora.use_lora else student.parameters
    width = 4 if trained else pretrained.DTYPES[config.run.dtype].itemsize
    needed = float(student.parameters * width + trained * 4 * STATE_COPIES)
    if models.teacher_model:
        teacher = shape_of(pretrained.load_config(models.teacher_model))
        needed += teacher.parameters * pretrained.DTYPES[models.teacher_dtype].itemsize
    needed *= world.size
    free = host_memory.free_bytes()
    if needed > free:
        raise UserError(
            f"the weights of both models take {needed / GIB:.1f} GiB, but {free / GIB:.1f} GiB of memory are"
            " free; close other programs, use fewer processes, or dtype and teacher_dtype bf16."
        )
    return f"weights take {needed / GIB:.2g} of {free / GIB:.1f} GiB free"


def wandb(config: Config) -> str:
    """Whether Weights & Biases can take records; raises UserError if it is asked for and cannot."""
    if not config.log.wandb_project:
        return "off: wandb_project is empty"
    if find_spec("wandb") is None:
        raise UserError(
            "wandb_project is set, but wandb is not installed: pip install wandb, or leave it empty."
        )
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={mode}: nothing is sent"
    import wandb as library

    settings = library.setup().settings
    address = str(settings.base_url)
    try:
        urllib.request.urlopen(address, timeout=SITE_PATIENCE).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        raise UserError(
            f"{address} cannot be reached ({one_line(error)}); set WANDB_MODE=offline to keep records for"
            " `wandb sync`, or leave wandb_project empty."
        ) from error
    if not settings.api_key and not _is_in_netrc(address):
        raise UserError(f"{address} needs a login: run `wandb login`, or set WANDB_API_KEY.")
    return f"{address} answers, and there is a key"


def _is_in_netrc(address: str) -> bool:
    """Whether `wandb login` has left a key for the site."""
    try:
        return netrc.netrc().authenticators(urlsplit(address).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
