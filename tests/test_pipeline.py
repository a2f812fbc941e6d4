"""The commands as a person runs them: what a whole run leaves, the stages one by one, and every kind of bad input."""

import errno
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cache
from stages.loops import measure
from stages.runtime import errors
from tests.helpers import (
    ROOT,
    STUDENT,
    TEACHER,
    Forker,
    assert_same_weights,
    make_run,
    records_of,
    run_python,
    small,
    torchrun,
    weights_in,
)

DIVERGENCES = {"forward_kl", "reverse_kl", "top1_agreement"}
KEYS = {
    "before": {*DIVERGENCES, "accuracy", "on_student"}, "after": {*DIVERGENCES, "accuracy", "on_student"},
    "teacher": {"accuracy"}, "cache": {"rows", "scored_tokens", "bytes_per_token", "signal_bytes_per_token"},
    "seconds": {"load", "rollout", "score", "train", "evaluate", "total"},
}  # fmt: skip
ORIGINAL_FLAGS = shlex.split(
    f"--student_model {STUDENT} --teacher_model {TEACHER} --dataset examples/arithmetic/train.jsonl --batch_size 256"
    " --group_size 4 --grad_accum 8 --max_new_tokens 512 --use_lora --lora_r 64 --dtype bf16 --tau 1.0 --alpha 5.0"
    " --gating soft --rkl exact --fkl full --wandb_project p --wandb_name n --teacher_ds_zero3 --gen_micro_batch 4"
    " --lp_micro_batch 8"
)


# A whole run


@pytest.fixture(scope="module")
def piped(forked: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole small run, with dropout: what a stage draws at random may not depend on what ran before."""
    folder = tmp_path_factory.mktemp("piped")
    forked.stage("stages.pipeline", *small(folder, lora_dropout=0.1)).expect_success()
    return folder / "demo"


def test_a_run_leaves_what_it_says(piped: Path) -> None:
    for name in ("cache", "checkpoints", "student", "metrics.jsonl", "report.json", "report.html", "config.yaml"):
        assert (piped / name).exists(), name
    assert cache.open(piped / "cache").verify() == []
    assert [path.name for path in sorted((piped / "checkpoints").iterdir())] == ["step-000003", "step-000004"]
    assert [record["step"] for record in records_of(piped, "step")] == [1, 2, 3, 4]
    assert [record["refresh_index"] for record in records_of(piped, "refresh")] == [1]


def test_the_report_has_its_fixed_keys(piped: Path) -> None:
    report = json.loads((piped / "report.json").read_text())
    assert report.keys() >= KEYS.keys()
    for section, names in KEYS.items():
        assert report[section].keys() >= names, section
    for label in ("before", "after"):
        assert report[label]["on_student"].keys() >= DIVERGENCES
        for values in (report[label], report[label]["on_student"]):
            assert values["forward_kl"] > 0
            assert values["reverse_kl"] > 0
            assert 0 < values["top1_agreement"] < 1
        assert 0 <= report[label]["accuracy"] <= 1
    assert report["teacher"]["accuracy"] >= 0.75


def test_the_report_agrees_with_the_cache_and_the_clock(piped: Path) -> None:
    report = json.loads((piped / "report.json").read_text())
    snapshot = cache.open(piped / "cache")
    summary = snapshot.summary()
    assert report["cache"]["rows"] == len(snapshot) == 64
    for name in ("scored_tokens", "bytes_per_token", "signal_bytes_per_token"):
        assert report["cache"][name] == pytest.approx(summary[name])
    seconds = report["seconds"]
    assert all(seconds[name] > 0 for name in KEYS["seconds"])
    assert sum(seconds[name] for name in KEYS["seconds"] - {"total"}) <= seconds["total"] + 0.1


def test_the_report_page_needs_nothing_from_elsewhere(piped: Path) -> None:
    page = (piped / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page
    assert 'href="http' not in page or "<a " in page
    for word in ("before", "after", "teacher"):
        assert word in page.lower()


def test_the_exported_student_loads_with_peft_and_generates(piped: Path, tokenizer: Any) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(piped / "student", dtype=torch.float32).eval()
    own = AutoTokenizer.from_pretrained(piped / "student")
    turns = [{"role": "user", "content": "Sam had 9 cups but lost 4 of them. How many cups are left?"}]
    text = own.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    batch = own(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        written = model.generate(input_ids=batch["input_ids"], max_new_tokens=20, do_sample=False)
    assert "The answer is" in own.decode(written[0], skip_special_tokens=True)
    lora = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert lora
    assert all(p.any() for p in lora.values())


def test_a_finished_run_started_again_keeps_its_results(piped: Path, forked: Forker) -> None:
    before = weights_in(piped / "student")
    report = json.loads((piped / "report.json").read_text())
    forked.stage("stages.pipeline", *small(piped.parent, lora_dropout=0.1)).expect_success()
    assert_same_weights(weights_in(piped / "student"), before)
    again = json.loads((piped / "report.json").read_text())
    assert [again[name] for name in ("before", "after", "teacher")] == [
        report[n] for n in ("before", "after", "teacher")
    ]


# Stages one by one


@pytest.fixture(scope="module")
def staged(forked: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as `piped`, command by command."""
    folder = tmp_path_factory.mktemp("staged")
    for module in ("evaluate", "rollout", "train", "evaluate"):
        forked.stage(f"stages.{module}", *small(folder, lora_dropout=0.1)).expect_success()
    return folder / "demo"


def test_the_stages_one_by_one_give_the_student_of_the_pipeline(piped: Path, staged: Path) -> None:
    assert_same_weights(weights_in(staged / "student"), weights_in(piped / "student"))
    rows = [cache.open(folder / "cache") for folder in (piped, staged)]
    assert rows[0].row_ids == rows[1].row_ids
    assert rows[0].to_table().equals(rows[1].to_table())


def test_evaluation_before_and_after_is_that_of_the_pipeline(piped: Path, staged: Path) -> None:
    for label in ("before", "after", "teacher"):
        left, right = (json.loads((folder / "eval" / f"{label}.json").read_text()) for folder in (piped, staged))
        assert left == right


def test_the_report_can_be_made_on_its_own(piped: Path, staged: Path, forked: Forker) -> None:
    forked.stage("stages.report", *small(staged.parent, lora_dropout=0.1)).expect_success()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (piped, staged)]
    for name in ("before", "after", "teacher"):
        assert reports[0][name] == reports[1][name]


def test_stage_one_says_that_nothing_is_due_after_training(staged: Path, forked: Forker) -> None:
    done = forked.stage("stages.rollout", *small(staged.parent, lora_dropout=0.1)).expect_success()
    assert "nothing is due at step 4" in done.out


def test_stage_one_can_be_extended_with_another_run_on_the_same_cache(
    staged: Path, forked: Forker, tmp_path: Path
) -> None:
    """A second student on a shared cache trains off-policy and says so."""
    root = tmp_path / "cache"
    shutil.copytree(staged / "cache", root)
    arguments = small(tmp_path, cache_dir=root, run_name="second", refresh_every=0, max_steps=1)
    done = forked.stage("stages.train", *arguments).expect_success()
    assert re.search(r"(\d+) of \1 rows were written by another run \(off-policy\)", done.out)


@pytest.mark.slow
def test_a_stage_runs_as_a_file() -> None:
    done = run_python("stages/train.py", "--help").expect_success()
    assert "--student_model" in done.out
    assert "Stage two" in done.out


def run_as_file(path: str) -> None:
    sys.argv = [path, "--help"]
    sys.path[0] = str(ROOT / "stages")
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("name", ["rollout", "train", "evaluate", "pipeline", "report"])
def test_every_stage_explains_itself(forked: Forker, name: str) -> None:
    done = forked.call(run_as_file, f"stages/{name}.py").expect_success()
    assert "usage:" in done.out
    assert f"stages.{name}" in done.out


# Evaluation keeps up with the student


def test_an_evaluation_in_the_middle_is_not_taken_for_the_last_one(forked: Forker, tmp_path: Path) -> None:
    values: dict[str, Any] = {"rollouts_per_refresh": 16, "refresh_every": 0, "eval_prompts": 4, "warmup_steps": 0}
    forked.stage("stages.rollout", *small(tmp_path, **values)).expect_success()
    found = []
    for steps in (1, 3):
        for module in ("train", "evaluate"):
            forked.stage(f"stages.{module}", *small(tmp_path, max_steps=steps, **values)).expect_success()
        found.append(json.loads((tmp_path / "demo/eval/after.json").read_text()))
    assert found[0]["forward_kl"] != found[1]["forward_kl"]
    assert found[0]["on_student"]["forward_kl"] != found[1]["on_student"]["forward_kl"]
    assert found[1]["on_student"]["tokens"] <= 4 * 56  # rows of the last student alone


def test_more_held_out_prompts_are_measured_anew(forked: Forker, tmp_path: Path) -> None:
    tokens = []
    for num_prompts in (4, 8):
        forked.stage("stages.evaluate", *small(tmp_path, eval_prompts=num_prompts)).expect_success()
        tokens.append(json.loads((tmp_path / "demo/eval/before.json").read_text())["tokens"])
    assert tokens[1] > 1.3 * tokens[0]


def test_without_a_checker_there_is_no_accuracy(forked: Forker, tmp_path: Path) -> None:
    arguments = [*small(tmp_path, eval_prompts=2), "--answer_checker", ""]
    forked.stage("stages.evaluate", *arguments).expect_success()
    for label in ("before", "teacher"):
        assert json.loads((tmp_path / "demo/eval" / f"{label}.json").read_text())["accuracy"] is None


def test_evaluation_without_a_teacher_reads_its_text_and_leaves_the_rest_null(
    forked: Forker, piped: Path, tmp_path: Path
) -> None:
    arguments = small(tmp_path, cache_dir=piped / "cache", eval_teacher_text=piped / "eval/teacher_text")
    forked.stage("stages.evaluate", *arguments, "--teacher_model", "").expect_success()
    found = json.loads((tmp_path / "demo/eval/before.json").read_text())
    expected = json.loads((piped / "eval/before.json").read_text())
    for key in ("forward_kl", "reverse_kl", "top1_agreement", "tokens", "accuracy"):
        assert found[key] == expected[key]
    assert set(found["on_student"].values()) == {None}
    refused(forked, "rollout", tmp_path, "teacher_model is empty", extra=["--teacher_model", ""])


def test_teacher_text_that_is_not_hidden_is_one_sentence(forked: Forker, piped: Path, tmp_path: Path) -> None:
    refused(forked, "evaluate", tmp_path, "holds topk rows", "hidden", eval_teacher_text=piped / "cache")


@torch.no_grad()
def test_divergences_are_token_means_of_exact_kls(piped: Path, student_model: Any, teacher_model: Any) -> None:
    """`before` on the teacher's text, computed again from both models' plain logits in float64."""
    sums, agree, tokens = np.zeros(2), 0, 0
    for record in cache.open(piped / "eval" / "teacher_text")[:]:
        ids = torch.from_numpy(np.concatenate([record.prompt_ids, record.completion_ids]).astype(np.int64))[None]
        logp, logq = (
            model(input_ids=ids).logits[0, len(record.prompt_ids) - 1 : -1].double().log_softmax(-1)
            for model in (student_model, teacher_model)
        )
        sums += [float((logq.exp() * (logq - logp)).sum()), float((logp.exp() * (logp - logq)).sum())]
        agree += int((logp.argmax(-1) == logq.argmax(-1)).sum())
        tokens += len(record.completion_ids)
    found = json.loads((piped / "eval/before.json").read_text())
    assert found["tokens"] == tokens
    assert [found["forward_kl"], found["reverse_kl"]] == pytest.approx(sums / tokens, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(agree / tokens, abs=2 / tokens)


def test_the_split_over_ranks_is_undone_in_order() -> None:
    rows = [{"n": n} for n in range(7)]
    assert measure._interleave([rows[0::3], rows[1::3], rows[2::3]]) == rows


# The original launch line


def overlay(folder: Path) -> list[str]:
    """A file for what the flags leave open, kept small."""
    path = folder / "small.yaml"
    path.write_text(
        f"runs_dir: {folder}\ndevice: cpu\nmax_steps: 2\nrefresh_every: 1\nmax_age: 0\nrollouts_per_refresh: 16\n"
        "rollouts_per_unit: 8\neval_dataset: examples/arithmetic/heldout.jsonl\neval_prompts: 4\nwandb_mode: offline\n"
        "chat_template_kwargs: {}\nanswer_checker: examples/word_problems.py:check\ngradient_checkpointing: false\n"
    )
    return ["--config", str(path)]


def check_original(folder: Path) -> None:
    assert [record["step"] for record in records_of(folder, "step")] == [1, 2]
    assert [record["refresh_index"] for record in records_of(folder, "refresh")] == [1]
    assert json.loads((folder / "report.json").read_text()).keys() >= KEYS.keys()
    assert list(folder.rglob("*.wandb"))
    assert (folder / "student" / "adapter_model.safetensors").is_file()


def test_the_original_flags_run_under_torchrun(tmp_path: Path) -> None:
    """All of them, three made smaller for time."""
    smaller = ["--batch_size", "32", "--grad_accum", "4", "--max_new_tokens", "56"]
    torchrun("-m", "stages.pipeline", *overlay(tmp_path), *ORIGINAL_FLAGS, *smaller).expect_success()
    check_original(tmp_path / "run")


@pytest.mark.slow
def test_the_original_flags_run_verbatim(tmp_path: Path) -> None:
    torchrun("-m", "stages.pipeline", *overlay(tmp_path), *ORIGINAL_FLAGS).expect_success()
    check_original(tmp_path / "run")


# Bad input


def refused(
    forked: Forker, module: str, folder: Path, *parts: str, extra: list[str] | None = None, **values: Any
) -> None:
    """The command fails with one sentence that holds `parts`."""
    forked.stage(f"stages.{module}", *small(folder, **values), *(extra or [])).expect_sentence(*parts)


@pytest.mark.parametrize("module", ["rollout", "train", "evaluate", "pipeline", "report"])
def test_an_unknown_flag_is_one_sentence(forked: Forker, tmp_path: Path, module: str) -> None:
    refused(forked, module, tmp_path, "unknown key grad_acum", "did you mean grad_accum?", grad_acum=2)


def test_an_ill_typed_flag_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "pipeline", tmp_path, "max_steps", "integer", "many", max_steps="many")


def test_a_missing_student_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "pipeline", tmp_path, "nowhere/student", "neither a model folder here nor on the hub",
            student_model="nowhere/student")  # fmt: skip


def test_a_missing_teacher_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "rollout", tmp_path, "/nowhere/at/all", "neither a model folder here nor on the hub",
            teacher_model="/nowhere/at/all")  # fmt: skip


def test_a_missing_data_set_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "rollout", tmp_path, "nowhere.jsonl does not exist", dataset="nowhere.jsonl")


def test_a_data_set_without_prompts_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    refused(forked, "rollout", tmp_path, "gave no prompts", "columns text", dataset=tmp_path / "data.jsonl")


def test_an_overlong_prompt_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "rollout", tmp_path, "max_prompt_tokens is 5", overlong="error", max_prompt_tokens=5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "pipeline", tmp_path, "device: cuda", "no GPU here", "--device cpu", device="cuda")


def test_impossible_batch_arithmetic_is_one_sentence_before_any_work(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "pipeline", tmp_path, "batch_size 16 cannot be cut", "multiple of 5", grad_accum=5)
    assert not list(tmp_path.rglob("*.arrow"))


def test_impossible_batch_arithmetic_is_one_sentence_in_stage_two(forked: Forker, written: Path) -> None:
    refused(forked, "train", written, "batch_size 16 cannot be cut", "multiple of 5", grad_accum=5)


def test_training_without_a_cache_says_what_to_run(forked: Forker, tmp_path: Path) -> None:
    refused(forked, "train", tmp_path, "there is no teacher cache at", "stages.rollout")


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
    ("key", "source", "who"), [("student_model", STUDENT, "generating model"), ("teacher_model", TEACHER, "teacher")]
)
def test_nan_from_a_model_is_one_sentence(forked: Forker, tmp_path: Path, key: str, source: str, who: str) -> None:
    model = model_with(tmp_path / "model", source, model__norm__weight=lambda weight: weight * math.nan)
    refused(forked, "rollout", tmp_path, who, "gave NaN or infinite", "was kept", **{key: model})
    assert len(cache.open(tmp_path / "demo" / "cache")) == 0


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
    refused(forked, "rollout", tmp_path, "tokenizers disagree on 2 of 230 ids", teacher_model=tmp_path / "teacher")


def test_padded_embeddings_are_cut_not_refused(forked: Forker, tmp_path: Path) -> None:
    teacher = model_with(
        tmp_path / "teacher", TEACHER,
        model__embed_tokens__weight=lambda weight: torch.cat([weight, weight[:26]]),
    )  # fmt: skip
    content = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(content | {"vocab_size": 256}))
    values = {"teacher_model": teacher, "rollouts_per_refresh": 8, "signal": "full"}
    forked.stage("stages.rollout", *small(tmp_path, **values)).expect_success()
    snapshot = cache.open(tmp_path / "demo" / "cache")
    assert snapshot.fingerprint.must_match["vocab_size"] == 230
    assert snapshot[0].signal.logits.shape[1] == 230  # type: ignore[union-attr]
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
    {"signal_k": 8}, {"signal": "hidden"}, {"teacher_model": STUDENT}, {"teacher_dtype": "bf16"},
    {"chat_template_kwargs": "{a: 1}"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("module", ["rollout", "train"])
def test_a_cache_that_means_something_else_is_one_sentence_before_any_work(
    forked: Forker, copied: Path, module: str, change: dict[str, Any]
) -> None:
    before = len(cache.open(copied / "demo" / "cache"))
    refused(forked, module, copied, "cache's", "expected", **change)
    assert len(cache.open(copied / "demo" / "cache")) == before
    assert not (copied / "demo" / "checkpoints").exists()  # it did not train until the first refresh to find out


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if kind == "truncated" else data)


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
def test_a_damaged_shard_is_one_sentence_that_says_how_to_mend_it(forked: Forker, copied: Path, kind: str) -> None:
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


@pytest.mark.parametrize("kind", ["flipped", "truncated"])
@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.pt", "state.pt", "state.json"])
def test_a_damaged_checkpoint_is_one_sentence(forked: Forker, copied: Path, name: str, kind: str) -> None:
    if kind == "flipped" and name != "state.json":
        pytest.skip("checkpoints carry no digests: a flipped bit in a tensor is not seen")
    forked.stage("stages.train", *small(copied, max_steps=1, refresh_every=0)).expect_success()
    damage(copied / "demo" / "checkpoints" / "step-000001" / name, kind)
    forked.stage("stages.train", *small(copied, max_steps=2, refresh_every=0)).expect_sentence("step-000001")


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


# How a command ends


def ends(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        errors.command(main)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def test_out_of_memory_says_what_to_lower_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), capsys)
    assert code != 0
    assert text.startswith("error: ")
    names = ["gen_micro_batch", "lp_micro_batch", "group_size", "batch_size", "max_new_tokens", "ZeRO-2"]
    places = [text.index(name) for name in names]
    assert places == sorted(places)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_anywhere_is_one_sentence(capsys: pytest.CaptureFixture[str], number: int) -> None:
    code, text = ends(OSError(number, os.strerror(number), "runs/demo/metrics.jsonl"), capsys)
    assert code != 0
    assert "Traceback" not in text
    assert text.startswith("error: ")
    assert "runs/demo/metrics.jsonl" in text


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(KeyboardInterrupt(), capsys)
    assert code == 130
    assert "run the same command again" in text


def test_a_mistake_of_ours_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ends(AssertionError("ours"), capsys)
    assert code == 1
    assert "Traceback" in text


def test_a_run_folder_that_cannot_be_made_is_one_sentence(forked: Forker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    forked.stage("stages.rollout", *small(tmp_path / "file")).expect_sentence(str(tmp_path / "file"))


def test_changed_keys_are_told_when_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    assert "changed" not in capsys.readouterr().out
    make_run(tmp_path, tau=0.75)
    assert "going on with changed keys: tau: 0.75" in capsys.readouterr().out
