"""Which configuration trained which steps, what a finished run refuses, and going back to an earlier
checkpoint.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.loops import setup
from stages.runtime import card, checkpoint, history
from stages.runtime.errors import UserError
from stages.runtime.metrics import read
from tests.support.helpers import make_config, make_run, records_of
from tests.support.tiny_runs import TINY, train

SHORT: dict[str, Any] = {"max_steps": 3, "refresh_every": 0, "checkpoint_every": 1, "keep_checkpoints": 9}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records_of(folder, "step")]


def test_every_free_key_is_a_key() -> None:
    from stages.runtime.config import SECTION_OF

    assert SECTION_OF.keys() >= history.FREE


def test_a_finished_run_refuses_other_keys_and_is_left_alone_by_the_same_ones(tmp_path: Path) -> None:
    run = train(tmp_path, **SHORT)
    kept = files_of(run.folder)
    train(tmp_path, **SHORT)
    assert files_of(run.folder) == kept
    other = make_run(
        tmp_path, **(TINY | {"lora_dropout": 0.1} | SHORT | {"tau": 0.5, "seed": 7, "keep_checkpoints": 2})
    )
    with pytest.raises(
        UserError,
        match=r"finished: .*step 3 with seed 0, tau 0\.1, this command asks for seed 7, tau 0\.5\."
        r".*--run_name",
    ):
        setup.check_history(other)
    assert files_of(run.folder) == kept


def test_changed_keys_are_told_when_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, **SHORT)
    setup.check_history(
        make_run(tmp_path, **(TINY | {"lora_dropout": 0.1} | SHORT | {"max_steps": 5, "tau": 0.75}))
    )
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("resuming with changed keys: ")
    assert "tau: 0.75" in told


def test_a_longer_run_goes_on_and_says_what_trained_which_steps(tmp_path: Path) -> None:
    train(tmp_path, **SHORT)
    run = train(tmp_path, **(SHORT | {"max_steps": 5, "lr": 1e-4}))
    spans = history.spans(read(run.metrics.path))
    assert [span["steps"] for span in spans] == [[1, 3], [4, 5]]
    assert spans[1]["changed"] == {"max_steps": [3, 5], "lr": [2e-3, 1e-4]}
    text = (run.folder / "student" / "README.md").read_text()
    assert "| 4 to 5 | max_steps 5 (was 3), lr 0.0001 (was 0.002) |" in text
    assert "weights of step 5" in text


def test_a_run_that_goes_on_takes_the_learning_rate_that_it_is_given(tmp_path: Path) -> None:
    train(tmp_path, **SHORT)
    run = train(tmp_path, **(SHORT | {"max_steps": 4, "lr": 1e-4}))
    assert records_of(run.folder, "step")[-1]["lr"] <= 1e-4


def test_going_back_discards_later_steps_and_the_same_command_goes_on(tmp_path: Path) -> None:
    train(tmp_path, **(SHORT | {"max_steps": 4}))
    before = losses(tmp_path / "demo")
    back = SHORT | {"max_steps": 4, "lr": 1e-4, "resume_from": 2}
    run = train(tmp_path, **back)
    found = losses(run.folder)
    assert found[:3] == before[:3]
    assert found[3] != before[3]
    assert [record["from_step"] for record in records_of(run.folder, "config")] == [1, 3]
    kept = files_of(run.folder)
    train(tmp_path, **back)  # done already: not again
    assert files_of(run.folder) == kept


def test_going_back_to_a_step_without_a_checkpoint_names_those_that_are_there(tmp_path: Path) -> None:
    train(tmp_path, **SHORT)
    with pytest.raises(UserError, match=r"resume_from 7: .*there are 1, 2, 3\."):
        train(tmp_path, **(SHORT | {"resume_from": 7}))


@pytest.mark.parametrize("values", [{"lora_r": 2}, {"lora_alpha": 3}, {"lora_targets": "q_proj"}], ids=str)
def test_a_run_does_not_go_on_with_a_checkpoint_of_another_adapter(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    kept = files_of(train(tmp_path, **SHORT).folder)
    longer = make_run(tmp_path, **(TINY | {"lora_dropout": 0.1} | SHORT | {"max_steps": 5} | values))
    for check in (setup.check_history, setup.check_weights_kept):
        with pytest.raises(
            UserError, match=rf"checkpoint of step 3, trained with {next(iter(values))} .*--run_name"
        ):
            check(longer)
    assert files_of(tmp_path / "demo") == kept


def test_a_finished_run_without_its_checkpoints_is_not_trained_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, **SHORT)
    shutil.rmtree(run.folder / "checkpoints")
    again = make_run(tmp_path, **(TINY | {"lora_dropout": 0.1} | SHORT))
    with pytest.raises(UserError, match=r"trained for 3 steps and exported, and .*checkpoints.*--run_name"):
        setup.check_history(again)
    text = run.metrics.path.read_text()
    run.metrics.path.write_text(text.replace('"kind": "export"', '"kind": "other"'))
    setup.check_history(again)
    assert "the 3 steps trained before are trained again" in capsys.readouterr().out


def test_exploded_weights_are_not_kept_and_a_usual_rate_goes_on_from_those_before(tmp_path: Path) -> None:
    train(tmp_path, **(SHORT | {"max_steps": 2}))
    with pytest.raises(
        UserError,
        match=r"the student's weights exploded by step 3 \(rank 0: .*of steps 1, 2 are kept.*Lower lr",
    ):
        train(tmp_path, **(SHORT | {"max_steps": 4, "lr": 1e30}))
    assert checkpoint.latest(tmp_path / "demo/checkpoints") == tmp_path / "demo/checkpoints/step-000002"
    run = train(tmp_path, **(SHORT | {"max_steps": 4}))
    assert [record["step"] for record in records_of(run.folder, "step")] == [1, 2, 3, 4]
    assert max(losses(run.folder)) < 10


def configured(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "config", "from_step": step, "config": {"optimizer": {"lr": 1.0} | values}}


def test_a_configuration_that_no_step_was_taken_with_is_left_out() -> None:
    records = [
        configured(1, lr=0.1),
        configured(1, lr=0.5),
        *({"kind": "step", "step": n} for n in (1, 2)),
        configured(3, lr=0.2),
        configured(3, lr=0.3),
        {"kind": "step", "step": 3},
        configured(4, lr=9.0),
    ]
    spans = history.spans(records)
    assert [(span["steps"], span["changed"]) for span in spans] == [
        ([1, 2], {}),
        ([3, 3], {"lr": [0.5, 0.3]}),
    ]
    text = card.model_card(records, make_config(Path("runs")), card.Weights(3))
    assert "| 1 to 2 | lr 0.5 |\n| 3 to 3 | lr 0.3 (was 0.5) |\n" in text


def complete_checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    return path


def test_checkpoints_are_ordered_as_numbers_and_incomplete_ones_count_for_nothing(tmp_path: Path) -> None:
    paths = [complete_checkpoint(tmp_path / f"step-{step:06d}") for step in (2, 999_999, 1_000_000)]
    (tmp_path / "step-2000000").mkdir()
    complete_checkpoint(tmp_path / "step-000003.bak")
    assert checkpoint.complete(tmp_path) == paths
    assert checkpoint.latest(tmp_path) == paths[-1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        OSError(24, "Too many open files"),
        PermissionError(13, "Permission denied"),
    ],
)
def test_a_machine_that_cannot_read_a_checkpoint_does_not_call_it_damaged(
    tmp_path: Path, error: OSError
) -> None:
    with (
        pytest.raises(UserError, match=r"could not be read .*check this machine") as caught,
        checkpoint._explained(tmp_path),
    ):
        raise error
    assert "elete" not in str(caught.value)


def test_out_of_memory_while_a_checkpoint_is_read_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError), checkpoint._explained(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory.")
