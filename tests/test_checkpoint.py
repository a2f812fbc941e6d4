"""Checkpoints: what they refuse, what a full disk or damage does to them."""

import errno
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import train as stage_two
from stages.loops import setup
from stages.runtime import checkpoint
from stages.runtime.errors import UserError
from tests.helpers import make_run
from tests.tiny_runs import TINY, student_of, train_from


@pytest.mark.parametrize("change", [{"lora_r": 8}, {"use_lora": "false"}, {"lora_targets": "q_proj,v_proj"}], ids=str)
def test_a_checkpoint_of_another_student_is_refused(
    tmp_path: Path, caches: Callable[..., str], change: dict[str, Any]
) -> None:
    train_from(tmp_path, caches(), max_steps=1, refresh_every=0)
    with pytest.raises(UserError, match=r"checkpoint .*step-000001.*Use another run_name, or the old keys"):
        train_from(tmp_path, caches(), max_steps=2, refresh_every=0, **change)


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(
    tmp_path: Path, caches: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_from(tmp_path, caches(), max_steps=2, refresh_every=0)
    save = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        save({name: tensor[:1] for name, tensor in tensors.items()}, path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-000003 could not be written .*No space left.* earlier ones are kept"):
        train_from(tmp_path, caches(), max_steps=3, refresh_every=0)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-000002"]
    monkeypatch.undo()
    train_from(tmp_path, caches(), max_steps=3, refresh_every=0)


@pytest.mark.parametrize("largest_file", [300_000, 2_000_000], ids=["weights", "optimizer"])
def test_a_disk_that_is_really_full_at_a_checkpoint_is_a_sentence(
    tmp_path: Path, caches: Callable[..., str], largest_file: int
) -> None:
    """The libraries that write have error classes of their own: a limit on file sizes makes them fail in earnest."""
    run = train_from(tmp_path, caches(), max_steps=2, refresh_every=0)
    sizes = {path.name: path.stat().st_size for path in (run.folder / "checkpoints/step-000002").iterdir()}
    assert sizes["student.safetensors"] > 300_000
    assert sizes["student.safetensors"] < 2_000_000 < sizes["optimizer.pt"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    training = make_run(tmp_path, **(TINY | {"cache_dir": caches(), "max_steps": 3, "refresh_every": 0}))
    student = student_of(training)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step-000003 could not be written .* earlier ones are kept"):
            stage_two.train(training, student, setup.cached_vocabulary(training.config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["step-000002"]
