"""What model folders tell without their weights being read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from stages.models import folders
from stages.runtime.config import parse_arguments
from stages.runtime.errors import UserError
from tests.helpers import ROOT, STUDENT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / STUDENT, tmp_path / "model"))


def check(folder: Path) -> None:
    folders.open_config("teacher_model", str(folder), "main")
    folders.check_weights("teacher_model", str(folder))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        check(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("teacher_model", *parts):
        assert part in message, message


def test_a_whole_folder_is_accepted(model: Path) -> None:
    check(model)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: write(f, "adapter_config.json", {"base_model_name_or_path": "some/base"}), ("LoRA adapter", "some/base")),
        (lambda f: write(f, "model-q4.gguf", ""), ("no config.json", "GGUF")),
        (lambda f: shutil.copytree(ROOT / STUDENT, f / "step-10"), ("did you mean", "step-10")),
        (lambda f: None, ("no config.json", "tokenizer.json")),
    ],
)  # fmt: skip
def test_a_folder_without_config_says_what_it_is(model: Path, change: Callable[[Path], Any], parts: Any) -> None:
    (model / "config.json").unlink()
    change(model)
    refused(model, *parts)


def test_a_folder_without_tokenizer_is_refused(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(model, "has no tokenizer")


@pytest.mark.parametrize(
    ("kind", "part"), [("t5", "encoder-decoder"), ("bart", "encoder-decoder"), ("vit", "causal language model")]
)
def test_what_is_no_decoder_is_refused(tmp_path: Path, kind: str, part: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    refused(tmp_path, kind, part)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    names = {"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors"}
    write(folder, "model.safetensors.index.json", {"weight_map": names | {"c": "model-00003-of-00003.safetensors"}})


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: (f / "model.safetensors").unlink(), ("no weights", "model.safetensors")),
        (lambda f: cut(f / "model.safetensors"), ("bytes, its header says", "download")),
        (lambda f: write(f, "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0"), ("Git LFS",)),
        (lambda f: write(f, "model.safetensors", "<html>"), ("no safetensors header",)),
        (sharded, ("lacks 2 of the 3 files", "model-00002-of-00003.safetensors")),
    ],
)  # fmt: skip
def test_weights_that_are_not_all_there_are_refused(model: Path, change: Callable[[Path], Any], parts: Any) -> None:
    change(model)
    refused(model, *parts)


def adapter(folder: Path, width: int = 224, **values: Any) -> list[str]:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": STUDENT}
    write(folder, "adapter_config.json", settings | values)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, width)}, folder / "adapter_model.safetensors")
    flags = ["--student_adapter", str(folder), "--student_model", STUDENT, "--lora_r", "4"]
    return folders.check_adapter(parse_arguments(flags, ""), AutoConfig.from_pretrained(STUDENT))


def test_an_adapter_of_the_student_is_accepted(tmp_path: Path) -> None:
    assert adapter(tmp_path / "adapter") == []


def test_another_rank_and_another_base_are_said(tmp_path: Path) -> None:
    base, rank = adapter(tmp_path / "adapter", r=16, base_model_name_or_path="some/other")
    assert "was trained on some/other" in base
    assert "has rank 16, which is kept; lora_r 4" in rank


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"width": 96}, "width 96"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "saves whole modules"),
        ({"target_modules": ["lm_head"]}, "adapts the lm_head"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        adapter(tmp_path / "adapter", **values)
