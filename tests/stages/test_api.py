"""`stages.distill`: both stages from Python, with rows and functions of the caller."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import stages
from stages import distill
from stages.api import _model
from stages.data.checkers import GIVEN, keep_checker, load_checker
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT, TEACHER, Forker, records_of, run_python

ROWS = [json.loads(line) for line in (ROOT / "examples/arithmetic/train.jsonl").open()][:48]
SIZES: dict[str, Any] = {"batch_size": 8, "eval_prompts": 4, "max_new_tokens": 16, "refresh_every": 1}
SIZES |= {"device": "cpu", "gen_micro_batch": 8, "signal_k": 16}


def check(row: dict[str, Any], completion: str) -> bool:
    return str(row["answer"]) in completion


def call(folder: Path, rows: Any = ROWS, **values: Any) -> Any:
    keys = SIZES | {"runs_dir": str(folder), "max_steps": 2, "answer_checker": check} | values
    return distill(STUDENT, TEACHER, rows, **keys)


def _call_and_tell(folder: Path) -> None:
    """In a process of its own: a run, the same again, and what was seen."""
    told: dict[str, Any] = {"steps": [], "refreshes": [], "ends": []}
    listeners: dict[str, Any] = {
        "on_step": lambda record: told["steps"].append(record),
        "on_refresh": lambda record: told["refreshes"].append(record),
        "on_end": lambda run: told["ends"].append(str(run.student_path)),
    }
    run = call(folder, **listeners)
    told |= {"report": run.report, "student": str(run.student_path), "rows": len(run.cache)}
    told["again"] = call(folder, (row for row in ROWS), **listeners).report["verdict"]
    told["grouped"] = torch.distributed.is_initialized()
    if run.config.run.run_name == "student":
        (folder / f"told-{torch.distributed.get_rank() if told['grouped'] else 0}.json").write_text(
            json.dumps(told)
        )


@pytest.fixture(scope="module")
def told(forked: Forker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distilled")
    forked.call(_call_and_tell, folder).expect_success()
    return folder / "student", json.loads((folder / "told-0.json").read_text())


def test_a_run_is_returned(told: tuple[Path, dict[str, Any]]) -> None:
    folder, found = told
    assert found["student"] == str(folder / "student")
    assert (folder / "student" / "adapter_model.safetensors").exists()
    assert found["rows"] == 16
    kept = json.loads((folder / "report.json").read_text())  # the second call's, which counts the first's end
    assert found["report"] | {"seconds": kept["seconds"]} == kept
    assert found["report"]["before"]["accuracy"] is not None
    assert not found["grouped"]


def test_listeners_see_what_is_recorded(told: tuple[Path, dict[str, Any]]) -> None:
    folder, found = told
    assert found["steps"] == records_of(folder, "step")
    assert found["refreshes"] == records_of(folder, "refresh")
    assert found["ends"] == [str(folder / "student")] * 2


def test_the_same_call_sees_the_finished_run(told: tuple[Path, dict[str, Any]]) -> None:
    folder, found = told
    assert found["again"] == found["report"]["verdict"]
    assert len(records_of(folder, "step")) == 2
    assert len(records_of(folder, "export")) == 1


def test_the_record_names_rows_and_checker(told: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = told
    (record,) = records_of(folder, "config")
    dataset = Path(record["config"]["data"]["dataset"])
    assert [json.loads(line) for line in dataset.read_text().splitlines()] == ROWS
    assert record["config"]["eval"]["answer_checker"].startswith(f"{GIVEN}{check.__module__}.check:")


def test_other_rows_and_other_keys_are_refused(told: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = told
    with pytest.raises(UserError, match="was begun with other rows as dataset"):
        call(folder.parent, ROWS[:-1])
    with pytest.raises(UserError, match="is finished: it was trained to step 2 with lr"):
        call(folder.parent, lr=0.5)
    assert len(records_of(folder, "step")) == 2


def test_a_command_cannot_load_a_function_of_another_process(forked: Forker, told: tuple[Path, Any]) -> None:
    folder, _ = told
    done = forked.stage("stages.evaluate", "--config", str(folder / "config.yaml"))
    done.expect_sentence(f"answer_checker {GIVEN}", "was given to distill as a function")


@pytest.mark.thorough
def test_two_processes_distil_together(forked: Forker, tmp_path: Path) -> None:
    forked.call(_call_and_tell, tmp_path, processes=2).expect_success()
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first["report"] == second["report"]
    assert len(first["steps"]) == 2
    assert second["steps"] == second["ends"] == []


def _call_with_rows_of_the_rank(folder: Path) -> None:
    try:
        call(folder, ROWS[int(os.environ["RANK"]) :])
    except UserError as error:
        print(f"refused: {error}")


def test_processes_with_different_rows_are_refused(forked: Forker, tmp_path: Path) -> None:
    done = forked.call(_call_with_rows_of_the_rank, tmp_path, processes=2).expect_success()
    assert done.out.count("refused: process 1 was given ") == 2
    assert "call distill with the same arguments and rows in every process" in done.out


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"learning_rate": 1e-4}, "unknown key learning_rate in the call of distill; did you mean lr?"),
        ({"max_steps": "many"}, "max_steps"),
        ({"rows": []}, "dataset holds no rows"),
        ({"rows": "nowhere.jsonl"}, "dataset nowhere.jsonl does not exist"),
        ({"answer_checker": lambda row: True}, "cannot be called with a row and a completion"),
        ({"on_step": 3}, "on_step is 3; expected a function"),
        ({"run_name": "my run"}, "config key run.run_name"),
        ({"max_prompt_tokens": 2}, "gave no prompts"),
        (
            {"rows": [{"prompt": f"{i}"} for i in range(9)] + [{"text": "b"}], "allow_skipped": 0},
            "such as dataset[9]; that is more",
        ),
        ({"rows": "What is 3 + 4? " * 50}, "is not a name (File name too long); expected a file, a folder"),
    ],
    ids=["key", "value", "rows", "file", "checker", "listener", "name", "prompts", "row", "text"],
)
def test_wrong_arguments_are_one_sentence(tmp_path: Path, values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        call(tmp_path, **values)
    assert part in str(caught.value)
    assert not any(tmp_path.iterdir())


def _stopped(folder: Path, number: int) -> None:
    before = signal.getsignal(number)
    try:
        call(folder, max_steps=3, on_step=lambda record: os.kill(os.getpid(), number))
    except (KeyboardInterrupt, SystemExit) as error:
        print(f"ended by {type(error).__name__}: {error}")
    assert signal.getsignal(number) is before
    print(call(folder, max_steps=3).report["verdict"])


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGINT, "KeyboardInterrupt: stopped by"), (signal.SIGTERM, "SystemExit: 143")]
)
def test_a_signal_ends_it_after_the_step_and_the_same_call_goes_on(
    forked: Forker, tmp_path: Path, number: int, how: str
) -> None:
    done = forked.call(_stopped, tmp_path, number).expect_success()
    assert f"ended by {how}" in done.out
    assert "stopped by" in done.out + done.err
    assert "resuming from" in done.out
    assert [record["step"] for record in records_of(tmp_path / "student", "step")] == [1, 2, 3]


def test_a_loaded_model_is_one_sentence(tmp_path: Path, student_model: Any) -> None:
    with pytest.raises(
        UserError, match="student_model is of type Qwen3ForCausalLM; give the folder or the name"
    ):
        distill(student_model, TEACHER, ROWS, runs_dir=str(tmp_path))


def test_a_loaded_tokenizer_names_its_model_and_replaces_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    assert _model("student_model", tokenizer, tmp_path) == STUDENT
    tokenizer.chat_template = "{{ messages[0].content }}"
    folder = Path(_model("student_model", tokenizer, tmp_path))
    assert folder.parent == tmp_path / "models"
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


def test_a_function_is_named_by_its_place_and_source() -> None:
    spec = keep_checker(check)
    assert load_checker(spec) is check
    assert spec == keep_checker(check)
    assert spec != keep_checker(lambda row, completion: True)
    with pytest.raises(UserError, match="which a command cannot load"):
        load_checker(f"{GIVEN}other.check")


def test_importing_stages_loads_nothing_heavy() -> None:
    code = (
        "import sys, stages; print(sorted({'torch', 'transformers', 'cache'} & {*sys.modules}), dir(stages))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] [")
    assert "'distill'" in done.stdout


def test_stages_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="module 'stages' has no attribute 'nothing'"):
        stages.nothing  # noqa: B018


def test_the_loop_of_ones_own_lowers_the_loss(tmp_path: Path) -> None:
    path = ROOT / "examples/own_loop.py"
    assert len(path.read_text().splitlines()) <= 60
    done = run_python(str(path), str(tmp_path / "cache"), PYTHONPATH=str(ROOT)).expect_success()
    losses = [float(line.split()[2]) for line in done.out.splitlines() if line.startswith("step ")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 2
