"""Checkpoints: what they refuse, what a full disk or damage does to them, and which student is the best."""

import errno
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stages import train as stage_two
from stages.loops import setup, steps
from stages.runtime import checkpoint, distributed, files, host_memory
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, environment, make_run, records_of
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY, step_run, student_of, train_from


@pytest.mark.parametrize(
    "change", leading(1, [{"lora_r": 8}, {"use_lora": "false"}, {"lora_targets": "q_proj,v_proj"}]), ids=str
)
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
    with pytest.raises(
        UserError, match=r"step-000003 could not be written .*No space left.* earlier ones are kept"
    ):
        train_from(tmp_path, caches(), max_steps=3, refresh_every=0)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-000002"]
    monkeypatch.undo()
    train_from(tmp_path, caches(), max_steps=3, refresh_every=0)


@pytest.mark.parametrize("largest_file", [300_000, 2_000_000], ids=["weights", "optimizer"])
def test_a_disk_that_is_really_full_at_a_checkpoint_is_a_sentence(
    tmp_path: Path, caches: Callable[..., str], largest_file: int
) -> None:
    """The libraries that write have error classes of their own: a limit on file sizes makes them fail in
    earnest.
    """
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


# The best student


def test_only_figures_of_one_text_are_compared_for_the_best(
    tmp_path: Path, caches: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second text's first figure is kept though a higher one; from then on only its own figures count."""

    def says(text: str, reverse_kl: float) -> steps.Evaluate:
        return lambda _: {"measured_on": text, "reverse_kl": reverse_kl}

    run = step_run(tmp_path, caches())
    training = steps.prepare(run, student_of(run))
    figures = [("a", 0.5), ("a", 0.6), ("b", 0.7), ("b", 0.8), ("b", 0.6)]
    for training.step, (text, reverse_kl) in enumerate(figures, 1):
        steps.evaluate_now(run, training, says(text, reverse_kl))
    assert [record["is_best"] for record in records_of(run.folder, "eval")] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert checkpoint.best(run.folder / "checkpoints") == checkpoint.Best(5, 0.6, "b")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert "of step 1, was measured on other held-out text" in said
    assert said.endswith("the search for the best restarts at step 3")


def test_best_weights_from_before_there_was_a_measure_are_sought_anew(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    run = step_run(tmp_path, caches())
    training, folder = steps.prepare(run, student_of(run)), run.folder / "checkpoints"
    checkpoint.save_best(folder, training.student.trainable, checkpoint.Best(3, 0.1, "a text"))
    with safe_open(folder / checkpoint.BEST, "pt") as file:
        old = {key: value for key, value in file.metadata().items() if key != "measured_on"}
    save_file(load_file(folder / checkpoint.BEST), folder / checkpoint.BEST, metadata=old)
    assert checkpoint.best(folder) == checkpoint.Best(3, 0.1, "")
    steps.evaluate_now(run, training, lambda _: {"reverse_kl": 0.2, "measured_on": "a text"})
    assert checkpoint.best(folder) == checkpoint.Best(0, 0.2, "a text")


@pytest.mark.parametrize(
    ("change", "is_same"),
    leading(
        2,
        [
            ({"lr": 1e-5, "seed": 0}, True),
            ({"eval_prompts": 6}, False),
            ({}, True),
            ({"dtype": "bf16"}, False),
        ],
    ),
    ids=str,
)
def test_a_resumed_run_compares_with_its_best_only_on_the_same_text(
    tmp_path: Path,
    caches: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    is_same: bool,
) -> None:
    values: dict[str, Any] = {"eval_every": 1, "eval_prompts": 4, "refresh_every": 0}
    train_from(tmp_path, caches(), max_steps=1, **values)
    capsys.readouterr()
    run = train_from(tmp_path, caches(), max_steps=2, **(values | change))
    first, second = (record["measured_on"] for record in records_of(run.folder, "eval"))
    assert (first == second) == is_same
    assert ("restarts at step 2" in capsys.readouterr().out) != is_same


def test_memory_is_asked_for_again_when_the_optimizer_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam has no moments at step 0: the copies of that checkpoint are smaller than the next one needs."""
    weight = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.AdamW([weight])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    saver, world = checkpoint.Saver(), distributed.start("cpu")

    def begin(step: int) -> None:
        position = checkpoint.Position(step, 0)
        saver.begin(tmp_path, position, {"weight": weight}, optimizer, scheduler, world, keep=5)

    begin(0)
    weight.sum().backward()
    optimizer.step()
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 1000)
    monkeypatch.setattr(checkpoint, "_on_host", lambda *_: pytest.fail("copied without memory for it"))
    begin(1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000000", "step-000001"]


def saver_of(folder: Path) -> tuple[checkpoint.Saver, Callable[[int], Path]]:
    """A saver, and a function that begins the checkpoint of a step; the newest two are kept."""
    weight = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.AdamW([weight])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    saver, world = checkpoint.Saver(), distributed.start("cpu")

    def begin(step: int) -> Path:
        position = checkpoint.Position(step, 0)
        return saver.begin(folder, position, {"weight": weight}, optimizer, scheduler, world, keep=2)

    return saver, begin


@dataclass(frozen=True)
class OtherRank:
    """The world of rank 1, where rank 0 sends these values."""

    values: tuple[Any, ...]
    is_main: bool = False

    def gather(self, _: Any) -> list[Any]:
        return list(self.values)


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), OSError(5, "bad disk"), ValueError("a bug")], ids=str
)
def test_every_error_of_the_thread_reaches_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_write", fail)
    saver, begin = saver_of(tmp_path)
    begin(1)
    with pytest.raises(type(error), match=str(error.args[-1])):
        saver.settle(distributed.start("cpu"))
    saver.settle(distributed.start("cpu"))  # it is raised once
    other: Any = OtherRank((str(error),))
    peer = checkpoint.Saver()
    peer._is_pending = True
    with pytest.raises(UserError, match=str(error.args[-1])):
        peer.settle(other)


def test_an_old_checkpoint_that_cannot_be_removed_costs_no_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def busy(path: Path) -> None:
        if path.exists():
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    saver, begin = saver_of(tmp_path)
    begin(1), begin(2)
    saver.settle(distributed.start("cpu"))
    monkeypatch.setattr(files, "remove", busy)
    begin(3)
    saver.settle(distributed.start("cpu"))
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000002", "step-000003"]
    assert "step-000001 could not be removed" in capfd.readouterr().err
    monkeypatch.undo()
    begin(4)
    saver.settle(distributed.start("cpu"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_a_checkpoint_whose_removal_is_interrupted_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, begin = saver_of(tmp_path)
    begin(1), begin(2)
    saver.settle(distributed.start("cpu"))

    def killed(path: Path) -> None:
        if path.exists():
            (path / "student.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.discard_after(tmp_path, 1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000001"]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    saver, begin = saver_of(tmp_path)
    for name in (".partial-step-000007", ".old-step-000003"):
        (tmp_path / name).mkdir()
    (tmp_path / ".partial-step-000008").write_text("")
    begin(1)
    saver.settle(distributed.start("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_checkpoint_that_was_begun_is_written_though_the_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), checkpoint._write

    def slow(*arguments: Any) -> None:
        assert may_write.wait(20)
        write(*arguments)

    saver, begin = saver_of(tmp_path)
    monkeypatch.setattr(checkpoint, "_write", slow)
    with suppress(ZeroDivisionError), saver.finishing():
        begin(1)
        threading.Timer(0.2, may_write.set).start()
        raise ZeroDivisionError
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000001"]
    assert saver._host is None


def test_a_run_that_fails_also_tells_of_its_unwritten_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver, begin = saver_of(tmp_path)
    monkeypatch.setattr(checkpoint, "_write_files", full)
    with suppress(ZeroDivisionError), saver.finishing():
        begin(1)
        raise ZeroDivisionError
    assert "step-000001 could not be written" in capfd.readouterr().err


SLOW_SAVER = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
from stages.runtime import checkpoint, distributed, ending
ending.install()
from tests.stages.runtime.test_checkpoint import saver_of
saver, begin = saver_of(Path(sys.argv[1]))
write = checkpoint._write
checkpoint._write = lambda *arguments: (time.sleep(float(sys.argv[2])), write(*arguments))
at_once = ending.at_once if sys.argv[3] == "refresh" else nullcontext
with ending.finishing(), saver.finishing(), at_once():
    begin(1)
    print("ready", flush=True)
    saver.settle(distributed.start("cpu"))
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("during", "seconds", "signals"), [("refresh", 2, 1), ("refresh", 60, 2), ("training", 60, 2)]
)
def test_a_signal_waits_for_the_checkpoint_that_was_begun_and_a_second_one_does_not(
    tmp_path: Path, during: str, seconds: int, signals: int
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SLOW_SAVER, str(tmp_path), str(seconds), during]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 143
    assert ("writing the checkpoint that was begun" in told) == (during == "refresh")
    assert len(checkpoint.complete(tmp_path)) == (signals == 1)
