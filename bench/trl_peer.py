"""TRL's DistillationTrainer as the benches run it, and the environment in which it finds vLLM.

vLLM comes as a folder of packages of its own (`site`, and `stubs` for names that it imports for annotations).
A process that uses it must see that folder first, and no other process should: it brings versions of packages
that this project has too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

VLLM_ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_CACHE_ROOT": "/tmp/vllm_cache",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
Part = Callable[[str], AbstractContextManager[None]]


def add_vllm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vllm", type=Path, help="the folder that vLLM was unpacked into")


def environment(vllm: Path | None) -> dict[str, str]:
    """This process's environment for another one: with vLLM's folder first, if given."""
    if vllm is None:
        return dict(os.environ)
    if not (vllm / "site/vllm").is_dir():
        raise ValueError(f"{vllm} has no site/vllm; give the folder into which vLLM was unpacked.")
    paths = [str(vllm / "site"), str(vllm / "stubs"), os.environ.get("PYTHONPATH", "")]
    return os.environ | VLLM_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_with_vllm(arguments: list[str], vllm: Path | None) -> None:
    """A Python process that can import vLLM, from its folder or as it is installed."""
    if vllm is None and find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "No module named 'vllm'; --vllm names the folder that it was unpacked into."
        )
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(vllm), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the process with vLLM ended with code {done.returncode}: {done.stderr[-1500:]}")


def distillation_trainer(
    part: Part, *, on_tokens: Callable[[list[int]], Any], prompts: list[str], arguments: Any, **keywords: Any
) -> Any:
    """A trainer on these prompts whose generation and teacher's forward are inside `part(NAME)`.

    `on_tokens` is given the lengths of each batch's completions. `arguments` of DistillationConfig;
    `keywords` of DistillationTrainer.
    """
    import datasets
    from trl import DistillationConfig, DistillationTrainer

    class Timed(DistillationTrainer):
        def _generate_single_turn(self, *positional: Any, **named: Any) -> Any:
            with part("generate"):
                completions = super()._generate_single_turn(*positional, **named)
            on_tokens([len(ids) for ids in completions])
            return completions

        def _get_last_hidden_state(self, *positional: Any, **named: Any) -> Any:
            if torch.is_grad_enabled():  # the student's
                return super()._get_last_hidden_state(*positional, **named)
            with part("teacher"):
                return super()._get_last_hidden_state(*positional, **named)

    quiet = {"logging_steps": 1000, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return Timed(
        args=DistillationConfig(**(quiet | arguments)),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        **keywords,
    )
