"""A training that crashed anywhere and went on is the training that never stopped, bit by bit."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cache
from stages import train as stage_two
from stages.loops import probe, refresh, setup, steps
from stages.runtime import checkpoint
from stages.runtime.run import Run, open_run
from tests.support.helpers import Forker, assert_same_weights, records_of, small, weights_in
from tests.support.thinning import leading
from tests.support.tiny_runs import TINY, student_of, train, write_rollouts


class Stop(Exception):
    """Stands for a crash."""


def interrupt(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Makes the next training crash at `place`."""
    if place.startswith("step "):
        step, last = steps.train_step, int(place.split()[1])

        def stopping(run: Run, training: steps.Training, *arguments: Any) -> Any:
            if training.step == last:
                raise Stop
            return step(run, training, *arguments)

        monkeypatch.setattr(steps, "train_step", stopping)
    elif place.startswith("micro-step "):
        backward, count = steps._backward, [0]

        def counted(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == int(place.split()[1]):
                raise Stop
            return backward(*arguments)

        monkeypatch.setattr(steps, "_backward", counted)
    elif place == "between units":
        commit, count = cache.Writer.commit, [0]

        def once(self: cache.Writer, unit: str) -> cache.CommitResult:
            count[0] += 1
            if "-g0001-" in unit and count[0] > 1:
                raise Stop
            return commit(self, unit)

        monkeypatch.setattr(cache.Writer, "commit", once)
    elif place.startswith("in the checkpoint of step "):
        step_written = int(place.split()[-1])
        write = checkpoint._write_files

        def half(folder: Path, position: checkpoint.Position, *arguments: Any) -> None:
            write(folder, position, *arguments)
            if position.step == step_written:
                (folder / "state.json").unlink()
                raise Stop

        monkeypatch.setattr(checkpoint, "_write_files", half)
    else:
        check = refresh.check_generator
        module, name, crash = {
            "before the probe": (refresh, "check_generator", raising),
            "while the probe is written": (probe, "replace_text", half_written),
            "after the probe": (refresh, "check_generator", lambda *a: [check(*a), raising()]),
            "at the export": (stage_two.students, "export", raising),
        }[place]
        monkeypatch.setattr(module, name, crash)


def raising(*_: Any) -> Any:
    raise Stop


def half_written(path: Path, text: str) -> None:
    path.with_name(f"{path.name}.partial").write_text(text[: len(text) // 2])
    raise Stop


def crash(folder: Path, place: str, **values: Any) -> None:
    """A training that ends at `place`."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, place)
        with pytest.raises(Stop):
            train(folder, **values)


PLACES = leading(
    3,
    [
        "step 1",
        "between units",
        "in the checkpoint of step 3",  # while the rows of a refresh are written
        "step 5",
        "in the checkpoint of step 4",  # while training goes on
        "while the probe is written",
    ],
)
MORE_PLACES = ["step 0", "step 2", "step 3", "step 4", "before the probe", "after the probe", "at the export"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("uninterrupted"))


def assert_same_run(run: Run, expected: Run) -> None:
    """Weights, optimizer state and random state bit by bit, rows, and the curve."""
    assert_same_weights(weights_in(run.folder / "student"), weights_in(expected.folder / "student"))
    left, right = (checkpoint.latest(r.folder / "checkpoints") for r in (run, expected))
    assert left is not None
    assert right is not None
    assert left.name == right.name
    assert_same_weights(weights_in(left), weights_in(right))
    states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (left, right)]
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())
    rows = [cache.open(r.config.cache_root) for r in (run, expected)]
    assert rows[0].row_ids == rows[1].row_ids
    assert rows[0].to_table().equals(rows[1].to_table())
    curves = [
        [(s["step"], s["loss"], s["refresh_index"]) for s in records_of(r.folder, "step")]
        for r in (run, expected)
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("place", [*PLACES, *(pytest.param(p, marks=pytest.mark.slow) for p in MORE_PLACES)])
def test_a_run_that_crashed_and_went_on_is_the_run_that_never_stopped(
    tmp_path: Path, uninterrupted: Run, place: str
) -> None:
    crash(tmp_path, place)
    assert_same_run(train(tmp_path), uninterrupted)


def train_until(folder: Path, flags: list[str], place: str) -> None:
    """In a process of its own: both stages up to a crash at `place`, or to the end if it is empty."""
    run = open_run("", flags)
    student = student_of(run)
    write_rollouts(run, student)
    with pytest.MonkeyPatch.context() as patch:
        if place:
            interrupt(patch, place)
        with suppress(Stop):
            stage_two.train(run, student, setup.shared_vocabulary(run.config))
    if not place:
        torch.save(
            {n: p.detach().clone() for n, p in student.trainable.items()}, folder / f"{run.world.rank}.pt"
        )


CARRIED: dict[str, Any] = {
    "tau_share": 0.7,
    "max_age": 6,
    "rollouts_per_unit": 4,
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("values", "processes"),
    [({}, 2), (CARRIED, 2), ({"batch_size": 12, "rollouts_per_refresh": 12, "grad_accum": 1}, 3)],
    ids=["plain", "with all that steps and refreshes carry over", "three, whose sums have an order"],
)
def test_several_processes_resume_bit_by_bit(
    tmp_path: Path, forked: Forker, values: dict[str, Any], processes: int
) -> None:
    found = []
    for name, places in (("whole", [""]), ("cut", ["step 3", ""])):
        folder = tmp_path / name
        folder.mkdir()
        for place in places:
            flags = small(folder, **(TINY | values))
            forked.call(train_until, folder, flags, place, processes=processes).expect_success()
        found.append([torch.load(folder / f"{rank}.pt") for rank in range(processes)])
    for rank in range(processes):
        assert_same_weights(found[1][rank], found[0][0])


@pytest.mark.thorough
def test_held_out_divergences_and_the_best_weights_resume(tmp_path: Path) -> None:
    """Killed between an evaluation and the next checkpoint: it is measured again and recorded once."""
    values: dict[str, Any] = {"eval_every": 1, "eval_prompts": 4, "max_steps": 5, "refresh_every": 0}
    expected = train(tmp_path / "whole", **values)
    crash(tmp_path / "cut", "step 3", **values)
    run = train(tmp_path / "cut", **values)
    evals = [
        [(e["step"], e["reverse_kl"], e["is_best"]) for e in records_of(r.folder, "eval")]
        for r in (run, expected)
    ]
    assert evals[0] == evals[1]
    assert [step for step, _, _ in evals[0]] == [1, 2, 3, 4, 5]
    assert any(is_best for _, _, is_best in evals[0][2:]), "one that is measured twice"
    folders = [r.folder / "checkpoints" for r in (run, expected)]
    assert checkpoint.best(folders[0]) == checkpoint.best(folders[1])
    assert_same_weights(*(load_file(folder / checkpoint.BEST) for folder in folders))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bf16", "gradient_checkpointing": "true", "lora_dropout": 0.0}],
    ids=["fp32", "lean bf16"],
)
def test_a_run_in_many_packed_micro_steps_resumes_bit_by_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    values: dict[str, Any] = {"micro_batch_tokens": 120, "grad_accum": 2} | options
    expected = train(tmp_path / "whole", **values)
    crash(tmp_path / "cut", "micro-step 9", **values)
    assert_same_run(train(tmp_path / "cut", **values), expected)


@pytest.mark.thorough
def test_full_fine_tuning_resumes_bit_by_bit(tmp_path: Path) -> None:
    values: dict[str, Any] = {"use_lora": "false", "lr": 1e-4}
    expected = train(tmp_path / "whole", **values)
    crash(tmp_path / "cut", "step 5", **values)
    assert_same_run(train(tmp_path / "cut", **values), expected)


def test_a_refresh_that_was_repeated_is_recorded_once(tmp_path: Path) -> None:
    crash(tmp_path, "step 3")  # after the refresh, before the next checkpoint
    run = train(tmp_path)
    assert [record["refresh_index"] for record in records_of(run.folder, "refresh")] == [1]


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path: Path) -> None:
    run = train(tmp_path)
    before = weights_in(run.folder / "student")
    train(tmp_path)
    assert_same_weights(weights_in(run.folder / "student"), before)
    assert len(records_of(run.folder, "step")) == 6


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(tmp_path: Path) -> None:
    run = train(tmp_path, max_steps=4)
    before = weights_in(run.folder / "student")
    train(tmp_path, max_steps=5)
    assert [step["step"] for step in records_of(run.folder, "step")] == [1, 2, 3, 4, 5]
    assert any(not torch.equal(t, before[n]) for n, t in weights_in(run.folder / "student").items())


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = train(tmp_path, checkpoint_every=1, keep_checkpoints=2, refresh_every=0)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-000005", "step-000006"]


@pytest.mark.slow
def test_a_half_written_checkpoint_is_not_read(tmp_path: Path, uninterrupted: Run) -> None:
    crash(tmp_path, "step 3")
    folder = tmp_path / "demo" / "checkpoints"
    (folder / ".partial-step-000099").mkdir()
    (folder / ".partial-step-000099" / "student.safetensors").write_bytes(b"half")
    assert_same_run(train(tmp_path), uninterrupted)


def curve(run: Run) -> torch.Tensor:
    return torch.tensor([step["loss"] for step in records_of(run.folder, "step")])


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["step 1", "step 2"])
def test_on_a_gpu_a_resumed_run_differs_no_more_than_two_identical_ones(tmp_path: Path, place: str) -> None:
    """Compiled, as by default, and without a refresh, whose tokens depend on the last bits of the weights."""
    assert_resumed_as_repeated(tmp_path, place, device="cuda", compile="auto", refresh_every=0)


def assert_resumed_as_repeated(folder: Path, place: str, **values: Any) -> None:
    first, second = (curve(train(folder / name, **values)) for name in ("first", "second"))
    crash(folder / "crashed", place, **values)
    resumed = curve(train(folder / "crashed", **values))
    assert len(resumed) == len(first) == 6
    identical, after = (second - first).abs().max(), (resumed - first).abs().max()
    print(f"losses of two identical runs differ by {identical:.1e}, those of a resumed one by {after:.1e}")
    assert after <= 2 * identical + 1e-5
