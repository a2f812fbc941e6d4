"""What model folders tell without their weights being read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models import folders, pretrained
from stages.runtime.config import parse_arguments
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT, STUDENT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / STUDENT, tmp_path / "model"))


def check(folder: Path) -> None:
    folders.open_config("teacher_model", str(folder))
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
        (
            lambda f: write(f, "adapter_config.json", {"base_model_name_or_path": "some/base"}),
            ("LoRA adapter", "some/base"),
        ),
        (lambda f: write(f, "model-q4.gguf", ""), ("no config.json", "GGUF")),
        (lambda f: shutil.copytree(ROOT / STUDENT, f / "step-10"), ("did you mean", "step-10")),
        (lambda f: None, ("no config.json", "tokenizer.json")),
    ],
)
def test_a_folder_without_config_says_what_it_is(
    model: Path, change: Callable[[Path], Any], parts: Any
) -> None:
    (model / "config.json").unlink()
    change(model)
    refused(model, *parts)


def test_a_folder_without_tokenizer_is_refused(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(model, "has no tokenizer")


@pytest.mark.parametrize(
    ("kind", "part"),
    [("t5", "encoder-decoder"), ("bart", "encoder-decoder"), ("vit", "causal language model")],
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
    write(
        folder,
        "model.safetensors.index.json",
        {"weight_map": names | {"c": "model-00003-of-00003.safetensors"}},
    )


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: (f / "model.safetensors").unlink(), ("no weights", "model.safetensors")),
        (lambda f: cut(f / "model.safetensors"), ("bytes, its header says", "download")),
        (
            lambda f: write(
                f, "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0"
            ),
            ("Git LFS",),
        ),
        (lambda f: write(f, "model.safetensors", "<html>"), ("no safetensors header",)),
        (sharded, ("lacks 2 of the 3 files", "model-00002-of-00003.safetensors")),
        (lambda f: os.mkfifo(f / "more.bin"), ("more.bin is not a regular file",)),
    ],
)
def test_weights_that_are_not_all_there_are_refused(
    model: Path, change: Callable[[Path], Any], parts: Any
) -> None:
    change(model)
    refused(model, *parts)


def load(folder: Path) -> Any:
    """The model without its weights, as the checks before a run see it."""
    return pretrained.load_model(str(folder), torch.float32, "sdpa", reads_weights=False)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    write(folder, "config.json", json.loads((folder / "config.json").read_text()) | values)


def layers(number: int) -> dict[str, Any]:
    return {"num_hidden_layers": number, "layer_types": ["full_attention"] * number}


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: rewrite(f, lambda t: t.pop(NORM)), ("lacks 1 of the tensors", NORM, "random numbers")),
        (lambda f: configure(f, **layers(9)), ("lacks", "model.layers.")),
        (
            lambda f: rewrite(f, lambda t: [t.update({f"module.{key}": t.pop(key)}) for key in list(t)]),
            ("lacks",),
        ),
        (
            lambda f: configure(f, intermediate_size=32),
            ("has shape", "config.json makes it", "mlp.down_proj"),
        ),
        (lambda f: configure(f, vocab_size=999), ("has shape", "(999, ")),
        (lambda f: configure(f, num_attention_heads="four"), ("cannot be loaded", "num_attention_heads")),
        (
            lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4}),
            ("cannot be loaded",),
        ),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ("cannot be loaded",)),
    ],
)
def test_weights_that_do_not_belong_to_the_config_are_refused_unread(
    model: Path, change: Callable[[Path], Any], parts: Any
) -> None:
    change(model)
    with pytest.raises(UserError) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    for part in (str(model), *parts):
        assert part in str(caught.value), caught.value


def test_the_identity_of_a_folder_does_not_wait_for_a_pipe(model: Path) -> None:
    before = pretrained.identity(str(model))
    os.mkfifo(model / "more.bin")
    assert pretrained.identity(str(model)) == before


def test_code_of_a_model_is_neither_run_nor_asked_about(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    write(model, "evil.py", f"open({str(model / 'ran')!r}, 'w')")
    config = json.loads((model / "config.json").read_text())
    auto_map = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    write(model, "config.json", config | auto_map)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    write(model, "tokenizer_config.json", tokenizer | {"auto_map": {"AutoTokenizer": ["evil.T", None]}})
    load(model)
    pretrained.load_tokenizer(str(model))
    write(model, "config.json", config | auto_map | {"model_type": "evil"})
    with pytest.raises(UserError, match="needs Python code of its own, which is never run"):
        check(model)
    assert not (model / "ran").exists()


class Program:
    """What a pickle calls when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a program in a file of weights was run",))


def test_a_bin_file_of_more_than_tensors_is_refused_without_advice_to_load_it(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    load(model)
    torch.save(tensors | {"more": Program()}, model / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"holds more than tensors; only safetensors and plain weights are loaded\)$"
    ):
        load(model)


def test_weights_that_the_model_has_no_place_for_are_said(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(model, **layers(1))
    load(model)
    assert "unused tensors (not part of the architecture" in capsys.readouterr().out


def test_a_package_that_an_attention_needs_is_named(model: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded.*FlashAttention2"):
        pretrained.load_model(str(model), torch.bfloat16, "flash_attention_2", reads_weights=False)


def adapter(folder: Path, base: Any = STUDENT, **values: Any) -> Any:
    """The configuration that starts from a new adapter of `base`; `values` change its adapter_config.json."""
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings)).save_pretrained(folder)
    write(folder, "adapter_config.json", json.loads((folder / "adapter_config.json").read_text()) | values)
    return parse_arguments(
        ["--student_adapter", str(folder), "--student_model", STUDENT, "--lora_r", "4"], ""
    )


def resized(folder: Path, **values: Any) -> str:
    config = AutoConfig.from_pretrained(STUDENT)
    config.update(values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_an_adapter_of_the_student_is_accepted(tmp_path: Path) -> None:
    config = adapter(tmp_path / "adapter")
    assert folders.check_adapter(config) == []
    folders.check_student(config, load(ROOT / STUDENT))


def test_another_rank_and_another_base_are_said(tmp_path: Path) -> None:
    config = adapter(tmp_path / "adapter", r=16, base_model_name_or_path="some/other")
    base, rank = folders.check_adapter(config)
    assert "was trained on some/other" in base
    assert "has rank 16, which is kept; lora_r 4" in rank


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "has modules_to_save"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
        ({"target_modules": ["lm_head"]}, "adapts the lm_head"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        folders.check_adapter(adapter(tmp_path / "adapter", **values))


def test_an_adapter_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    config = adapter(tmp_path / "adapter")
    write(tmp_path / "adapter", "adapter_config.json", "{nope")
    with pytest.raises(UserError, match="is not a JSON object"):
        folders.check_adapter(config)


@pytest.mark.parametrize(
    ("base", "values", "part"),
    [
        (layers(9), {}, "has, with no place on it,"),
        (layers(1), {}, "lacks"),
        ({"hidden_size": 448}, {}, r"has shape \(448, 4\), on the student it is \(224, 4\)"),
        ({"intermediate_size": 32}, {}, "down_proj.lora_A.weight has shape"),
        ({}, {"target_modules": ["c_attn"]}, "cannot be put on the student"),
    ],
)
def test_an_adapter_of_another_model_is_refused_unread(
    tmp_path: Path, base: dict[str, Any], values: dict[str, Any], part: str
) -> None:
    config = adapter(tmp_path / "adapter", resized(tmp_path / "base", **base), **values)
    with pytest.raises(UserError, match=part):
        folders.check_student(config, load(ROOT / STUDENT))


@pytest.mark.parametrize("names", ["q_proj,vproj", "vproj"])
def test_a_name_that_no_layer_has_is_refused(names: str) -> None:
    config = parse_arguments(["--student_model", STUDENT, "--lora_targets", names], "")
    with pytest.raises(UserError, match="vproj"):
        folders.check_student(config, load(ROOT / STUDENT))
