"""When a refresh is due and why, how much it writes, and several caches at once."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache
from stages.data.pool import Extra, Pool
from stages.loops import refresh, schedule
from stages.loops.drift import drift_of, row_sums
from stages.loops.feed import batch_rows, by_cache
from stages.loops.schedule import after_step, due
from stages.models import teacher
from stages.runtime import checkpoint, host_memory
from stages.runtime.checkpoint import Position, Refresh
from stages.runtime.config import Config, parse_arguments
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.split import rollouts_of
from tests.stages.loops.test_resume import assert_same_run, crash
from tests.support.helpers import (
    Forker,
    assert_same_weights,
    make_config,
    records_of,
    refused,
    small,
    weights_in,
)
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY, save_weights, train, train_from

# When a refresh is due


def config_of(**values: Any) -> Config:
    return make_config(Path("unused"), **(TINY | {"max_steps": 100, "refresh_every": 0} | values))


def at(step: int, refresh_step: int = 0, **values: Any) -> Position:
    """A position on the rows of refresh 1, which were written and taken up after `refresh_step` steps."""
    refreshes = {1: Refresh(refresh_step, "h" * 16, "")}
    return Position(step, 1, **({"refreshes": refreshes, "opened_at": refresh_step} | values))


def test_by_steps_a_refresh_is_due_every_so_many() -> None:
    config = config_of(refresh_every=10)
    assert [step for step in range(30, 61) if due(config, at(step, 30))] == list(range(40, 61))
    assert due(config, at(40, 30)).startswith("every: 10 steps")
    assert not due(config, Position(0, 0))


def test_nothing_is_due_after_the_last_step() -> None:
    config = config_of(refresh_every=10)
    assert due(config, at(99, 30))
    assert not due(config, at(100, 30))


def test_drift_is_due_when_its_mean_over_four_steps_crosses_the_bound() -> None:
    config = config_of(refresh_drift=0.1)
    assert not due(config, at(40, 30, recent=[0.2] * 3)), "the window is not full"
    assert not due(config, at(40, 30, recent=[0.05, 0.3, -0.1, 0.1]))
    assert due(config, at(40, 30, recent=[0.05, 0.2, 0.11, 0.12])) == (
        "drift: 0.12 nats a token, the bound is 0.1"
    )


def test_the_window_holds_the_last_four_steps_that_had_rows_of_this_run() -> None:
    position = at(40, 30)
    for step, own in enumerate([0.1, None, 0.2, 0.3, 0.4, 0.5], start=41):
        position = after_step(position, {"step": step, "own_drift": own})
    assert position == at(46, 30, recent=[0.2, 0.3, 0.4, 0.5])


def test_off_means_never() -> None:
    config = config_of(refresh_mode="off", refresh_every=10, refresh_drift=0.1)
    assert not due(config, at(90, 30, recent=[1.0] * 4))


def test_while_newer_rows_are_on_their_way_only_the_calendar_asks_for_more() -> None:
    config = config_of(refresh_mode="external", refresh_drift=0.1, refresh_every=10)
    waiting = at(45, 30, recent=[1.0] * 4)
    waiting = replace(waiting, refreshes=waiting.refreshes | {2: Refresh(40, "g" * 16, "drift")})
    assert not due(config, waiting)
    assert due(config, replace(waiting, step=50)).startswith("every")


def test_with_rows_from_elsewhere_those_that_are_too_old_are_due() -> None:
    config = config_of(refresh_mode="external", max_age=6)
    assert not due(config, at(36, 30))
    assert due(config, at(37, 30)) == "age: rows of step 30 at step 37"
    assert not due(config_of(refresh_every=40, max_age=6), at(37, 30)), (
        "this run's own refresh waits for its turn"
    )


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ({}, 100),
        ({"refresh_every": 10}, 40),
        ({"refresh_drift": 0.1}, 100),
        ({"refresh_mode": "external", "max_age": 6}, 37),
        ({"refresh_mode": "external", "max_age": 50, "refresh_every": 5}, 35),
        ({"refresh_mode": "off", "refresh_every": 10}, 100),
    ],
    ids=str,
)
def test_no_batch_is_prepared_past_the_step_at_which_its_rows_are_replaced(
    values: dict[str, Any], last: int
) -> None:
    assert schedule.last_step(config_of(**values), at(31, 30)) == last


# Drift


def test_drift_and_effective_share_are_the_loops_over_the_tokens() -> None:
    random = np.random.default_rng(0)
    lengths = [3, 1, 5]
    student, behaviour = (-random.exponential(1, 9) for _ in range(2))
    sums = row_sums(torch.from_numpy(student), torch.from_numpy(behaviour), lengths).numpy()
    found = drift_of(sums, lengths, [True, False, True])

    def share(weights: list[float]) -> float:
        return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))

    ratios = [math.exp(s - b) for s, b in zip(student, behaviour, strict=True)]
    rows = [ratios[:3], ratios[3:4], ratios[4:]]
    assert found.drift == pytest.approx(-sum(map(math.log, ratios)) / 9)
    assert found.ess == pytest.approx(share(ratios))
    assert found.ess_rows == pytest.approx(share([math.prod(row) for row in rows]))
    assert found.own == pytest.approx(-sum(map(math.log, rows[0] + rows[2])) / 8)
    assert drift_of(sums[:1], lengths[:1], [False]).own is None


def test_without_drift_every_sample_counts() -> None:
    logprobs = torch.full((4,), -2.0)
    found = drift_of(row_sums(logprobs, logprobs, [2, 2]).numpy(), [2, 2], [True, True])
    assert (found.drift, found.ess, found.ess_rows) == (0, 1, 1)


def test_a_token_that_the_student_rules_out_leaves_a_share_and_no_error() -> None:
    sums = row_sums(torch.tensor([-1e30, -1.0]), torch.tensor([-1.0, -1.0]), [1, 1]).numpy()
    found = drift_of(sums, [1, 1], [True, True])
    assert found.ess == found.ess_rows == pytest.approx(0.5)


def test_a_steps_drift_is_that_of_the_plain_logprobs(tmp_path: Path) -> None:
    """At step 1 the student is the one that wrote the rows; later it is not."""
    run = train(tmp_path, lora_dropout=0.0, refresh_every=0)
    steps = records_of(run.folder, "step")
    assert abs(steps[0]["drift"]) < 1e-5
    assert steps[0]["ess"] == pytest.approx(1, abs=1e-5)
    assert steps[-1]["drift"] > 1e-4
    assert steps[-1]["ess_rows"] < steps[-1]["ess"] < 1


DRIFT: dict[str, Any] = {"refresh_every": 0, "refresh_drift": 1e-3, "max_steps": 10}


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("drifted"), **DRIFT)


def test_a_drifting_student_refreshes_and_says_why(drifted: Run) -> None:
    refreshes, steps = records_of(drifted.folder, "refresh"), records_of(drifted.folder, "step")
    assert refreshes
    for record in refreshes:
        assert record["reason"].startswith("drift: ")
        window = [s["drift"] for s in steps if record["step"] - 4 < s["step"] <= record["step"]]
        assert sum(window) / 4 >= 1e-3
    assert len({s["refresh_index"] for s in steps}) == len(refreshes) + 1


@pytest.mark.parametrize(
    ("values", "reason", "at_steps"),
    leading(
        1,
        [
            ({"refresh_every": 2, "refresh_drift": 1e-9}, "every: 2 steps", [2, 4]),
            ({"refresh_every": 3}, "every: 3 steps", [3]),
            ({"refresh_drift": 1e-9}, "drift: ", [4]),
        ],
    ),
    ids=str,
)
def test_a_refresh_is_recorded_with_the_policy_that_asked_for_it(
    tmp_path: Path, values: dict[str, Any], reason: str, at_steps: list[int]
) -> None:
    run = train(tmp_path, **({"refresh_every": 0} | values))
    refreshes = records_of(run.folder, "refresh")
    assert [record["step"] for record in refreshes] == at_steps
    assert all(record["reason"].startswith(reason) for record in refreshes)


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["step 1", "step 3", "step 5", "between units"])
def test_a_run_that_crashed_refreshes_at_the_same_steps(tmp_path: Path, drifted: Run, place: str) -> None:
    crash(tmp_path, place, **DRIFT)
    run = train(tmp_path, **DRIFT)
    assert_same_run(run, drifted)
    found, expected = (
        [(r["step"], r["reason"]) for r in records_of(which.folder, "refresh")] for which in (run, drifted)
    )
    assert found == expected


@pytest.mark.thorough
def test_all_ranks_refresh_together_on_drift(tmp_path: Path, forked: Forker) -> None:
    arguments = small(tmp_path, **(TINY | DRIFT | {"grad_accum": 2}))
    forked.call(save_weights, tmp_path, arguments, processes=2).expect_success()
    assert_same_weights(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)))
    assert records_of(tmp_path / "demo", "refresh")[0]["reason"].startswith("drift: ")


# What is written


def test_refreshes_write_whole_groups_one_after_the_other() -> None:
    config = config_of(rollouts_per_refresh=40, group_size=4, refresh_every=10)
    assert [rollouts_of(config, i) for i in range(3)] == [range(40), range(40, 80), range(80, 120)]


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({"max_steps": 3, "refresh_every": 32}, [24]),
        ({"max_steps": 3, "refresh_every": 32, "group_size": 5, "rollouts_per_refresh": 100}, [25]),
        ({"max_steps": 7, "refresh_every": 3}, [24, 24, 8]),
        ({"max_steps": 7, "refresh_mode": "off"}, [56]),
        ({"max_steps": 7, "refresh_every": 0, "refresh_drift": 0.1}, [56, 24]),
        ({"max_steps": 7, "refresh_every": 3, "refresh_drift": 0.1}, [24, 24, 8]),
        ({"max_steps": 12, "refresh_every": 6, "refresh_drift": 0.1}, [48, 48, 32]),
        ({"max_steps": 9, "refresh_mode": "external", "refresh_every": 2, "max_age": 3}, [32, 32]),
    ],
    ids=str,
)
def test_no_more_is_written_than_the_steps_until_the_next_rows_can_read(
    values: dict[str, Any], sizes: list[int]
) -> None:
    config = config_of(**({"batch_size": 8, "rollouts_per_refresh": 1000} | values))
    places = [rollouts_of(config, index) for index in range(len(sizes))]
    assert [len(place) for place in places] == sizes
    assert all(place.start == before.stop for before, place in pairwise(places))


def test_fewer_rollouts_than_the_steps_read_stay_as_they_are() -> None:
    demo = config_of(max_steps=96, batch_size=64, refresh_every=16, rollouts_per_refresh=512)
    assert [rollouts_of(demo, index) for index in range(6)] == [
        range(512 * i, 512 * (i + 1)) for i in range(6)
    ]
    default = parse_arguments([], "")
    assert {len(rollouts_of(default, index)) for index in range(8)} == {8192}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (
            {"refresh_drift": 0.1, "sample_top_p": 0.9},
            "refresh_drift compares the student with the distribution",
        ),
        (
            {"refresh_drift": 0.5, "sample_temperature": 0.7},
            "set sample_temperature to the loss's temperature (1.0)",
        ),
        ({"refresh_mode": "sometimes"}, "refresh_mode"),
        ({"refresh_drift": -1}, "refresh_drift"),
        ({"extra_caches": "{runs/x: -1}"}, "extra_caches"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_a_sentence(
    tmp_path: Path, values: dict[str, Any], part: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_config(tmp_path, **values)
    assert part in str(caught.value)


# Several caches at once


def mixed(num_own: int, *others: tuple[int, float]) -> Pool:
    def rows(count: int) -> list[str]:
        return [f"{i:032x}" for i in range(count)]

    def pool(count: int) -> Pool:
        return Pool(rows(count), 0, dict.fromkeys(rows(count), -1), dict.fromkeys(rows(count), (1, 1)))

    found = pool(num_own)
    for count, weight in others:
        found = found.with_extra(pool(count), None, weight)
    return found


def test_batches_hold_each_caches_share_to_a_row_or_two() -> None:
    pool = mixed(50, (20, 0.5), (7, 0.1))
    drawn: list[str] = []
    for index in range(40):
        drawn += batch_rows(pool, 3, index, 16)
        counts = [len(group) for group in by_cache(drawn)]
        assert all(abs(n - len(drawn) * w / 1.6) <= 2 for n, w in zip(counts, (1, 0.5, 0.1), strict=False)), (
            counts
        )
    second = [key for key in drawn if key.startswith("0:")]
    assert sorted(second[:20]) == sorted(second[20:40]) == sorted(pool.extras[0].keys)


def test_rows_of_one_id_in_two_caches_are_apart() -> None:
    pool = mixed(3, (3, 1.0))
    assert set(batch_rows(pool, 0, 0, 12)) == {*pool.row_ids, *(f"0:{row_id}" for row_id in pool.row_ids)}
    groups = by_cache(["0:a", "b", "1:a", "0:c", "a"])
    assert groups == [["b", "a"], ["0:a", "0:c"], ["1:a"]]
    assert isinstance(pool.extras[0], Extra)


@pytest.mark.thorough
def test_a_cache_of_weight_0_changes_nothing(tmp_path: Path, caches: Callable[..., str]) -> None:
    values = {"batch_size": 16, "refresh_mode": "off"}
    alone = train_from(tmp_path / "alone", caches(), **values)
    extra = {"extra_caches": f"{{{caches(signal='hidden')}: 0}}"}
    beside = train_from(tmp_path / "beside", caches(), **values, **extra)
    assert_same_weights(weights_in(beside.folder / "student"), weights_in(alone.folder / "student"))


@pytest.mark.thorough
def test_caches_of_different_teachers_train_together(tmp_path: Path, caches: Callable[..., str]) -> None:
    """The other teacher is the student itself: its rows, seen alone, would leave the student where it is."""
    other = caches(signal="hidden", teacher_model="examples/arithmetic/student")
    values = {"batch_size": 16, "refresh_mode": "off", "max_steps": 8, "extra_caches": f"{{{other}: 1}}"}
    run = train_from(tmp_path, caches(), **values)
    steps = records_of(run.folder, "step")
    alone = records_of(
        train_from(tmp_path / "alone", caches(), **(values | {"extra_caches": "{}"})).folder, "step"
    )
    assert steps[0]["rkl"] == pytest.approx(0.5 * alone[0]["rkl"], rel=0.5)
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]


@pytest.mark.thorough
def test_a_mixture_resumes_bit_by_bit_and_keeps_its_rows_over_a_refresh(
    tmp_path: Path, caches: Callable[..., str]
) -> None:
    values = {"extra_caches": f"{{{caches(signal='hidden')}: 0.5}}"}
    expected = train(tmp_path / "whole", **values)
    assert len(records_of(expected.folder, "refresh")) == 1
    for place in ("step 1", "step 5"):
        crash(tmp_path / place, place, **values)
        assert_same_run(train(tmp_path / place, **values), expected)


@pytest.mark.thorough
def test_a_run_with_groups_resumes_bit_by_bit(tmp_path: Path) -> None:
    """Groups of four in batches of eight and of six, which cut them."""
    for batch_size in (8, 6):
        values = {"group_size": 4, "batch_size": batch_size, "max_age": 100}
        expected = train(tmp_path / f"whole-{batch_size}", **values)
        for place in ("step 1", "step 5"):
            folder = tmp_path / f"{place}-{batch_size}"
            crash(folder, place, **values)
            assert_same_run(train(folder, **values), expected)


@pytest.mark.thorough
def test_two_processes_train_a_mixture_as_one_does(
    tmp_path: Path, forked: Forker, caches: Callable[..., str]
) -> None:
    values = {"max_steps": 2, "refresh_every": 0, "extra_caches": f"{{{caches(signal='hidden')}: 0.3}}"}
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        forked.call(
            save_weights, folder, small(folder, **(TINY | values)), processes=processes
        ).expect_success()
        found[processes] = [torch.load(folder / f"{rank}.pt") for rank in range(processes)]
    assert_same_weights(*found[2])
    difference = sum(float((found[1][0][n] - t).double().square().sum()) for n, t in found[2][0].items())
    assert math.sqrt(difference / sum(float(t.double().square().sum()) for t in found[1][0].values())) < 1e-4


def test_caches_that_cannot_be_mixed_are_a_sentence(
    tmp_path: Path, forked: Forker, caches: Callable[..., str]
) -> None:
    root = caches()
    fingerprint = cache.open(root).fingerprint
    other = tmp_path / "other"
    changed = cache.Fingerprint(fingerprint.must_match | {"vocab_size": 17}, {})
    cache.Writer(other, changed).__exit__(None, None, None)
    values = TINY | {"cache_dir": root, "refresh_mode": "off"}
    refused(forked, "train", tmp_path, "vocab_size of", "is 17", **values, extra_caches=f"{{{other}: 1}}")
    refused(
        forked, "train", tmp_path, "no teacher cache at", **values, extra_caches=f"{{{tmp_path / 'none'}: 1}}"
    )
    empty = tmp_path / "empty"
    cache.Writer(empty, fingerprint).__exit__(None, None, None)
    refused(
        forked, "train", tmp_path, str(empty), "holds no rollouts", **values, extra_caches=f"{{{empty}: 1}}"
    )


def test_a_refresh_is_told_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, str]] = []
    inner = refresh.refresh

    def noted(*arguments: Any) -> None:
        told.append(arguments[-2:])
        inner(*arguments)

    monkeypatch.setattr(refresh, "refresh", noted)
    run = train(tmp_path)
    assert told == [(1, records_of(run.folder, "refresh")[0]["reason"])]


def test_a_refreshs_checkpoint_is_on_disk_before_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, commit, newest = checkpoint._write_files, cache.Writer.commit, dict[str, Path | None]()

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)
        write(*arguments)

    def noted(self: cache.Writer, unit: str) -> cache.CommitResult:
        newest.setdefault(unit.split("-")[2], checkpoint.latest(tmp_path / "demo" / "checkpoints"))
        return commit(self, unit)

    monkeypatch.setattr(checkpoint, "_write_files", slow)
    monkeypatch.setattr(cache.Writer, "commit", noted)
    train(tmp_path)
    assert [path and path.name for path in newest.values()] == [None, "step-000003"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "_write_files", full)
    with pytest.raises(UserError, match=r"step-000002 could not be written \(No space left on device\)"):
        train(tmp_path)
    assert list((tmp_path / "demo" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("is_short", [False, True])
def test_the_teacher_is_read_once_unless_host_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_short: bool
) -> None:
    load, loaded = teacher.load_teacher, list[Any]()

    def noted(*arguments: Any) -> Any:
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(teacher, "load_teacher", noted)
    if is_short:
        monkeypatch.setattr(host_memory, "free_bytes", lambda: 0)
    run = train(tmp_path, refresh_every=2)
    assert [record["step"] for record in records_of(run.folder, "refresh")] == [2, 4]
    assert len(loaded) == (3 if is_short else 2)  # the first one is that of stage one
    assert all(one.forward is None for one in loaded)
