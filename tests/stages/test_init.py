"""`stages.init`: what it prints and writes, that the pipeline takes its file, and wrong input."""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import init
from stages.runtime import config as configuration
from stages.runtime.config import Config
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT, TEACHER, Forker, flags, records_of

TEXTS = [f"Mia has {n} pens and buys {m} more. How many pens?" for n in range(2, 10) for m in range(2, 9)]
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"prompt": text} for text in TEXTS],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "The answer is 4."},
            ]
        }
        for text in TEXTS
    ],
    "question": [{"question": text, "answer": f"{text}\n#### 4"} for text in TEXTS],
}


def data_file(folder: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(folder: Path, path: Path, **values: Any) -> list[str]:
    named = {"student": STUDENT, "teacher": TEACHER, "data": path, "out": folder / "new.yaml"}
    return flags(**(named | {"runs_dir": folder / "runs", "device": "cpu"} | values))


def made(monkeypatch: pytest.MonkeyPatch, folder: Path, path: Path, **values: Any) -> tuple[str, Config]:
    """The text of the file that init writes, and the configuration in it."""
    monkeypatch.setattr(sys, "argv", ["init", *command(folder, path, **values)])
    init.main()
    file = folder / "new.yaml"
    return file.read_text(), configuration.parse_arguments(["--config", str(file)], "")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_short_commented_file_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str, suffix: str
) -> None:
    text, config = made(monkeypatch, tmp_path, data_file(tmp_path, LAYOUTS[layout], suffix))
    assert len(text.splitlines()) <= 20
    assert text.count("#") >= 6
    assert all(len(line) <= 160 for line in text.splitlines())
    assert (config.models.student_model, config.models.teacher_model) == (STUDENT, TEACHER)
    assert config.data.num_prompts + config.eval.eval_prompts == len(TEXTS)
    assert config.eval.answer_checker == ("gsm8k" if layout == "question" else "")
    assert config.run.dtype == "fp32"
    assert not config.models.teacher_ds_zero3


def test_a_csv_and_a_base_model_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(ROOT / STUDENT, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    path = data_file(tmp_path, LAYOUTS["prompt"], ".csv")
    _, config = made(monkeypatch, tmp_path, path, student=base)
    assert config.run.run_name == "base"
    assert "base model without a chat template" in capsys.readouterr().out


def test_the_result_alone_is_printed_on_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = data_file(tmp_path, LAYOUTS["question"]), tmp_path / "new.yaml"
    monkeypatch.setattr(sys, "argv", ["init", *command(tmp_path, path), "--json"])
    init.main()
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["file"] == str(file)
    assert facts["run"] == f"dualkl run {file}"
    assert facts["configuration"]["answer_checker"] == "gsm8k"
    assert "answers   checked by gsm8k" in facts["found"]
    assert all(line in err.splitlines() for line in facts["found"])
    file.unlink()
    monkeypatch.setattr(sys, "argv", ["init", *command(tmp_path, path), "--quiet"])
    init.main()
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["wrote", "check", "next"]
    assert err == ""


def test_models_and_data_may_be_named_by_their_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = {
        "student_model": STUDENT,
        "teacher_model": TEACHER,
        "dataset": data_file(tmp_path, LAYOUTS["prompt"]),
    }
    monkeypatch.setattr(sys, "argv", ["init", *flags(**named, out=tmp_path / "new.yaml", device="cpu")])
    init.main()
    config = configuration.parse_arguments([str(tmp_path / "new.yaml")], "")
    assert config.data.dataset == str(named["dataset"])


def test_answers_that_will_be_cut_are_remarked_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data_file(tmp_path, LAYOUTS["question"])
    made(monkeypatch, tmp_path, path, max_new_tokens=4)
    assert "100% of the data's answers are longer than max_new_tokens 4;" in capsys.readouterr().out
    (tmp_path / "new.yaml").unlink()
    made(monkeypatch, tmp_path, path)
    assert "are longer than max_new_tokens" not in capsys.readouterr().out


def test_given_keys_are_kept_and_the_others_fit_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = data_file(tmp_path, LAYOUTS["prompt"])
    text, config = made(monkeypatch, tmp_path, path, max_steps=5, lr="3e-5", tau=0.5, eval_prompts=0)
    assert (config.train.max_steps, config.train.lr, config.loss.tau) == (5, 3e-5, 0.5)
    assert config.eval.eval_prompts == 0
    assert config.data.num_prompts == len(TEXTS)
    assert "loss: {tau: 0.5, alpha: 5.0, gating: soft}" in text.splitlines()


def test_without_keys_of_the_gate_the_mix_is_constant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text, config = made(monkeypatch, tmp_path, data_file(tmp_path, LAYOUTS["prompt"]))
    assert config.loss.gating == 0.5
    assert "loss: {gating: 0.5}" in text.splitlines()


def test_the_plan_of_other_gpus_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data_file(tmp_path, LAYOUTS["prompt"])
    _, config = made(monkeypatch, tmp_path, path, gpus=2, gpu_memory=80, device="auto")
    printed = capsys.readouterr().out
    assert "It fits: 2 × " in printed
    assert "torchrun --nproc_per_node 2 -m stages.pipeline " in printed
    assert config.run.dtype == "bf16"
    assert not config.train.gradient_checkpointing


def test_a_name_that_a_run_has_gets_a_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runs" / "student").mkdir(parents=True)
    _, config = made(monkeypatch, tmp_path, data_file(tmp_path, LAYOUTS["prompt"]))
    assert config.run.run_name == "student-2"


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"student": ""}, "init needs --student: dualkl init --student MODEL"),
        ({"student": "nowhere/x"}, "nothing here has that path, and a hub name needs a network"),
        ({"student": "pipeline.yaml"}, "is a file; give the folder of a model"),
        ({"data": "nowhere.jsonl"}, "dataset nowhere.jsonl does not exist"),
        ({"data": "stages"}, "a folder without data files"),
        ({"eval_dataset": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"eval_prompts": 9999}, "eval_prompts 9,999 leaves no prompt to train on"),
        ({"config": "pipeline.yaml"}, "init writes a configuration and reads none"),
        ({"gpus": 2, "device": "auto"}, "no GPU here to plan for: give --gpu_memory"),
        ({"gpus": -1}, "--gpus: expected a whole number above 0, got -1"),
        ({"gpus": "two"}, "--gpus: expected a whole number, got two"),
        ({"out": "pipeline.yaml"}, "pipeline.yaml exists and is not overwritten"),
        ({"out": "no/folder/a.yaml"}, "the folder no/folder does not exist"),
        ({"learning_rat": 1}, "unknown key learning_rat"),
        ({"max_steps": "many"}, "max_steps"),
        ({"answer_checker": "GSM8K"}, "answer_checker GSM8K: expected gsm8k or path/to/file.py:function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_one_sentence_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any], part: str
) -> None:
    with pytest.raises(UserError) as caught:
        made(monkeypatch, tmp_path, ROOT / "examples/arithmetic/train.jsonl", **values)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new.yaml").exists()


def test_the_pipeline_takes_the_file(forked: Forker, tmp_path: Path) -> None:
    path = data_file(tmp_path, LAYOUTS["messages"])
    small = {"max_steps": 2, "batch_size": 8, "eval_prompts": 4, "max_new_tokens": 16}
    forked.stage("stages.init", *command(tmp_path, path, **small)).expect_success()
    done = forked.stage("stages.pipeline", "--config", str(tmp_path / "new.yaml")).expect_success()
    assert (tmp_path / "runs/student/student/adapter_model.safetensors").exists()
    assert [record["step"] for record in records_of(tmp_path / "runs/student", "step")] == [1, 2]
    assert "on 4 held-out prompts" in done.out


def test_the_pipeline_does_without_evaluation(forked: Forker, tmp_path: Path) -> None:
    path = data_file(tmp_path, LAYOUTS["prompt"])
    small = {"max_steps": 1, "batch_size": 8, "eval_prompts": 0, "max_new_tokens": 8}
    forked.stage("stages.init", *command(tmp_path, path, **small)).expect_success()
    done = forked.stage("stages.pipeline", "--config", str(tmp_path / "new.yaml")).expect_success()
    assert not (tmp_path / "runs/student/eval").exists()
    assert "Finished: 1 of 1 steps, and nothing measured after them." in done.out
