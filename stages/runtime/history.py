"""The configuration of each training step: a `config` record in metrics.jsonl at every change."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.config import Config
from stages.runtime.errors import UserError
from stages.runtime.version import own_version

if TYPE_CHECKING:  # torch takes seconds, and `dualkl view` and `dualkl report` need none of it
    import torch

    from stages.runtime.distributed import World

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")
FREE = {
    "run_name",
    "runs_dir",
    "device",
    "teacher_ds_zero3",
    "teacher_ds_config",
    "attn_implementation",
    "gen_micro_batch",
    "lp_micro_batch",
    "rollouts_per_unit",
    "role",
    "grad_accum",
    "micro_batch_tokens",
    "packing",
    "compile",
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_checkpoints",
    "export_checkpoint",
    "resume_from",
    "wandb_project",
    "wandb_name",
    "trace_every",
}
"""Keys that affect how a run is computed, stored or displayed, but not what is trained and measured."""
OF_WEIGHTS = {"use_lora", "lora_r", "lora_alpha", "lora_targets"}
"""Keys that decide which weights are trained, and what they mean: a checkpoint is of one value of each."""
MOST_NAMED = 5
Record = dict[str, Any]


def config_record(config: Config, world: World, step: int) -> Record:
    """Content of a `config` record: the configuration from `step` on, command, versions and processes."""
    return {
        "from_step": step,
        "config": config.model_dump(),
        "command": command_line(),
        "versions": versions(),
        "processes": world.size,
        "device": world.device.type,
        "hardware": hardware(world.device),
        "commit": commit(),
    }


def hardware(device: torch.device) -> str:
    """The accelerator's name, or the processor's and its number of cores."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", facts, re.MULTILINE)
    return f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The commit of the checkout that this package lies in; None for an installed package, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def command_line() -> str:
    if sys.argv[0].startswith("dualkl "):  # as stages.cli names its commands
        return f"{sys.argv[0]} {shlex.join(sys.argv[1:])}".rstrip()
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {spec.name}" if spec is not None else Path(sys.argv[0]).name
    return f"python {name} {shlex.join(sys.argv[1:])}".rstrip()


def versions() -> dict[str, str]:
    """Of Python, this software and the libraries that are installed here."""
    found = {"python": platform.python_version(), "dualkl": own_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def last_config(records: Iterable[Record]) -> Record | None:
    """Newest `config` record; None if the run has not trained or predates these records."""
    return next(iter(reversed(configs(records))), None)


def configs(records: Iterable[Record]) -> list[Record]:
    """All `config` records, oldest first."""
    return [record for record in records if record["kind"] == "config"]


def is_same_span(before: Record | None, now: Record) -> bool:
    """Whether steps under `now` continue the span of `before`, even if the command was worded differently."""
    names = ("config", "versions", "processes", "device")
    return before is not None and all(before.get(name) == json.loads(json.dumps(now[name])) for name in names)


def changes(before: Record, now: Record) -> dict[str, list[Any]]:
    """Keys whose values differ between two dumped configurations, as [before, now]."""
    old, new = (
        {leaf: value for section in config.values() for leaf, value in section.items()}
        for config in (before, now)
    )
    new = json.loads(json.dumps(new))
    return {leaf: [old[leaf], new[leaf]] for leaf in new if leaf in old and old[leaf] != new[leaf]}


def goes_on(last: Record, config: Config) -> bool:
    """Whether steps have already been taken with this configuration, including `resume_from`."""
    found = changes(last["config"], config.model_dump())
    return "resume_from" not in found and found.keys() <= FREE


def spans(records: list[Record]) -> list[Record]:
    """A run's configurations in order: steps (first, last), changes from the previous one, command, versions.

    Configurations without any step are left out; empty if the run has not trained or predates these records.
    """
    starts = configs(records)
    last = max((record["step"] for record in records if record["kind"] == "step"), default=0)
    ends = [*(record["from_step"] - 1 for record in starts[1:]), last][: len(starts)]
    found, before = list[Record](), None
    for record, end in zip(starts, ends, strict=True):
        if end < record["from_step"]:
            continue
        changed = changes((before or record)["config"], record["config"])
        kept = {name: record.get(name) for name in ("command", "versions", "processes", "device")}
        found.append({"steps": [record["from_step"], end], "changed": changed, **kept})
        before = record
    return found


def refuse_other_keys(folder: Path, config: Config, trained: Record | None, step: int) -> None:
    """UserError if the run in `folder` ended at `step` and was trained with a different configuration."""
    if trained is None or step < config.train.max_steps:
        return
    found = {
        leaf: pair
        for leaf, pair in changes(trained["config"], config.model_dump()).items()
        if leaf not in FREE
    }
    if not found:
        return
    old, new = _both(found)
    last = trained["config"]["train"]["max_steps"]
    state = "is finished" if step >= last else f"has got past step {config.train.max_steps}"
    raise UserError(
        f"the run in {folder} {state}: it was trained to step {step} with {old}, this command asks for"
        f" {new}. Nothing was changed. Give another --run_name for another run, the keys it was"
        f" trained with to see this one, or max_steps above {step} to train it further."
    )


def refuse_other_weights(folder: Path, config: Config, trained: Record | None, step: int) -> None:
    """UserError if the checkpoint of `step` holds other weights than those that `config` trains."""
    found = changes(trained["config"], config.model_dump()) if trained is not None else {}
    found = {leaf: pair for leaf, pair in found.items() if leaf in OF_WEIGHTS}
    if not found:
        return
    old, new = _both(found)
    raise UserError(
        f"the run in {folder} has a checkpoint of step {step}, trained with {old}, and this command asks for"
        f" {new}, which needs other weights. Nothing was changed. Give the keys it was trained with to go on, or"
        " another --run_name to train anew."
    )


def _both(found: dict[str, list[Any]]) -> tuple[str, str]:
    """Changed keys with their values before and now, at most MOST_NAMED of them."""
    some, more = [*found.items()][:MOST_NAMED], len(found) - MOST_NAMED
    old, new = (", ".join(f"{leaf} {pair[i]!r}" for leaf, pair in some) for i in (0, 1))
    return old, new + (f" (and {more} more)" if more > 0 else "")


def describe_changes(trained: Record | None, config: Config) -> str:
    """Describe the keys that changed since the previous steps, e.g. `lr: 0.1 (was 0.2)`; "" if none did."""
    found = changes(trained["config"], config.model_dump()) if trained is not None else {}
    return "; ".join(f"{leaf}: {new} (was {old})" for leaf, (old, new) in found.items())
