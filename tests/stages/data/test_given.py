"""Rows and tokenizers given as Python objects become files named by their content."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from stages.data.given import is_name, keep_rows, keep_tokenizer, named_as_given
from stages.models import pretrained
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT

ROWS = [{"question": "How many pens?", "answer": 4}, {"question": "How many cups?", "answer": 5}]


def kept(folder: Path, value: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(keep_rows(folder, "dataset", value)).read_text().splitlines()]


@pytest.mark.parametrize(
    "value",
    [ROWS, tuple(ROWS), iter(ROWS), (row for row in ROWS), datasets.Dataset.from_list(ROWS)],
    ids=["list", "tuple", "iterator", "generator", "Dataset"],
)
def test_rows_of_any_kind_become_the_same_file(tmp_path: Path, value: Any) -> None:
    path = keep_rows(tmp_path, "dataset", value)
    assert path == keep_rows(tmp_path / "other", "dataset", ROWS).replace("/other", "")
    assert [json.loads(line) for line in Path(path).read_text().splitlines()] == ROWS


def test_prompts_and_turns_become_records(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "How many?"}]
    assert kept(tmp_path, ["How many?", turns]) == [{"prompt": "How many?"}, {"messages": turns}]


def test_prompts_of_any_length_are_rows(tmp_path: Path) -> None:
    prompts = ["How many pens does she have? " * 200, "a" * 300, "line\nline", "a\0b"]
    assert [row["prompt"] for row in kept(tmp_path, prompts)] == prompts


def test_errors_about_kept_rows_name_the_argument(tmp_path: Path) -> None:
    path = keep_rows(tmp_path, "eval_dataset", ROWS)
    with (
        pytest.raises(UserError) as caught,
        named_as_given(dataset="own.jsonl", eval_dataset=path),
    ):
        raise UserError(f"dataset {path} gave no prompts (2 skipped, such as record 2); see {path}.")
    assert str(caught.value) == (
        "the argument eval_dataset gave no prompts (2 skipped, such as eval_dataset[1]); see the argument"
        " eval_dataset."
    )
    with (
        pytest.raises(UserError, match=r"^dataset own\.jsonl has no record 3\.$"),
        named_as_given(dataset="own.jsonl"),
    ):
        raise UserError("dataset own.jsonl has no record 3.")


def test_numpy_values_become_numbers(tmp_path: Path) -> None:
    row = {"prompt": "a", "number": np.int64(3), "list": np.arange(2)}
    assert kept(tmp_path, [row]) == [{"prompt": "a", "number": 3, "list": [0, 1]}]


def test_nulls_that_arrow_adds_are_dropped(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a", "extra": {"x": 1}}]}]
    rows += [{"messages": [{"role": "user", "content": "b", "extra": {"y": 2}}]}]
    assert kept(tmp_path, datasets.Dataset.from_list(rows)) == rows


def test_no_partial_file_is_left(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        keep_rows(tmp_path, "dataset", [{"a": 1}, 7])
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([], "holds no rows"),
        (7, "of type int; expected a name or a path"),
        ({"prompt": ["a"]}, "of type dict; expected a name or a path"),
        ([{"prompt": "a"}, 7], "dataset[1] is of type int"),
        ([{"prompt": object()}], "dataset[0] cannot be written as JSON (a value of type object)"),
        (["examples/arithmetic/train.jsonl"], "lists the file examples/arithmetic/train.jsonl"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "has the splits train; give one"),
    ],
)
def test_other_values_are_one_sentence(tmp_path: Path, value: Any, part: str) -> None:
    with pytest.raises(UserError) as caught:
        keep_rows(tmp_path, "dataset", value)
    assert part in str(caught.value)


def test_images_in_a_data_set_are_one_sentence(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"prompt": ["a"], "image": [{"bytes": b"x", "path": None}]})
    with pytest.raises(UserError, match=r"dataset\[0\] is a record with image"):
        keep_rows(tmp_path, "dataset", data)


def test_a_run_goes_on_with_its_own_rows_only(tmp_path: Path) -> None:
    keep_rows(tmp_path, "dataset", ROWS[:1])  # nothing is made from them
    path = keep_rows(tmp_path, "dataset", ROWS)
    (tmp_path / "config.yaml").write_text(f"data:\n  dataset: {path}\n")
    assert keep_rows(tmp_path, "dataset", ROWS) == path
    assert keep_rows(tmp_path, "eval_dataset", ROWS[:1])
    with pytest.raises(UserError, match="was begun with other rows as dataset") as caught:
        keep_rows(tmp_path, "dataset", ROWS[:1])
    assert Path(path).name in str(caught.value)


def test_names_are_told_from_rows() -> None:
    assert all(is_name(value) for value in ("a.jsonl", Path("a.jsonl"), {"a.jsonl": 3, "b.jsonl": 0.5}))
    assert not any(is_name(value) for value in (["a"], {}, {"prompt": "a"}, datasets.DatasetDict()))


def test_a_tokenizer_replaces_that_of_its_model(tmp_path: Path) -> None:
    tokenizer = pretrained.load_tokenizer(STUDENT)
    tokenizer.chat_template = "{{ messages[0].content }}"
    path = keep_tokenizer(tmp_path, "student_model", tokenizer, ROOT / STUDENT)
    assert keep_tokenizer(tmp_path, "student_model", tokenizer, ROOT / STUDENT) == path
    assert [found.name for found in (tmp_path / "models").iterdir()] == [Path(path).name]
    assert pretrained.load_tokenizer(path).chat_template == tokenizer.chat_template
    assert pretrained.load_tokenizer(path).get_vocab() == tokenizer.get_vocab()
    assert pretrained.identity(path) == pretrained.identity(STUDENT)
    tokenizer.chat_template = "another"
    assert keep_tokenizer(tmp_path, "student_model", tokenizer, ROOT / STUDENT) != path
