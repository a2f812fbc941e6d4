"""Generation and scoring as processes of their own: together they write the rows of role both, whatever stops
them.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import cache
from stages import train as stage_two
from stages.loops import elsewhere, refresh, setup
from stages.loops.writing import UnitWriter
from stages.models.teacher import TeacherLoader
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from tests.kill_campaign import assert_same_rows
from tests.support.helpers import Forker, make_run, prompts_of, records_of, small
from tests.support.thinning import leading
from tests.support.tiny_runs import policy_of, student_of

VALUES: dict[str, Any] = {
    "teacher_ds_zero3": "false",
    "rollouts_per_refresh": 24,
    "rollouts_per_unit": 8,
    "max_new_tokens": 16,
}
NUM_UNITS = 3


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; those that are started have an hour."""
    monkeypatch.setattr(elsewhere, "PATIENCE", 0.12)


class Stop(Exception):
    """Stands for a crash."""


def role(folder: Path, name: str, **values: Any) -> Run:
    return make_run(folder, **(VALUES | {"role": name} | values))


def generate(folder: Path, index: int = 0, **values: Any) -> int:
    run = role(folder, "generate", **values)
    vocabulary = setup.shared_vocabulary(run.config)
    policy = policy_of(run, student_of(run))
    return refresh.write_rollouts(
        run, policy, vocabulary, prompts_of(run.config), refresh_index=index, teacher=None
    )


def score(folder: Path, index: int = 0, **values: Any) -> int:
    run = role(folder, "score", **values)
    with TeacherLoader(run.config, run.world) as teacher:
        return refresh.score_rollouts(
            run, setup.shared_vocabulary(run.config), refresh_index=index, teacher=teacher
        )


def both(folder: Path, **values: Any) -> Path:
    run = role(folder, "both", **values)
    with TeacherLoader(run.config, run.world) as teacher:
        refresh.write_rollouts(
            run,
            policy_of(run, student_of(run)),
            setup.shared_vocabulary(run.config),
            prompts_of(run.config),
            refresh_index=0,
            teacher=teacher,
        )
    return cache_of(folder)


def cache_of(folder: Path) -> Path:
    return folder / "demo" / "cache"


def unscored_of(folder: Path) -> Path:
    return folder / "demo" / "cache-unscored"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of role both."""
    return both(tmp_path_factory.mktemp("both"))


def units_of(root: Path) -> dict[str, list[str]]:
    return {record.unit: record.row_ids for record in cache.open(root).commit_records()}


def test_first_one_then_the_other_writes_what_both_write(tmp_path: Path, expected: Path) -> None:
    assert generate(tmp_path) == NUM_UNITS
    assert not cache.exists(cache_of(tmp_path))
    unscored = cache.open(unscored_of(tmp_path))
    assert unscored.verify() == []
    assert {record.signal for record in unscored[:]} == {None}
    assert score(tmp_path) == NUM_UNITS
    assert_same_rows(cache_of(tmp_path), expected)
    assert {unit: sorted(rows) for unit, rows in units_of(cache_of(tmp_path)).items()} == {
        unit: sorted(rows) for unit, rows in units_of(expected).items()
    }


@pytest.mark.parametrize("kind", leading(1, ["hidden", "nucleus", "full"]))
def test_other_signals_need_no_more_of_an_unscored_row(tmp_path: Path, kind: str) -> None:
    values = {"signal": kind, "rollouts_per_refresh": 4, "rollouts_per_unit": 4}
    generate(tmp_path / "apart", **values)
    score(tmp_path / "apart", **values)
    apart, together = cache.open(cache_of(tmp_path / "apart")), cache.open(both(tmp_path / "both", **values))
    assert apart.row_ids == together.row_ids
    assert apart.to_table([*cache.open(apart.root).to_table().column_names, "signal"]).equals(
        together.to_table([*together.to_table().column_names, "signal"])
    )


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path)
    assert generate(tmp_path) == 0
    score(tmp_path)
    monkeypatch.setattr(TeacherLoader, "get", lambda *_: pytest.fail("the teacher was loaded for nothing"))
    assert score(tmp_path) == 0
    shutil.rmtree(unscored_of(tmp_path))
    assert generate(tmp_path) == 0
    assert score(tmp_path) == 0


def test_scored_rows_of_role_both_are_neither_generated_nor_scored_again(
    tmp_path: Path, expected: Path
) -> None:
    shutil.copytree(expected, cache_of(tmp_path))
    lost = cache.open(cache_of(tmp_path)).commit_records()[1]
    (cache_of(tmp_path) / "commits" / lost.name).unlink()
    assert generate(tmp_path) == 1
    assert score(tmp_path) == 1
    assert_same_rows(cache_of(tmp_path), expected)


@pytest.mark.thorough
def test_either_side_goes_on_after_a_crash(
    tmp_path: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt commits at most one unit more before it dies; they take turns."""
    commit = UnitWriter.commit

    def once(self: UnitWriter, unit: str) -> None:
        commit(self, unit)
        self.drain()
        raise Stop

    for _ in range(NUM_UNITS):
        for stage in (generate, score):
            with monkeypatch.context() as patch:
                patch.setattr(UnitWriter, "commit", once)
                with pytest.raises(Stop):
                    stage(tmp_path)
    assert generate(tmp_path) == score(tmp_path) == 0
    assert_same_rows(cache_of(tmp_path), expected)


def test_a_scorer_without_a_generator_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"no rollouts to score appeared in .*cache-unscored .*found none of 24 planned\)"
    ):
        score(tmp_path)
    assert "waiting for rollouts in" in capsys.readouterr().out
    generate(tmp_path, rollouts_per_refresh=8)
    with pytest.raises(
        UserError, match=r"found 8 of refresh 0 by policy [0-9a-f]{16} of 24 planned\)\. Start"
    ):
        score(tmp_path)
    assert len(cache.open(cache_of(tmp_path))) == 8  # what was there is scored


def test_another_runs_rows_are_not_scored(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    generate(tmp_path, cache_dir=root, run_name="other", seed=5)
    with pytest.raises(UserError, match="no rollouts to score appeared"):
        score(tmp_path, cache_dir=root)
    generate(tmp_path, cache_dir=root)
    score(tmp_path, cache_dir=root)
    assert set(cache.open(root).index["run_id"].to_pylist()) == {role(tmp_path, "both").run_id}


def test_rows_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    generate(tmp_path)
    with pytest.raises(cache.CacheError, match="chat_template_kwargs"):
        score(tmp_path, chat_template_kwargs="{x: 1}")


@pytest.mark.parametrize("is_done", [False, True])
def test_another_signal_is_refused_before_the_teacher_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    generate(tmp_path)
    score(tmp_path)
    if not is_done:
        next((cache_of(tmp_path) / "commits").iterdir()).unlink()
    monkeypatch.setattr(TeacherLoader, "get", lambda self: pytest.fail("the teacher was loaded"))
    with pytest.raises(cache.CacheError, match="signal"):
        score(tmp_path, signal_k=5)


def test_training_and_the_pipeline_take_both_roles_only(tmp_path: Path, forked: Forker) -> None:
    run = role(tmp_path, "generate")
    both(tmp_path)
    with pytest.raises(UserError, match=r"role generate is for `dualkl rollout` without --follow"):
        stage_two.train(run, student_of(run), setup.shared_vocabulary(run.config))
    forked.stage("stages.pipeline", *small(tmp_path, role="score")).expect_sentence(
        "role score is for `dualkl rollout`"
    )


def alive(workers: list[Any]) -> bool:
    return any(worker.is_alive() for worker in workers)


def join(workers: list[Any]) -> None:
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)


@pytest.mark.parametrize(("generators", "scorers"), leading(1, [(2, 2), (1, 1), (4, 4)]))
def test_several_generators_and_several_zero3_scorers_at_the_same_time(
    tmp_path: Path, forked: Forker, expected: Path, generators: int, scorers: int
) -> None:
    values = VALUES | {"teacher_ds_zero3": "true"}
    scoring = forked.start("stages.rollout", *small(tmp_path, **values, role="score"), processes=scorers)
    generating = forked.start(
        "stages.rollout", *small(tmp_path, **values, role="generate"), processes=generators
    )
    join([*generating, *scoring])
    assert_same_rows(cache_of(tmp_path), expected)
    assert units_of(cache_of(tmp_path)).keys() == units_of(expected).keys()
    assert records_of(tmp_path / "demo", "rollout_progress")[-1]["rollouts_left"] == 0


@pytest.mark.parametrize("victim", leading(1, ["score", "generate"]))
def test_a_side_that_is_killed_and_started_again_loses_and_doubles_nothing(
    tmp_path: Path, forked: Forker, expected: Path, victim: str
) -> None:
    sides = {name: small(tmp_path, **VALUES, role=name) for name in ("generate", "score")}
    running = {name: forked.start("stages.rollout", *arguments) for name, arguments in sides.items()}
    watched = {"generate": unscored_of(tmp_path), "score": cache_of(tmp_path)}[victim]
    while alive(running[victim]) and not list((watched / "commits").glob("*.json")):
        time.sleep(0.01)
    for worker in running[victim]:
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    running[victim] = forked.start("stages.rollout", *sides[victim])
    join([*running["generate"], *running["score"]])
    assert_same_rows(cache_of(tmp_path), expected)
    rows = [row for record in cache.open(cache_of(tmp_path)).commit_records() for row in record.row_ids]
    assert len(rows) == len(set(rows)) == 24


@pytest.mark.parametrize("name", ["both", "score"])
def test_an_interrupt_is_one_line_and_what_is_committed_is_kept(
    tmp_path: Path, forked: Forker, expected: Path, name: str
) -> None:
    arguments = small(tmp_path, **(VALUES | {"rollouts_per_unit": 4}), role=name)
    if name == "score":
        generate(tmp_path, rollouts_per_unit=4, rollouts_per_refresh=20)  # it ends by waiting
    workers, where = forked.launch("stages.rollout", *arguments)
    while workers[0].is_alive() and not list((cache_of(tmp_path) / "commits").glob("*.json")):
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGINT)
    workers[0].join(60)
    assert workers[0].exitcode == 130
    assert (
        (where / "err-0")
        .read_text()
        .strip()
        .splitlines()[-1]
        .startswith("interrupted (Ctrl-C); run the same command again")
    )
    assert "Traceback" not in (where / "err-0").read_text()
    kept = cache.open(cache_of(tmp_path))
    assert kept.verify() == []
    assert set(kept.row_ids) <= set(cache.open(expected).row_ids)
    assert len(kept) in range(4, 25, 4)


def test_a_scorer_does_not_touch_the_runs_configuration(tmp_path: Path) -> None:
    generate(tmp_path)
    kept = (tmp_path / "demo" / "config.yaml").read_text()
    score(tmp_path)
    assert (tmp_path / "demo" / "config.yaml").read_text() == kept


def test_units_that_leave_processes_idle_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = role(tmp_path, "both")
    policy = policy_of(run, student_of(run))
    crowd = Run(run.config, type("World", (), {"size": 2, "is_main": True})(), run.metrics, run.clock)
    units = refresh.planned_units(crowd, policy, prompts_of(run.config), 0)
    assert len(units) == NUM_UNITS
    assert (
        "3 units over 2 processes leave 25% of them idle; rollouts_per_unit 6 would not"
        in capsys.readouterr().out
    )
