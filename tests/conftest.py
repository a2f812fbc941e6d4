"""Fixtures: the embedded models, and `fork_stage`, which runs a stage in clean processes without paying for imports."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.models import checkpoints
from tests import helpers
from tests.helpers import ROOT, STUDENT, TEACHER, Finished

@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths of pipeline.yaml are relative to the repository; one thread, as the figures of the tests assume."""
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return checkpoints.load_tokenizer(str(ROOT / STUDENT), "main")


@pytest.fixture(scope="session")
def student_model() -> Any:
    """The embedded student in fp32, as stage two loads it without LoRA. Tests do not change it."""
    return checkpoints.load_model(str(ROOT / STUDENT), "main", torch.float32, "sdpa")


@pytest.fixture(scope="session")
def teacher_model() -> Any:
    """The embedded teacher in fp32, plain. Tests do not change it."""
    return checkpoints.load_model(str(ROOT / TEACHER), "main", torch.float32, "sdpa")


_PRELOAD = ["stages.pipeline", "stages.evaluate", "stages.rollout", "peft", "deepspeed", "transformers.integrations"]


@pytest.fixture(scope="session")
def fork_stage() -> Callable[..., Finished]:
    """`fork_stage(module, *arguments, processes=1, env=None)` runs a stage in fresh processes, forked from a server."""
    saved = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    context.Process(target=int).start()  # starts the server, under this environment
    os.environ.clear()
    os.environ.update(saved)

    def call(module: str, *arguments: str, processes: int = 1, env: dict[str, str] | None = None,
             folder: Path | None = None) -> Finished:  # fmt: skip
        where = Path(os.environ.get("TMPDIR", "/tmp")) if folder is None else folder
        where = where / f"forked-{os.getpid()}-{next(_counter)}"
        where.mkdir(parents=True)
        port = _free_port()
        workers = []
        for rank in range(processes):
            variables = dict(env or {})
            if processes > 1:
                variables |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            outputs = (str(where / f"out-{rank}"), str(where / f"err-{rank}"))
            workers.append(context.Process(target=_run_module, args=(module, arguments, outputs, variables)))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(300)
            if worker.is_alive():
                worker.kill()
        code = max(abs(worker.exitcode or 0) for worker in workers)
        texts = ["".join((where / f"{kind}-{r}").read_text() for r in range(processes)) for kind in ("out", "err")]
        return Finished(code, *texts)

    return call


