"""Small configurations, stages run in processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from stages.data.prompts import Prompt, training_prompts
from stages.loops import setup
from stages.loops.setup import Vocabulary
from stages.models import checkpoints
from stages.runtime import config as configuration
from stages.runtime.config import Config
from stages.runtime.run import Run, open_run

ROOT = Path(__file__).resolve().parent.parent
STUDENT, TEACHER = "examples/arithmetic/student", "examples/arithmetic/teacher"
DEMO = ["--config", "pipeline.yaml"]
SMALL = [
    *DEMO, "--max_steps", "4", "--refresh_every", "2", "--rollouts_per_refresh", "32", "--batch_size", "16",
    "--eval_prompts", "16", "--rollouts_per_unit", "16", "--checkpoint_every", "1", "--num_prompts", "64",
]  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """What a process left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    def expect_success(self) -> Finished:
        assert self.code == 0, self.err[-6000:]
        return self

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def flags(**values: Any) -> list[str]:
    """Keyword arguments as command-line flags."""
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def make_config(folder: Path, **values: Any) -> Config:
    """The small demo configuration with its runs below `folder`."""
    return configuration.parse_arguments([*SMALL, "--runs_dir", str(folder), *flags(**values)], "")


def make_run(folder: Path, **values: Any) -> Run:
    """A run of the small demo configuration in this process."""
    return open_run("", [*SMALL, "--runs_dir", str(folder), *flags(**values)])


def vocabulary_of(config: Config) -> Vocabulary:
    return setup.shared_vocabulary(config)


def prompts_of(config: Config) -> list[Prompt]:
    return training_prompts(config, vocabulary_of(config).tokenizer).prompts


def environment(**extra: str) -> dict[str, str]:
    """The environment of a process that computes on one CPU thread and asks no hub."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return {**inherited, **fixed, **extra}


def run_command(arguments: list[str], timeout: float = 300, env: dict[str, str] | None = None) -> Finished:
    """A command at the repository's root; `arguments[0]` may be `python` or `torchrun`."""
    heads = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    command = [*heads.get(arguments[0], [arguments[0]]), *arguments[1:]]
    done = subprocess.run(
        command, cwd=ROOT, env=env or environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run_stage(module: str, *arguments: str, timeout: float = 300) -> Finished:
    """`python -m MODULE ARGUMENTS`."""
    return run_command(["python", "-m", module, *arguments], timeout)


def run_torchrun(*arguments: str, timeout: float = 300) -> Finished:
    """`torchrun --standalone --nproc_per_node=2 ARGUMENTS`: a script, or `-m MODULE`, and its arguments."""
    return run_command(["torchrun", "--nproc_per_node=2", *arguments], timeout)


def _run_module(module: str, arguments: tuple[str, ...], outputs: tuple[str, str], variables: dict[str, str]) -> None:
    import runpy

    for descriptor, path in ((1, outputs[0]), (2, outputs[1])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    for name in [name for name in sys.modules if name == module]:
        del sys.modules[name]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


_counter = iter(range(10**9))


def metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an exported student."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert left.keys() == right.keys()
    assert left
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
