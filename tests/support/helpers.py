"""Small configurations, stages run in separate processes, and their results."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.data.prompts import Prompt, training_prompts
from stages.loops import setup
from stages.runtime import config as configuration
from stages.runtime.config import Config
from stages.runtime.run import Run, open_run

ROOT = Path(__file__).resolve().parents[2]
STUDENT, TEACHER = "examples/arithmetic/student", "examples/arithmetic/teacher"
DEMO = ["--config", "pipeline.yaml"]
SMALL = [
    *DEMO,
    "--max_steps",
    "4",
    "--refresh_every",
    "2",
    "--rollouts_per_refresh",
    "32",
    "--rollouts_per_unit",
    "16",
    "--batch_size",
    "16",
    "--num_prompts",
    "64",
    "--eval_prompts",
    "16",
    "--checkpoint_every",
    "1",
]

_PRELOAD = [
    "stages.pipeline",
    "stages.evaluate",
    "stages.rollout",
    "peft",
    "deepspeed",
    "transformers.integrations",
    "tests.support.frozen_imports",
]


@dataclass(frozen=True)
class Finished:
    """A finished process: its exit code and output."""

    code: int
    out: str
    err: str

    def expect_success(self) -> Finished:
        assert self.code == 0, f"exit code {self.code}\n{self.out[-2000:]}\n{self.err[-6000:]}"
        return self

    def expect_sentence(self, *parts: str) -> str:
        """Check that it failed with one `error: ...` line that contains `parts`, and no traceback."""
        assert self.code != 0, f"it succeeded\n{self.out[-2000:]}"
        assert "Traceback" not in self.err, self.err[-6000:]
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err[-6000:]
        for part in parts:
            assert part in lines[0], lines[0]
        return lines[0]


def flags(**values: Any) -> list[str]:
    """Keyword arguments as command-line flags."""
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def small(folder: Path, **values: Any) -> list[str]:
    """Command line of the small demo with runs in `folder`; later flags of the same name win."""
    return [*SMALL, "--runs_dir", str(folder), *flags(**values)]


def make_config(folder: Path, **values: Any) -> Config:
    return configuration.parse_arguments(small(folder, **values), "")


def make_run(folder: Path, **values: Any) -> Run:
    """A run of the small demo in this process, with the folder that `Run.claim` creates."""
    run = open_run("", small(folder, **values))
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def prompts_of(config: Config) -> list[Prompt]:
    return training_prompts(config, setup.shared_vocabulary(config).tokenizer).prompts


def environment(**extra: str) -> dict[str, str]:
    """Environment of a process that computes on one CPU thread and stays offline."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**inherited, **fixed, **extra}


def run_python(*arguments: str, timeout: float = 300, **extra: str) -> Finished:
    """Run `python ARGUMENTS` at the repository root; `extra` are environment variables."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def torchrun(*arguments: str, timeout: float = 300) -> Finished:
    """Run `torchrun --standalone --nproc_per_node=2 ARGUMENTS` (script or `-m MODULE`, and its arguments)."""
    return run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments, timeout=timeout
    )


class Forker:
    """Run functions in clean processes, forked from a server that has imported everything once.

    Each process is as fresh as one started by a shell, without the seconds needed to import torch. Several
    processes find each other through torchrun's environment variables.
    """

    def __init__(self, context: Any, folder: Path) -> None:
        self._context, self._folder, self._count = context, folder, 0

    def stage(self, module: str, *arguments: str, processes: int = 1, **variables: str) -> Finished:
        """Run `python -m MODULE ARGUMENTS`."""
        return self.call(_run_module, module, arguments, processes=processes, **variables)

    def call(
        self, function: Callable[..., None], *arguments: Any, processes: int = 1, **variables: str
    ) -> Finished:
        """Run a module-level `function(*arguments)` in `processes` processes with these variables."""
        workers, where = self._start(function, arguments, processes, variables)
        for worker in workers:
            worker.join(300)
            if worker.is_alive():
                worker.kill()
        code = max(abs(-1 if worker.exitcode is None else worker.exitcode) for worker in workers)
        texts = [
            "".join((where / f"{kind}-{r}").read_text() for r in range(processes)) for kind in ("out", "err")
        ]
        return Finished(code, *texts)

    def start(self, module: str, *arguments: str, processes: int = 1) -> list[Any]:
        """Start `python -m MODULE ARGUMENTS`; returns the running processes."""
        return self.launch(module, *arguments, processes=processes)[0]

    def launch(self, module: str, *arguments: str, processes: int = 1) -> tuple[list[Any], Path]:
        """Like `start`, and also return the folder of their output: `out-RANK` and `err-RANK`."""
        return self._start(_run_module, (module, arguments), processes, {})

    def _start(
        self,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        processes: int,
        variables: dict[str, str],
    ) -> tuple[list[Any], Path]:
        self._count += 1
        where = self._folder / str(self._count)
        where.mkdir()
        port = _free_port()
        workers = []
        for rank in range(processes):
            own = dict(variables)
            if processes > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                own |= {
                    "LOCAL_WORLD_SIZE": str(processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            workers.append(
                self._context.Process(target=_in_process, args=(function, arguments, where, rank, own))
            )
        for worker in workers:
            worker.start()
        return workers, where


def make_forker(folder: Path) -> Forker:
    """A forker whose processes write their output to `folder`."""
    saved = dict(os.environ)
    wanted = environment()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        context.Process(target=int).start()  # the server keeps the environment in which it is started
    finally:
        os.environ.clear()
        os.environ.update(saved)
    return Forker(context, folder)


def _in_process(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    where: Path,
    rank: int,
    variables: dict[str, str],
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(where / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command installs its own handlers
    os.chdir(ROOT)
    torch.set_num_threads(1)
    function(*arguments)


def _run_module(module: str, arguments: tuple[str, ...]) -> None:
    import runpy

    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def records_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind in a run's metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an exported student or a checkpoint."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Assert bitwise equality."""
    assert left
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, the first is {different[0]}"


def refused(
    forked: Forker, module: str, folder: Path, *parts: str, extra: list[str] | None = None, **values: Any
) -> None:
    """Assert that the command fails with one sentence that contains `parts`."""
    forked.stage(f"stages.{module}", *small(folder, **values), *(extra or [])).expect_sentence(*parts)
