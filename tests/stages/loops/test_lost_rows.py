"""Rows that a run has trained on and that are gone from its cache: withdrawn as damaged, or pruned."""

import json
from pathlib import Path

import pytest

import cache
from cache.__main__ import main
from stages.loops import schedule, setup
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from tests.stages.loops.test_resume import Stop, crash
from tests.support.helpers import make_run, records_of
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY, student_of, train, write_rollouts


def withdraw(run: Run, refresh_index: int) -> int:
    """Damages a shard of a refresh and has it withdrawn; returns the number of its rows."""
    root = Path(run.config.cache_root)
    record = next(r for r in cache.open(root).commit_records() if r.policies[0][3] == refresh_index)
    path = root / record.shard
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert cache.open(root).verify()
    assert main(["verify", "--repair", str(root)]) in (0, 1)
    return len(record.row_ids)


def test_a_run_whose_rows_are_gone_refreshes_at_once_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crash(tmp_path, "step 5")
    run = make_run(tmp_path, **(TINY | {"lora_dropout": 0.1}))
    gone = withdraw(run, 1)
    run = train(tmp_path)
    assert f"{gone} of the 16 rows in use are gone" in capsys.readouterr().out
    lost = records_of(run.folder, "refresh")[-1]
    assert lost["reason"] == f"lost: {gone} of 16 rows were gone"
    assert lost["refresh_index"] == 2
    assert [step["step"] for step in records_of(run.folder, "step")] == [1, 2, 3, 4, 5, 6]
    assert records_of(run.folder, "step")[-1]["refresh_index"] == 2
    assert cache.open(run.config.cache_root).verify() == []


def test_without_refreshes_what_is_left_is_trained_on_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"refresh_mode": "off", "refresh_every": 0}
    crash(tmp_path, "step 5", **values)
    withdraw(make_run(tmp_path, **(TINY | values)), 0)
    train(tmp_path, **values)
    assert "training continues with the others, since refresh_mode is off" in capsys.readouterr().out


@pytest.mark.thorough
def test_rows_of_an_earlier_refresh_may_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its probe batch, too: another one is taken."""
    crash(tmp_path, "step 5")
    withdraw(make_run(tmp_path, **TINY), 0)
    run = train(tmp_path, max_steps=8)
    out = capsys.readouterr().out
    assert "rows in use are gone" not in out
    assert "the probe takes new rows" in out
    assert [r["refresh_index"] for r in records_of(run.folder, "refresh")] == [1, 2]


@pytest.mark.parametrize(
    "text", leading(1, ["", "[]", '{"row_ids": 3}', '{"row_ids": ["a"], "logprobs": {"0": "x"}}', "\xff"])
)
def test_a_probe_that_cannot_be_read_begins_anew(tmp_path: Path, text: str) -> None:
    crash(tmp_path, "step 5")
    (tmp_path / "demo/probe.json").write_text(text, encoding="latin-1")
    run = train(tmp_path, max_steps=8)
    assert records_of(run.folder, "refresh")[-1]["probe_gap"] < 1e-4
    assert json.loads((run.folder / "probe.json").read_text())["row_ids"]


def test_going_back_where_training_cannot_start_discards_nothing(tmp_path: Path) -> None:
    values = {
        "refresh_mode": "off",
        "refresh_every": 0,
        "checkpoint_every": 1,
        "max_steps": 4,
        "keep_checkpoints": 4,
    }
    run = train(tmp_path, **values)
    for record in list(cache.open(run.config.cache_root).commit_records()):
        withdraw(run, record.policies[0][3])
    with pytest.raises(UserError, match="holds no rollouts to train on"):
        train(tmp_path, **(values | {"resume_from": 2}))
    assert len(list((run.folder / "checkpoints").glob("step-*"))) == 4


def test_rows_of_other_weights_at_the_start_are_off_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "policy_hash", lambda _: "0123456789abcdef")
        write_rollouts(run, student)
    run = train(tmp_path, max_steps=1)
    assert "rows were written by another run or other weights (off-policy)" in capsys.readouterr().out
    assert schedule.checkpoint.read_position(run.folder / "checkpoints/step-000001").num_rows == 8


@pytest.mark.thorough
def test_a_crash_at_the_refresh_of_lost_rows_is_made_good(tmp_path: Path) -> None:
    crash(tmp_path, "step 5")
    withdraw(make_run(tmp_path, **TINY), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "open_pool", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            train(tmp_path)
    run = train(tmp_path)
    assert [r["refresh_index"] for r in records_of(run.folder, "refresh")] == [1, 2]
    assert len(cache.open(run.config.cache_root)) == 16 + 8 + len(
        [r for r in cache.open(run.config.cache_root)[:] if r.refresh_index == 2]
    )
