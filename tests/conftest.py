"""Fixtures: the embedded models, and `forked`, which runs stages in clean processes without the import time.

Fixtures import transformers themselves, so that tests of `dualkl` and `cache` start without it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.helpers import Forker

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ("examples/arithmetic/student", "examples/arithmetic/teacher")


def pytest_collection_finish() -> None:
    """Freeze imported objects: full garbage collections, run whenever a teacher is closed, then skip them."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Unfreeze objects, or extension modules report them as leaked at interpreter exit."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tests from the repository root: paths in pipeline.yaml are relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    """Assert that tests leave no process group behind: a failing command would then end the test process."""
    yield
    torch = sys.modules.get("torch")
    assert torch is None or not torch.distributed.is_initialized(), (
        "this test set up torch.distributed; let `forked` run it"
    )


_seen_to_write: set[Any] = set()


@pytest.fixture(autouse=True)
def _embedded_models_prove_their_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the rollout engine once per embedded model, dtype and kind of adapter, not at every load."""
    selfcheck = sys.modules.get("stages.models.selfcheck")
    if selfcheck is None:
        return
    check = selfcheck.check_writing

    def once(subject: Any, model: Any) -> None:
        key = (subject.model.config.name_or_path, subject.weights[0].dtype, type(model), subject.side)
        if key not in _seen_to_write:
            check(subject, model)
        if key[0] in EMBEDDED:
            _seen_to_write.add(key)

    monkeypatch.setattr(selfcheck, "check_writing", once)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the embedded models."""
    from stages.models import pretrained

    return pretrained.load_tokenizer(str(ROOT / "examples/arithmetic/student"))


@pytest.fixture(scope="session")
def student_model() -> Any:
    """The embedded student, plain and in fp32. Tests must not modify it."""
    return _model("student")


@pytest.fixture(scope="session")
def teacher_model() -> Any:
    """The embedded teacher, plain and in fp32. Tests must not modify it."""
    return _model("teacher")


def _model(name: str) -> Any:
    import torch

    from stages.models import pretrained

    return pretrained.load_model(str(ROOT / "examples/arithmetic" / name), torch.float32, "sdpa")


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Function that returns the root of a cache of 16 rollouts with the given signal; written once."""
    from tests.support.helpers import make_run
    from tests.support.tiny_runs import TINY, student_of, write_rollouts

    made: dict[tuple[Any, ...], str] = {}

    def root(**values: Any) -> str:
        key = tuple(values.items())
        if key not in made:
            run = make_run(tmp_path_factory.mktemp("cache"), **(TINY | values))
            write_rollouts(run, student_of(run))
            made[key] = run.config.cache_root
        return made[key]

    return root


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Forker:
    """Clean processes that have already imported everything."""
    from tests.support.helpers import make_forker

    return make_forker(tmp_path_factory.mktemp("forked"))
