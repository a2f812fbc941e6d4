"""What is found of models and data before a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.loops.survey import MOST_READ, findings, survey
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT, make_config


def lines_of(folder: Path, rows: list[Any] | None = None, **values: Any) -> dict[str, str]:
    if rows is not None:
        values["dataset"] = folder / "data.jsonl"
        values["dataset"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(folder, **values)
    found = findings(config, survey(config))
    return {word: rest.strip() for word, _, rest in (line.partition(" ") for line in found)}


def test_models_ends_and_lengths_are_named(tmp_path: Path) -> None:
    found = lines_of(tmp_path)
    assert found["student"] == f"{STUDENT} (qwen3, 770,592 parameters, 4 layers)"
    assert found["tokens"].startswith("230 ids are the same in both")
    assert found["ends"] == "'<|end|>' (id 1)"
    assert found["data"] == f"3,000 records, {MOST_READ:,} of them read: {MOST_READ:,} prompts"
    assert found["lengths"].startswith("prompts p50 29, p95 ")
    assert "; answers p50 " in found["lengths"]


def test_skipped_records_have_reasons(tmp_path: Path) -> None:
    found = lines_of(tmp_path, [{"prompt": "How many pens?"}, {"messages": []}, {"text": "a"}])
    assert found["data"].startswith("3 records: 1 prompt (2 of 3 records skipped: ")
    assert "1 with an empty prompt" in found["data"]
    assert "1 without a column that holds a prompt" in found["data"]


def test_long_prompts_are_counted_not_skipped(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_prompt_tokens=1)
    data = survey(config).data
    assert data.num_usable == int(3000 * 0.95)
    assert 0 < data.longer_than(29) < 1


@pytest.mark.parametrize(("answer", "checker"), [("4 + 3 = 7\n#### 7", "gsm8k"), ("7", ""), (7, "")])
def test_a_checker_is_found_by_the_form_of_the_answers(tmp_path: Path, answer: Any, checker: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "How many pens?", "answer": answer}) + "\n")
    assert survey(make_config(tmp_path, dataset=path)).data.checker == checker


def test_a_base_model_is_named_as_one(tmp_path: Path) -> None:
    base = shutil.copytree(ROOT / STUDENT, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    found = lines_of(tmp_path, student_model=base)
    assert found["prompts"] == "plain text, no chat template"
    assert found["note"].startswith("the student is a base model without a chat template")


def test_templates_that_differ_are_told(tmp_path: Path) -> None:
    other = shutil.copytree(ROOT / STUDENT, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}<|end|>")
    assert "templates differ" in lines_of(tmp_path, student_model=other)["note"]


def test_a_model_without_weights_is_one_sentence(tmp_path: Path) -> None:
    other = shutil.copytree(ROOT / STUDENT, tmp_path / "other")
    (other / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"student_model .* has no weights"):
        survey(make_config(tmp_path, student_model=other))
