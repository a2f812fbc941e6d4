"""What stage one says of itself: rates, shares, padding."""

from pathlib import Path

import pytest

from stages.loops import progress
from stages.loops.progress import Counts, Progress
from tests.support.helpers import Forker, make_run, records_of, small
from tests.support.tiny_runs import TINY, student_of, write_rollouts


def test_each_round_is_recorded_with_rates_shares_and_what_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    write_rollouts(run, student_of(run))
    records = records_of(run.folder, "rollout_progress")
    assert [(r["rollouts"], r["rollouts_left"]) for r in records] == [(8, 8), (16, 0)]
    assert len({r["began"] for r in records}) == 1
    with run.clock.phase("evaluate"), Progress(run, 1) as measuring:
        measuring.add(Counts(1))
    assert [r["evaluation"] for r in records_of(run.folder, "rollout_progress")] == [False, False, True]
    for record in records:
        assert record["start"] == run.clock.started
        for name in ("rollouts_per_second", "generated_tokens_per_second", "scored_tokens_per_second"):
            assert record[name] > 0
        assert record["eta_seconds"] == pytest.approx(record["rollouts_left"] / record["rollouts_per_second"])
        shares = {name: record[f"share_{name}"] for name in ("generate", "score", "write", "rows")}
        assert shares["generate"] > 0 < shares["score"]
        assert shares["rows"] == 0 <= shares["write"]
        assert 0.5 < sum(shares.values()) <= 1
        assert 0 <= record["padding_waste"] < 1


def test_counts_give_the_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    with Progress(run, 40) as shown:
        seconds = {"generate": 2.0, "score": 3.0, "write": 1.0, "rows": 0.0}
        monkeypatch.setattr(shown._clock, "seconds", seconds)
        monkeypatch.setattr(shown._clock, "total", lambda: 8.0)
        shown.add(Counts(10, cut_rollouts=6, generated_tokens=400, scored_tokens=800, padded_tokens=1000))
    (found,) = records_of(run.folder, "rollout_progress")
    assert (found["rollouts_per_second"], found["eta_seconds"]) == (10 / 8, 24)
    assert (found["generated_tokens_per_second"], found["scored_tokens_per_second"]) == (200, 200)
    assert found["padding_waste"] == pytest.approx(0.2)
    assert found["cut_share"] == 0.6
    assert (found["share_generate"], found["share_score"], found["share_write"]) == (2 / 8, 3 / 8, 1 / 8)
    line = progress.last_line(run)
    assert line == (
        "10 rollouts in 8 s, 1.2 a second: 200 tokens/s generated, 200 scored; 60 % of completions were cut"
        " at max_new_tokens; time: 25.0% generating, 37.5% scoring, 12.5% waiting for the writer; padding"
        " 20.0%"
    )


def test_a_start_that_had_nothing_to_do_says_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    write_rollouts(run, student_of(run))
    again = make_run(tmp_path, **TINY)
    object.__setattr__(again.clock, "started", run.clock.started + 1)
    assert progress.last_line(again) == ""


def test_rollout_tells_how_it_went(tmp_path: Path, forked: Forker) -> None:
    done = forked.stage(
        "stages.rollout", *small(tmp_path, rollouts_per_refresh=8, rollouts_per_unit=8), processes=2
    )
    out = done.expect_success().out
    assert "8 rollouts in" in out
    assert "waiting for the writer" in out
    assert len(records_of(tmp_path / "demo", "rollout_progress")) == 1
