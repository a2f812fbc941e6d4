"""Every kind of bad input ends a command with one sentence, and nothing is lost."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cache
from tests.support.helpers import ROOT, STUDENT, TEACHER, Forker, refused, small
from tests.support.thinning import leading, thinned


@pytest.mark.parametrize("module", ["rollout", "train", "evaluate", "pipeline", "report"])
def test_an_unknown_flag_is_one_sentence(forked: Forker, tmp_path: Path, module: str) -> None:
    refused(forked, module, tmp_path, "unknown key grad_acum", "did you mean grad_accum?", grad_acum=2)


def test_an_ill_typed_flag_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "pipeline", tmp_path, "max_steps", "integer", "many", max_steps="many")


def test_a_missing_student_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(
        forked,
        "pipeline",
        tmp_path,
        "nowhere/student",
        "nothing here has that path, and a hub name needs a network",
        student_model="nowhere/student",
    )


def test_a_missing_teacher_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(
        forked,
        "rollout",
        tmp_path,
        "/nowhere/at/all",
        "/nowhere/at/all cannot be loaded: there is no such folder.",
        teacher_model="/nowhere/at/all",
    )


def test_a_missing_data_set_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "rollout", tmp_path, "nowhere.jsonl does not exist", dataset="nowhere.jsonl")


def test_a_data_set_without_prompts_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    refused(forked, "rollout", tmp_path, "gave no prompts", "columns text", dataset=tmp_path / "data.jsonl")


def test_prompts_that_are_too_long_are_one_sentence_where_none_may_be_skipped(
    forked: Forker, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "How many pens?"}\n{"prompt": "' + "pens " * 200 + '"}\n')
    refused(forked, "rollout", tmp_path, "allow_skipped 0", dataset=path, num_prompts=0, allow_skipped=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "pipeline", tmp_path, "device: cuda", "no GPU here", "--device cpu", device="cuda")


def test_impossible_batch_arithmetic_is_one_sentence_before_any_work(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "pipeline", tmp_path, "batch_size 16 cannot be cut", "multiple of 5", grad_accum=5)
    assert not list(tmp_path.rglob("*.arrow"))


def test_impossible_batch_arithmetic_is_one_sentence_in_stage_two(forked: Forker, written: Path) -> None:
    refused(forked, "train", written, "batch_size 16 cannot be cut", "multiple of 5", grad_accum=5)


def test_training_without_a_cache_says_what_to_run(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "train", tmp_path, "there is no teacher cache at", "dualkl rollout")


@pytest.mark.parametrize("module", leading(1, ["pipeline", "rollout"]))
def test_runs_where_nothing_can_be_written_are_one_sentence(
    forked: Forker, tmp_path: Path, module: str
) -> None:
    (tmp_path / "runs").touch()
    part = f"make runs_dir {tmp_path / 'runs'} writable, or give another --runs_dir."
    refused(forked, module, tmp_path / "runs", "cannot be written (Not a directory:", part)


def test_a_report_without_a_run_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "report", tmp_path, "demo")


def model_with(folder: Path, source: str, **tensors: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with changed weights."""
    shutil.copytree(ROOT / source, folder)
    weights = load_file(folder / "model.safetensors")
    for name, change in tensors.items():
        weights[name.replace("__", ".")] = change(weights[name.replace("__", ".")])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("key", "source", "who"), [("student_model", STUDENT, "student"), ("teacher_model", TEACHER, "teacher")]
)
def test_nan_from_a_model_is_one_sentence(
    forked: Forker, tmp_path: Path, key: str, source: str, who: str
) -> None:
    model = model_with(tmp_path / "model", source, model__norm__weight=lambda weight: weight * math.nan)
    refused(forked, "rollout", tmp_path, f"a {who} of type qwen3 gave NaN or infinite", **{key: model})
    root = tmp_path / "demo" / "cache"
    assert not cache.exists(root) or len(cache.open(root)) == 0


def test_nan_from_a_student_is_one_sentence_in_the_pipeline(forked: Forker, tmp_path: Path) -> None:
    model = model_with(tmp_path / "model", STUDENT, model__norm__weight=lambda weight: weight * math.nan)
    refused(forked, "pipeline", tmp_path, "NaN or infinite", student_model=model)


def test_tokenizers_that_disagree_are_one_sentence(forked: Forker, tmp_path: Path) -> None:
    shutil.copytree(ROOT / TEACHER, tmp_path / "teacher")
    path = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[" pens"], vocabulary[" cups"] = vocabulary[" cups"], vocabulary[" pens"]
    path.write_text(json.dumps(content))
    refused(
        forked, "rollout", tmp_path, "tokenizers disagree on 2 of 230 ids", teacher_model=tmp_path / "teacher"
    )


def test_padded_embeddings_are_cut_not_refused(forked: Forker, tmp_path: Path) -> None:
    teacher = model_with(
        tmp_path / "teacher",
        TEACHER,
        model__embed_tokens__weight=lambda weight: torch.cat([weight, weight[:26]]),
    )
    content = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(content | {"vocab_size": 256}))
    values = {"teacher_model": teacher, "rollouts_per_refresh": 8, "signal": "full"}
    forked.stage("stages.rollout", *small(tmp_path, **values)).expect_success()
    snapshot = cache.open(tmp_path / "demo" / "cache")
    assert snapshot.fingerprint.must_match["vocab_size"] == 230
    assert snapshot[0].signal.logits.shape[1] == 230
    forked.stage("stages.train", *small(tmp_path, **values, refresh_every=0)).expect_success()


@pytest.fixture(scope="module")
def written(forked: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose stage one is done. Tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("written")
    forked.stage("stages.rollout", *small(folder)).expect_success()
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "copied")
    return tmp_path / "copied"


CHANGES = [
    {"signal_k": 8},
    {"signal": "hidden"},
    {"teacher_model": STUDENT},
    {"teacher_dtype": "bf16"},
    {"chat_template_kwargs": "{a: 1}"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("module", ["rollout", "train"])
def test_a_cache_that_means_something_else_is_one_sentence_before_any_work(
    forked: Forker, copied: Path, module: str, change: dict[str, Any]
) -> None:
    before = len(cache.open(copied / "demo" / "cache"))
    refused(forked, module, copied, "cache's", "expected", **change)
    assert len(cache.open(copied / "demo" / "cache")) == before
    assert not (
        copied / "demo" / "checkpoints"
    ).exists()  # it did not train until the first refresh to find out


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if kind == "truncated" else data)


@pytest.mark.parametrize("kind", leading(1, ["flipped", "truncated"]))
def test_a_damaged_shard_is_one_sentence_that_says_how_to_mend_it(
    forked: Forker, copied: Path, kind: str
) -> None:
    root = copied / "demo" / "cache"
    shard = sorted(root.rglob("*.arrow"))[0]
    damage(shard, kind)
    message = forked.stage("stages.train", *small(copied)).expect_sentence(shard.name, "rerun stage one")
    assert "commits/" in message
    record = next(r for r in cache.open(root).commit_records() if r.shard.endswith(shard.name))
    shard.unlink()
    (root / "commits" / record.name).unlink()
    forked.stage("stages.rollout", *small(copied)).expect_success()
    assert len(cache.open(root)) == 32
    assert cache.open(root).verify() == []


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_a_damaged_commit_record_is_one_sentence(forked: Forker, copied: Path, kind: str) -> None:
    record = sorted((copied / "demo" / "cache" / "commits").glob("*.json"))[0]
    damage(record, kind)
    forked.stage("stages.train", *small(copied)).expect_sentence(record.name, "rerun stage one")


@pytest.fixture(scope="module")
def trained(forked: Forker, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after one step of stage two. Tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(written, folder)
    forked.stage("stages.train", *small(folder, max_steps=1, refresh_every=0)).expect_success()
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    thinned(3, ["student.safetensors", "optimizer.pt", "state.pt", "state.json"], ["flipped", "truncated"]),
)
def test_a_damaged_checkpoint_is_one_sentence(
    forked: Forker, trained: Path, tmp_path: Path, name: str, kind: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    damage(folder / "demo" / "checkpoints" / "step-000001" / name, kind)
    forked.stage("stages.train", *small(folder, max_steps=2, refresh_every=0)).expect_sentence("step-000001")


def test_a_half_written_shard_is_not_read(forked: Forker, copied: Path) -> None:
    root = copied / "demo" / "cache"
    whole = sorted(root.rglob("*.arrow"))[0]
    (whole.parent / "half-0123.arrow").write_bytes(whole.read_bytes()[:1000])
    forked.stage("stages.train", *small(copied, max_steps=1, refresh_every=0)).expect_success()


def test_another_tokenizer_in_stage_two_is_one_sentence(forked: Forker, copied: Path) -> None:
    student = copied / "student"
    shutil.copytree(ROOT / STUDENT, student)
    content = json.loads((student / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[" pens"], vocabulary[" cups"] = vocabulary[" cups"], vocabulary[" pens"]
    (student / "tokenizer.json").write_text(json.dumps(content))
    refused(forked, "train", copied, "written with another tokenizer", student_model=student)


def test_a_run_folder_that_cannot_be_made_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    forked.stage("stages.rollout", *small(tmp_path / "file")).expect_sentence(str(tmp_path / "file"))


def adapter(folder: Path, **values: Any) -> Path:
    """A PEFT adapter of the embedded student."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / STUDENT)
    get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **values)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts the lm_head"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
    ids=str,
)
def test_an_adapter_that_changes_the_head_is_one_sentence(
    forked: Forker, tmp_path: Path, values: dict[str, Any], part: str
) -> None:
    folder = adapter(tmp_path / "adapter", **({"target_modules": ["q_proj"]} | values))
    refused(forked, "rollout", tmp_path, part, student_adapter=folder)


def test_a_folder_without_an_adapter_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "rollout", tmp_path, "no adapter_config.json", student_adapter=tmp_path)


@pytest.mark.parametrize(
    ("sampling", "loss", "part"),
    leading(
        1,
        [
            ({"sample_top_p": 0.9}, {"sample_top_p": 1, "rkl": "mc"}, "sampled with top_p 0.9"),
            ({"sample_top_k": 5}, {"sample_top_k": 0, "rkl": "mc"}, "use rkl: exact"),
            ({}, {"signal": "hidden", "temperature": 2}, "rows at temperature 1.0, the loss is at 2.0"),
        ],
    ),
    ids=str,
)
def test_a_loss_that_the_rows_cannot_support_is_one_sentence(
    forked: Forker, tmp_path: Path, sampling: dict[str, Any], loss: dict[str, Any], part: str
) -> None:
    forked.stage("stages.rollout", *small(tmp_path, rollouts_per_refresh=16, **sampling)).expect_success()
    refused(forked, "train", tmp_path, part, refresh_every=0, **loss)
