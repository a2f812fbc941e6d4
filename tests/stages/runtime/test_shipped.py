"""The demo and the recipes by name, in a checkout and in a wheel."""

from pathlib import Path

import pytest

from stages.runtime import shipped
from stages.runtime.config import Config, parse_arguments
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT


def parse(*arguments: str) -> Config:
    return parse_arguments(list(arguments), "")


def test_the_demo_and_the_recipes_have_names() -> None:
    assert parse("demo") == parse("--config", "pipeline.yaml")
    assert parse("qwen3-4b") == parse("recipes/qwen3-4b.yaml")
    assert "accelerate_2gpu" not in shipped.configurations()


def test_a_file_here_comes_before_one_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline.yaml").write_text("tau: 0.75\n")
    assert parse("pipeline.yaml").loss.tau == 0.75
    assert parse("demo").loss.tau == 0.1


def test_the_demo_finds_its_models_and_data_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse("demo").models.student_model == STUDENT
    monkeypatch.chdir(tmp_path)
    config = parse("demo")
    assert config.models.student_model == str(ROOT / STUDENT)
    assert config.data.dataset == str(ROOT / "examples/arithmetic/train.jsonl")
    assert config.eval.answer_checker == f"{ROOT / 'examples/word_problems.py'}:check"
    (tmp_path / "own.yaml").write_text(f"student_model: {STUDENT}\n")
    assert parse("own.yaml").models.student_model == STUDENT


def test_a_file_that_is_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"none\.yaml does not exist \(looked in {tmp_path}\); .* demo, qwen"
    ):
        parse("none.yaml")


def test_a_data_file_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 + 1?"}\n')
    with pytest.raises(UserError, match=r"holds data, .* give it as --dataset"):
        shipped.found_file(str(path))


@pytest.mark.parametrize(
    ("name", "proposed"), [("mine.yml", "mine.yaml"), ("qwen3-4", "qwen3-4b"), ("sub/own.yaml", "owned.yaml")]
)
def test_a_mistyped_configuration_names_near_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, proposed: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "mine.yaml", tmp_path / "sub" / "owned.yaml"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(UserError, match=rf"{name} does not exist .* did you mean {proposed}"):
        shipped.found_file(name)
