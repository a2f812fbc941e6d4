"""Stage one: the plan, the scoring batches, and committed rows against the teacher's own logits."""

import errno
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache
from stages.data.prompts import Prompt
from stages.loops import refresh, setup
from stages.loops.collect import Unit, missing_units, plan
from stages.models import teacher as teachers
from stages.models.student import Student, load_student, policy_hash
from stages.models.teacher import TeacherLoader
from stages.runtime.config import Config
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from tests.support import reference
from tests.support.helpers import Forker, make_run, prompts_of, small
from tests.support.thinning import leading
from tests.support.tiny_runs import policy_of

V = 230


# The plan


def prompt(number: int, length: int = 5) -> Prompt:
    return Prompt(f"p{number}", np.arange(length, dtype=np.int32), f"text {number}", {})


def planned(prompts: list[Prompt], **values: Any) -> list[Unit]:
    defaults = {
        "seed": 0,
        "run_id": "run-1",
        "policy_hash": "abcdef0123456789",
        "refresh_index": 0,
        "num_rollouts": 12,
        "group_size": 2,
        "rollouts_per_unit": 5,
    }
    return plan(prompts, **(defaults | values))


def ids_of(units: list[Unit]) -> list[str]:
    return [row.row_id for unit in units for row in unit.rows]


def test_a_plan_is_the_same_every_time() -> None:
    prompts = [prompt(i) for i in range(10)]
    assert planned(prompts) == planned(prompts)


def test_row_ids_are_stable_over_versions() -> None:
    """Caches hold them: another id for the same row would make every resume start over."""
    assert ids_of(planned([prompt(0)], num_rollouts=2)) == [
        "ab507a8669b27f1b802c66aa71f452ab",
        "14d6dfdc11adbee692bc65fc169f3d46",
    ]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"policy_hash": "0123456789abcdef"}, {"refresh_index": 1}],
    ids=lambda change: next(iter(change)),
)
def test_row_ids_differ_by_seed_policy_and_refresh(change: dict[str, Any]) -> None:
    prompts = [prompt(i) for i in range(3)]
    assert not set(ids_of(planned(prompts))) & set(ids_of(planned(prompts, **change)))


def test_row_ids_do_not_depend_on_how_the_plan_is_cut_into_units() -> None:
    prompts = [prompt(i) for i in range(4)]
    assert ids_of(planned(prompts)) == ids_of(planned(prompts, rollouts_per_unit=3))


def test_a_prompt_that_comes_again_makes_other_rows() -> None:
    rows = [row for unit in planned([prompt(0), prompt(1)]) for row in unit.rows]
    assert len({row.row_id for row in rows}) == len(rows) == 12
    assert sorted({(row.prompt.prompt_id, row.occurrence, row.sample_index) for row in rows}) == [
        (f"p{p}", occurrence, sample) for p in range(2) for occurrence in range(3) for sample in range(2)
    ]


def test_the_same_prompt_under_two_numbers_makes_different_rows() -> None:
    ids = ids_of(planned([prompt(0), prompt(0)], num_rollouts=4))
    assert len(set(ids)) == 4


def test_refreshes_go_through_the_prompts_in_turn() -> None:
    prompts = [prompt(i) for i in range(9)]
    seen = [
        row.prompt.prompt_id
        for r in range(3)
        for unit in planned(prompts, refresh_index=r, first_rollout=12 * r)
        for row in unit.rows[::1]
    ]
    assert seen[::2] == [f"p{i % 9}" for i in range(18)]


def test_units_hold_the_planned_number_of_rows_and_have_names_of_their_own() -> None:
    units = planned([prompt(i) for i in range(6)])
    assert [len(unit.rows) for unit in units] == [5, 5, 2]
    assert [unit.name for unit in units] == [f"run-1-g0000-abcdef01-{i:05d}" for i in range(3)]
    assert planned([prompt(0)], refresh_index=7)[0].name == "run-1-g0007-abcdef01-00000"


def test_a_unit_is_missing_unless_all_its_rows_are_committed() -> None:
    units = planned([prompt(i) for i in range(6)])
    everything = set(ids_of(units))
    assert missing_units(units, everything) == []
    assert missing_units(units, set()) == units
    assert missing_units(units, everything - {units[1].rows[3].row_id}) == [units[1]]


# Committed rows


def write(run: Run, student: Student, prompts: list[Prompt]) -> int:
    vocabulary, policy = setup.shared_vocabulary(run.config), policy_of(run, student)
    with TeacherLoader(run.config, run.world) as teacher:
        return refresh.write_rollouts(run, policy, vocabulary, prompts, refresh_index=0, teacher=teacher)


def written(folder: Path, **values: Any) -> tuple[Config, cache.Snapshot, int]:
    """A cache of 12 rollouts by the plain teacher, in two units."""
    defaults = {
        "teacher_ds_zero3": "false",
        "rollouts_per_refresh": 12,
        "rollouts_per_unit": 8,
        "group_size": 2,
        "lp_micro_batch": 3,
    }
    run = make_run(folder, **(defaults | values))
    student = load_student(run.config, run.world.device, V, setup.shared_vocabulary(run.config).tokenizer)
    num_units = write(run, student, prompts_of(run.config))
    return run.config, cache.open(run.config.cache_root), num_units


@torch.no_grad()
def teacher_logits(model: Any, record: cache.Record) -> torch.Tensor:
    """The plain model's logits [T, V] for a row, one forward without padding."""
    ids = torch.from_numpy(np.concatenate([record.prompt_ids, record.completion_ids]).astype(np.int64))[None]
    return model(input_ids=ids).logits[0, len(record.prompt_ids) - 1 : -1].float()


@pytest.mark.parametrize("signal", leading(2, ["topk", "hidden", "nucleus", "full"]))
def test_a_committed_row_says_what_the_plain_teacher_says(
    tmp_path: Path, teacher_model: Any, signal: str
) -> None:
    _, snapshot, num_units = written(tmp_path, signal=signal, signal_k=8, signal_p=0.9)
    assert num_units == 2
    assert len(snapshot) == 12
    assert snapshot.verify() == []
    for record in snapshot[:]:
        logits = teacher_logits(teacher_model, record)
        logprobs = logits.double().log_softmax(-1)
        targets = torch.from_numpy(record.completion_ids.astype(np.int64))[:, None]
        close: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
        np.testing.assert_allclose(record.teacher_logprobs, logprobs.gather(1, targets)[:, 0], **close)
        np.testing.assert_allclose(
            record.teacher_entropy, [reference.entropy(row) for row in logprobs], **close
        )
        assert record.top1_id is not None
        assert record.top1_id.tolist() == logprobs.argmax(-1).tolist()
        check_signal(snapshot, record, logits, logprobs, p=0.9 if signal == "nucleus" else 1.0)


def check_signal(
    snapshot: cache.Snapshot, record: cache.Record, logits: torch.Tensor, logprobs: torch.Tensor, p: float
) -> None:
    signal = record.signal
    if isinstance(signal, cache.Full):
        np.testing.assert_allclose(signal.logits, logits, atol=1e-3)
        return
    if isinstance(signal, cache.Hidden):
        head = snapshot.head()
        assert head is not None
        np.testing.assert_allclose(signal.states @ head.weight.T, logits, atol=1e-3)
        return
    assert isinstance(signal, cache.TopK)
    ids, kept, tails = reference.compress(logits, 8, p, floor=4)
    for t, (row, values) in enumerate(zip(ids, kept, strict=True)):
        assert [i for i in signal.ids[t].tolist() if i >= 0] == row
        np.testing.assert_allclose(signal.logprobs[t][: len(row)], values, atol=1 / 32)
    np.testing.assert_allclose(np.exp(signal.log_tail_mass), np.exp(tails), atol=1e-4)


def test_a_row_knows_who_wrote_it_and_from_what(tmp_path: Path, tokenizer: Any) -> None:
    config, snapshot, _ = written(tmp_path)
    prompts = {p.prompt_id: p for p in prompts_of(config)}
    student = make_student(config)
    for record in snapshot[:]:
        assert np.array_equal(record.prompt_ids, prompts[record.prompt_id].ids)
        assert record.prompt_text == prompts[record.prompt_id].text
        assert record.completion_text == tokenizer.decode(record.completion_ids, skip_special_tokens=True)
        assert record.policy_step == record.refresh_index == 0
        assert record.policy_hash == policy_hash(student)
        assert record.finish_reason == ("eos" if record.completion_ids[-1] == 1 else "length")
        assert record.run_id.startswith("demo-")


def make_student(config: Config) -> Student:
    return load_student(config, torch.device("cpu"), V, setup.shared_vocabulary(config).tokenizer)


@pytest.mark.parametrize("dtype", ["bf16"])
def test_a_bf16_teacher_stores_its_states_in_bf16(tmp_path: Path, dtype: str) -> None:
    _, snapshot, _ = written(tmp_path, signal="hidden", teacher_dtype=dtype)
    signal, head = snapshot[0].signal, snapshot.head()
    assert isinstance(signal, cache.Hidden)
    assert head is not None
    assert signal.dtype == head.dtype == "bfloat16"


def test_scoring_batches_do_not_change_what_is_stored(tmp_path: Path) -> None:
    one = written(tmp_path / "a", lp_micro_batch=12)[1]
    other = written(tmp_path / "b", lp_micro_batch=2)[1]
    assert one.row_ids == other.row_ids
    for a, b in zip(one[:], other[:], strict=True):
        assert np.array_equal(a.completion_ids, b.completion_ids)
        np.testing.assert_allclose(a.teacher_logprobs, b.teacher_logprobs, atol=1e-5)


def test_written_units_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setattr(
        teachers, "load_teacher", lambda *_: pytest.fail("the teacher was loaded for nothing")
    )
    assert written(tmp_path)[2] == 0


def rows_equal(left: cache.Snapshot, right: cache.Snapshot) -> bool:
    return left.row_ids == right.row_ids and left.to_table().equals(right.to_table())


def test_only_a_missing_unit_is_made_and_comes_out_identical(tmp_path: Path) -> None:
    config, whole, _ = written(tmp_path / "whole")
    _, part, _ = written(tmp_path / "part")
    lost = part.commit_records()[1]
    (Path(part.root) / "commits" / lost.name).unlink()
    (Path(part.root) / lost.shard).unlink()
    assert len(part.refresh()) == 12 - len(lost.row_ids)
    _, again, num_units = written(tmp_path / "part")
    assert num_units == 1
    assert rows_equal(again, whole)
    assert config.rollout.rollouts_per_unit == 8


def test_two_processes_write_the_rows_of_one(forked: Forker, tmp_path: Path) -> None:
    """An odd number of units: one rank joins the last round with dummies only."""
    values: dict[str, Any] = {"rollouts_per_refresh": 24, "rollouts_per_unit": 8}
    for name, processes in (("one", 1), ("two", 2)):
        forked.stage(
            "stages.rollout", *small(tmp_path / name, **values), processes=processes
        ).expect_success()
    one, two = (cache.open(tmp_path / name / "demo" / "cache") for name in ("one", "two"))
    assert len(one) == 24
    assert rows_equal(one, two)
    for a, b in zip(one[:], two[:], strict=True):
        assert isinstance(a.signal, cache.TopK)
        assert isinstance(b.signal, cache.TopK)
        assert np.array_equal(a.signal.logprobs, b.signal.logprobs)


# Things that go wrong


def test_a_student_that_gives_nan_is_a_sentence_and_nothing_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, teacher_ds_zero3="false", rollouts_per_refresh=4, rollouts_per_unit=4)
    student = make_student(run.config)
    with torch.no_grad():
        student.base.get_decoder().norm.weight[0] = math.nan
    with pytest.raises(
        UserError, match=r"generating model gave NaN or infinite logits .* nothing of unit .* was kept"
    ):
        write(run, student, prompts_of(run.config))
    assert len(cache.open(run.config.cache_root)) == 0


@pytest.mark.parametrize("signal", ["topk", "hidden"])
def test_a_teacher_that_gives_nan_is_a_sentence_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    run = make_run(
        tmp_path, teacher_ds_zero3="false", rollouts_per_refresh=4, rollouts_per_unit=4, signal=signal
    )
    load = teachers.load_teacher

    def broken(config: Config, world: Any) -> Any:
        teacher = load(config, world)
        inner = teacher.forward
        teacher.forward = lambda *arguments: torch.full_like(inner(*arguments), math.nan)
        return teacher

    monkeypatch.setattr(teachers, "load_teacher", broken)
    with pytest.raises(
        UserError, match=r"the teacher gave NaN or infinite values .* none of that unit was kept"
    ):
        write(run, make_student(run.config), prompts_of(run.config))
    assert len(cache.open(run.config.cache_root)) == 0


def test_a_full_disk_is_a_sentence_and_committed_units_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.write, []

    def full(descriptor: int, data: Any) -> int:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path.startswith(str(tmp_path)) and "/shards/" in path:
            calls.append(len(data))
            if sum(calls) > 9000:  # the second unit does not fit
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        cache.CacheError, match=r"No space left on .* committed rows are kept; free space and rerun"
    ):
        written(tmp_path)
    monkeypatch.undo()
    assert len(cache.open(tmp_path / "demo" / "cache")) in (0, 8)
    assert written(tmp_path)[2] in (1, 2)
    assert len(cache.open(tmp_path / "demo" / "cache")) == 12


def test_another_signal_in_the_same_cache_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(cache.CacheError, match="signal"):
        written(tmp_path, signal_k=8)


@pytest.mark.thorough
def test_another_run_may_write_to_the_same_cache(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    written(tmp_path, cache_dir=root)
    _, snapshot, _ = written(tmp_path, cache_dir=root, run_name="second", seed=5)
    assert len(snapshot) == 24
    assert len(set(snapshot.index["run_id"].to_pylist())) == 2


def test_more_rollouts_for_the_same_refresh_add_only_what_is_missing(tmp_path: Path) -> None:
    written(tmp_path)
    _, snapshot, num_units = written(tmp_path, rollouts_per_refresh=20)
    assert len(snapshot) == 20
    assert num_units == 2
    assert snapshot.verify() == []
