"""Rollouts from elsewhere: stage two publishes versions, a follower writes, and the training is that of
inline refreshes.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cache
from stages import train as stage_two
from stages.loops import elsewhere, follow, refresh, setup, versions
from stages.loops.elsewhere import wait_for
from stages.models.student import policy_hash
from stages.models.teacher import TeacherLoader
from stages.runtime.checkpoint import Position, Refresh
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from tests.stages.loops.test_resume import Stop, assert_same_run
from tests.support.helpers import Forker, assert_same_weights, make_run, records_of, small, weights_in
from tests.support.thinning import leading
from tests.support.tiny_runs import (
    TINY,
    policy_of,
    save_weights,
    student_of,
    train,
    train_from,
    write_rollouts,
)

# Waiting


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes time."""
    made: list[float] = []
    monkeypatch.setattr(elsewhere, "time", clock(made.append))
    return made


def test_what_is_there_is_returned_without_a_pause(pauses: list[float]) -> None:
    told: list[str] = []
    assert wait_for(lambda: 7, on_wait=lambda: told.append("waiting")) == 7
    assert (pauses, told) == ([], [])


def test_falsy_answers_end_the_wait_too(pauses: list[float]) -> None:
    assert wait_for(lambda: 0) == 0
    assert pauses == []


def test_waiting_is_told_once(pauses: list[float]) -> None:
    answers, told = iter([None, None, None, "rows"]), list[str]()
    assert wait_for(lambda: next(answers), on_wait=lambda: told.append("waiting")) == "rows"
    assert (pauses, told) == ([elsewhere.POLL_SECONDS] * 3, ["waiting"])


def test_patience_runs_out(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    times = iter([0.0, 1.0, 2.0, 3.5])
    monkeypatch.setattr(elsewhere.time, "monotonic", lambda: next(times))
    assert wait_for(lambda: None, patience=3.0) is None
    assert len(pauses) == 2


# Rollouts from elsewhere


EXTERNAL: dict[str, Any] = TINY | {"refresh_mode": "external", "max_age": 2, "lora_dropout": 0.1}


def train_beside_a_follower(
    forked: Forker, folder: Path, *, kills: int = 0, processes: int = 1, **values: Any
) -> Path:
    """Stage two and its follower in processes of their own, each killed `kills` times; returns the run's
    folder.
    """
    flags = small(folder, **(EXTERNAL | values))
    commands = {
        "stages.train": (flags, processes),
        "stages.rollout": (["--follow", str(folder / "demo"), *flags], 1),
    }
    running = {m: forked.start(m, *arguments, processes=n) for m, (arguments, n) in commands.items()}
    for turn in range(2 * kills):
        module = list(commands)[turn % 2]
        time.sleep(2.5)
        for worker in running[module]:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        arguments, count = commands[module]
        running[module] = forked.start(module, *arguments, processes=count)
    for workers in running.values():
        for worker in workers:
            worker.join(200)
            assert worker.exitcode == 0
    return folder / "demo"


@pytest.fixture(scope="module")
def inline(forked: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that refreshed its own rows, in a process of its own."""
    folder = tmp_path_factory.mktemp("inline")
    forked.call(save_weights, folder, small(folder, **(TINY | {"lora_dropout": 0.1}))).expect_success()
    return folder / "demo"


def test_rollouts_from_elsewhere_in_lock_step_are_the_training_with_inline_refreshes(
    tmp_path: Path, forked: Forker, inline: Path
) -> None:
    run = train_beside_a_follower(forked, tmp_path)
    assert_same_weights(weights_in(run / "student"), weights_in(inline / "student"))
    found, expected = (cache.open(folder / "cache") for folder in (run, inline))
    assert found.to_table().equals(expected.to_table())
    records = records_of(run, "refresh")
    assert [(r["step"], r["refresh_index"], r["reason"][:6]) for r in records] == [(3, 1, "every:")]


@pytest.mark.thorough
def test_both_sides_may_be_killed_and_started_again(tmp_path: Path, forked: Forker, inline: Path) -> None:
    run = train_beside_a_follower(forked, tmp_path, kills=2)
    assert_same_weights(weights_in(run / "student"), weights_in(inline / "student"))
    assert cache.open(run / "cache").verify() == []


def clock(sleep: Callable[[float], None]) -> SimpleNamespace:
    """The module's own `time`, with another `sleep`; libraries keep theirs."""
    return SimpleNamespace(sleep=sleep, monotonic=time.monotonic)


def test_training_goes_on_over_rows_within_the_bound(tmp_path: Path, forked: Forker) -> None:
    values = {"max_steps": 9, "max_age": 6, "refresh_every": 2}
    run = train_beside_a_follower(forked, tmp_path, **values)
    steps = records_of(run, "step")
    assert [step["step"] for step in steps] == list(range(1, 10))
    written_at = {0: 0} | {r["refresh_index"]: r["policy_step"] for r in records_of(run, "refresh")}
    assert all(step["step"] - 1 - written_at[step["refresh_index"]] <= 6 for step in steps)
    assert written_at.keys() <= set(range(5))


def test_training_waits_at_the_bound_while_newer_rows_are_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of steps 2, 4 and 6 have been published, and the rows of none arrive."""

    def stop(_: float) -> None:
        raise Stop

    monkeypatch.setattr(elsewhere.Arrivals, "newest", lambda _, position: position.refresh_index)
    monkeypatch.setattr(elsewhere, "time", clock(stop))
    with pytest.raises(Stop):
        train(tmp_path, **(EXTERNAL | {"max_steps": 9, "max_age": 6, "refresh_every": 2}))
    assert [step["staleness"] for step in records_of(tmp_path / "demo", "step")] == [0, 1, 2, 3, 4, 5, 6]


def test_training_waits_for_the_first_rows_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of what stage one writes is there; no version was published, since the student at the start is
    known.
    """
    newest = elsewhere.Arrivals.newest
    waits: list[float] = []
    monkeypatch.setattr(elsewhere.Arrivals, "newest", lambda *a: newest(*a) if len(waits) > 1 else -1)
    monkeypatch.setattr(elsewhere, "time", clock(waits.append))
    run = train(tmp_path, **(EXTERNAL | {"max_steps": 2, "max_age": 6}))
    assert "waiting for rollouts of refresh 0 (step 0)" in capsys.readouterr().out
    assert len(waits) == 2
    assert [step["step"] for step in records_of(run.folder, "step")] == [1, 2]


def train_with_a_slow_follower(folder: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Run:
    """Both sides in this process; the follower is the slowest there can be: it writes only while training
    waits.
    """
    run = make_run(folder, **(EXTERNAL | values))
    student, writer = student_of(run), student_of(run)
    write_rollouts(run, student)
    vocabulary = setup.shared_vocabulary(run.config)
    prompts = refresh.prompts_of(run, vocabulary)

    def write(_: float) -> None:
        version = versions.newest(run.folder)
        assert version is not None, "training waits for a version that was never published"
        versions.load(run.folder, writer, version)
        with TeacherLoader(run.config, run.world) as teacher:
            refresh.write_rollouts(
                run,
                policy_of(run, writer, version.step),
                vocabulary,
                prompts,
                refresh_index=version.refresh_index,
                teacher=teacher,
            )

    monkeypatch.setattr(elsewhere, "time", SimpleNamespace(sleep=write, monotonic=time.monotonic))
    stage_two.train(run, student, vocabulary)
    return run


@pytest.mark.parametrize(
    ("values", "taken_up"),
    leading(
        1,
        [
            ({"refresh_every": 0}, [(3, 1, 3), (6, 2, 6), (9, 3, 9)]),
            ({"refresh_every": 2}, [(3, 1, 2), (5, 2, 4), (7, 3, 6), (9, 4, 8)]),
        ],
    ),
    ids=str,
)
def test_training_waits_at_the_bound_however_slow_the_follower(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, Any],
    taken_up: list[tuple[int, int, int]],
) -> None:
    run = train_with_a_slow_follower(
        tmp_path, monkeypatch, **({"max_steps": 10, "checkpoint_every": 3} | values)
    )
    assert max(record["staleness"] for record in records_of(run.folder, "step")) == 2
    records = records_of(run.folder, "refresh")
    assert [(r["step"], r["refresh_index"], r["policy_step"]) for r in records] == taken_up


@pytest.mark.thorough
def test_in_lock_step_all_that_a_refresh_carries_over_is_that_of_inline_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adaptive threshold among them, over three refreshes."""
    values: dict[str, Any] = {
        "refresh_every": 2,
        "max_age": 1,
        "rollouts_per_unit": 4,
        "max_steps": 7,
        "tau_share": 0.7,
        "lora_dropout": 0.1,
    }
    expected = train(tmp_path / "inline", **values)
    run = train_with_a_slow_follower(tmp_path / "external", monkeypatch, **values)
    assert_same_run(run, expected)
    kinds = [
        [(r["step"], r["tau"], r["drift"]) for r in records_of(one.folder, "step")] for one in (run, expected)
    ]
    assert kinds[0] == kinds[1]
    assert [r["step"] for r in records_of(run.folder, "refresh")] == [2, 4, 6]


@pytest.mark.thorough
def test_two_processes_take_up_the_same_rows_together(tmp_path: Path, forked: Forker) -> None:
    run = train_beside_a_follower(forked, tmp_path, processes=2)
    assert [record["step"] for record in records_of(run, "refresh")] == [3]


def test_off_is_the_training_on_the_rows_that_are_there(tmp_path: Path) -> None:
    expected = train(tmp_path / "inline", max_steps=3)
    root = expected.config.cache_root
    found = train_from(tmp_path / "off", root, max_steps=3, refresh_mode="off", lora_dropout=0.1)
    assert_same_weights(weights_in(found.folder / "student"), weights_in(expected.folder / "student"))
    assert records_of(found.folder, "refresh") == []


@pytest.mark.parametrize("use_lora", ["true", "false"])
def test_a_published_version_is_read_back_bit_by_bit(tmp_path: Path, use_lora: str) -> None:
    run = make_run(tmp_path, **(TINY | {"use_lora": use_lora}))
    student = student_of(run)
    with torch.no_grad():
        for parameter in student.trainable.values():
            parameter.add_(0.01)
    version = versions.Version(3, 30, policy_hash(student), 16)
    versions.publish(run, student, version)
    assert versions.newest(run.folder) == version
    other = student_of(run)
    versions.load(run.folder, other, version)
    assert policy_hash(other) == version.policy_hash
    assert_same_weights(
        {n: p.detach() for n, p in other.trainable.items()},
        {n: p.detach() for n, p in student.trainable.items()},
    )
    with pytest.raises(
        UserError, match=r"000003-.* holds a student of policy .*, its version.json says 0000"
    ):
        versions.load(run.folder, other, _renamed(run.folder, version))


def _renamed(folder: Path, version: versions.Version) -> versions.Version:
    other = replace(version, policy_hash=version.policy_hash[:8] + "0" * 8)
    assert other.name == version.name
    return replace(other, policy_hash=_zeros(folder, other))


def _zeros(folder: Path, version: versions.Version) -> str:
    """Gives the version's folder the name of a policy of zeros."""
    (folder / "versions" / version.name).rename(folder / "versions" / f"{version.refresh_index:06d}-00000000")
    return "0" * 16


def test_old_versions_are_removed_and_the_newest_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    for index in range(1, 6):
        versions.publish(run, student, versions.Version(index, index, policy_hash(student), 16))
    names = sorted(path.name[:6] for path in (run.folder / "versions").iterdir() if path.is_dir())
    assert names == ["000003", "000004", "000005"]


def test_a_version_of_a_trajectory_that_was_given_up_is_not_waited_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    awaited = versions.Version(1, 3, policy_hash(student), 16)
    versions.publish(run, student, awaited)
    versions.replace_text(
        run.folder / "versions" / "newest.json", json.dumps(replace(awaited, policy_hash="f" * 16).__dict__)
    )
    position = Position(3, 0, refreshes={1: Refresh(3, awaited.policy_hash, "every")})
    versions.point_to(run.folder, position)
    assert versions.newest(run.folder) == awaited
    with pytest.raises(
        UserError, match=r"000001-eeeeeeee, which is gone; delete the newest folder in .*checkpoints"
    ):
        versions.point_to(run.folder, replace(position, refreshes={1: Refresh(3, "e" * 16, "every")}))


def test_following_wrong_things_is_a_sentence(tmp_path: Path, forked: Forker) -> None:
    train_flags = small(tmp_path, **TINY)
    forked.stage("stages.rollout", "--follow").expect_sentence("--follow needs the folder")
    forked.stage("stages.rollout", "--follow", str(tmp_path / "none")).expect_sentence(
        "no run to follow", "--config"
    )
    forked.stage("stages.rollout", "--follow", str(tmp_path / "demo"), *train_flags).expect_sentence(
        "refresh_mode inline", "set refresh_mode: external"
    )


def test_a_follower_generates_and_scores_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"role generate is for `dualkl rollout` without --follow"):
        follow.follow(make_run(tmp_path, **(EXTERNAL | {"role": "generate"})))


def test_a_follower_that_would_write_other_rows_is_a_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path, **EXTERNAL)
    student = student_of(run)
    versions.publish(run, student, versions.Version(1, 3, policy_hash(student), 999))
    with pytest.raises(
        UserError, match=r"wants 999 rollouts of version 000001-.*, this command would write 16"
    ):
        follow.follow(run)
