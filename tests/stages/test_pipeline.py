"""The commands as a person runs them: what a whole run leaves, the stages one by one, and every kind of bad
input.
"""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache
from stages.loops import measure
from stages.runtime.metrics import PHASES
from tests.support.helpers import (
    ROOT,
    STUDENT,
    TEACHER,
    Forker,
    assert_same_weights,
    records_of,
    refused,
    run_python,
    small,
    torchrun,
    weights_in,
)
from tests.support.viewing import data_of, unpacked

DIVERGENCES = {"forward_kl", "reverse_kl", "top1_agreement"}
KEYS = {
    "before": {*DIVERGENCES, "accuracy", "on_student"},
    "after": {*DIVERGENCES, "accuracy", "on_student"},
    "teacher": {"accuracy"},
    "cache": {"rows", "scored_tokens", "bytes_per_token", "signal_bytes_per_token"},
    "seconds": {*PHASES, "total"},
}
ORIGINAL_FLAGS = shlex.split(
    f"--student_model {STUDENT} --teacher_model {TEACHER} --dataset examples/arithmetic/train.jsonl"
    " --batch_size 256 --group_size 4 --grad_accum 8 --max_new_tokens 512 --use_lora --lora_r 64 --dtype"
    " bf16 --tau 1.0 --alpha 5.0 --gating soft --rkl exact --fkl full --wandb_project p --wandb_name n"
    " --teacher_ds_zero3 --gen_micro_batch 4 --lp_micro_batch 8"
)


# A whole run


@pytest.fixture(scope="module")
def piped(forked: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole small run, with dropout: what a stage draws at random may not depend on what ran
    before.
    """
    folder = tmp_path_factory.mktemp("piped")
    forked.stage("stages.pipeline", *small(folder, lora_dropout=0.1)).expect_success()
    return folder / "demo"


def test_a_run_leaves_what_it_says(piped: Path) -> None:
    for name in (
        "cache",
        "checkpoints",
        "student",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "config.yaml",
    ):
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


def test_every_record_says_how_much_was_cut(piped: Path) -> None:
    snapshot = cache.open(piped / "cache")
    cut = [snapshot[i].finish_reason == "length" for i in range(len(snapshot))]
    report = json.loads((piped / "report.json").read_text())
    assert report["cache"]["cut_share"] == sum(cut) / len(cut)
    (refresh,) = records_of(piped, "refresh")
    of_refresh = [
        c for c, row in zip(cut, snapshot.index.to_pylist(), strict=True) if row["refresh_index"] == 1
    ]
    assert refresh["cut_share"] == sum(of_refresh) / len(of_refresh)
    written = [record for record in records_of(piped, "rollout_progress") if not record["evaluation"]]
    assert sum(r["cut_rollouts"] for r in written if not r["rollouts_left"]) == sum(cut)
    assert all(0 <= step["cut_share"] <= 1 for step in records_of(piped, "step"))
    for label in ("before", "after", "teacher"):
        found = json.loads((piped / "eval" / f"{label}.json").read_text())
        assert report[label]["cut_share"] == found["cut_share"]
        assert 0 <= found["cut_share"] <= 1
        if label != "teacher":
            assert 0 <= report[label]["on_student"]["cut_share"] <= 1


def test_the_report_agrees_with_the_cache_and_the_clock(piped: Path) -> None:
    report = json.loads((piped / "report.json").read_text())
    snapshot = cache.open(piped / "cache")
    summary = snapshot.summary()
    assert report["cache"]["rows"] == len(snapshot) == 64
    for name in ("scored_tokens", "bytes_per_token", "signal_bytes_per_token"):
        assert report["cache"][name] == pytest.approx(summary[name])
    seconds = report["seconds"]
    assert all(seconds[name] > 0 for name in KEYS["seconds"] - {"wait"})
    named = sum(seconds[name] for name in PHASES)
    assert 0.98 * seconds["total"] <= named <= seconds["total"] + 1e-3


def test_the_report_page_needs_nothing_from_elsewhere(piped: Path) -> None:
    page = (piped / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:,|#)", page.split("<script>", 1)[0])
    (run,) = data_of(page)["runs"]
    assert run["notes"] == []
    for cells in run["table"][2:4]:  # KLs on the student's own text
        for when in ("before", "after"):
            assert cells[when]["low"] <= cells[when]["value"] <= cells[when]["high"]
    assert {row["source"] for row in unpacked(run["rollouts"])["rows"]} >= {
        "cache",
        "before",
        "after",
        "teacher",
    }


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


@pytest.mark.thorough
def test_the_stages_one_by_one_give_the_student_of_the_pipeline(piped: Path, staged: Path) -> None:
    assert_same_weights(weights_in(staged / "student"), weights_in(piped / "student"))
    rows = [cache.open(folder / "cache") for folder in (piped, staged)]
    assert rows[0].row_ids == rows[1].row_ids
    assert rows[0].to_table().equals(rows[1].to_table())


@pytest.mark.thorough
def test_evaluation_before_and_after_is_that_of_the_pipeline(piped: Path, staged: Path) -> None:
    for label in ("before", "after", "teacher"):
        left, right = (
            json.loads((folder / "eval" / f"{label}.json").read_text()) for folder in (piped, staged)
        )
        assert left == right


@pytest.mark.thorough
def test_the_report_can_be_made_on_its_own(piped: Path, staged: Path, forked: Forker) -> None:
    forked.stage("stages.report", *small(staged.parent, lora_dropout=0.1)).expect_success()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (piped, staged)]
    for name in ("before", "after", "teacher"):
        assert reports[0][name] == reports[1][name]


@pytest.mark.thorough
def test_stage_one_says_that_nothing_is_due_after_training(staged: Path, forked: Forker) -> None:
    done = forked.stage("stages.rollout", *small(staged.parent, lora_dropout=0.1)).expect_success()
    assert "nothing is due at step 4" in done.out


@pytest.mark.thorough
def test_stage_one_checks_what_it_is_given_even_where_nothing_is_due(staged: Path, forked: Forker) -> None:
    flags = [*small(staged.parent, lora_dropout=0.1), "--attn_implementation", "nowhere"]
    forked.stage("stages.rollout", *flags).expect_sentence("attn_implementation nowhere")
    flags = [*small(staged.parent, lora_dropout=0.1), "--teacher_model", "nowhere"]
    forked.stage("stages.rollout", *flags).expect_sentence("is finished: it was trained to step 4")


@pytest.mark.thorough
def test_stage_one_can_be_extended_with_another_run_on_the_same_cache(
    staged: Path, forked: Forker, tmp_path: Path
) -> None:
    """A second student on a shared cache trains off-policy and says so."""
    root = tmp_path / "cache"
    shutil.copytree(staged / "cache", root)
    arguments = small(tmp_path, cache_dir=root, run_name="second", refresh_every=0, max_steps=1)
    done = forked.stage("stages.train", *arguments).expect_success()
    assert re.search(
        r"(\d+) of \1 rows were written by another run or other weights \(off-policy\)", done.out
    )


@pytest.mark.slow
def test_a_stage_runs_as_a_file() -> None:
    done = run_python("stages/train.py", "--help").expect_success()
    assert "--student_model" in done.out
    assert "Stage two" in done.out


def run_as_file(path: str) -> None:
    sys.argv = [path, "--help"]
    sys.path[0] = str(ROOT / "stages")
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("rollout", "rollout"),
        ("train", "train"),
        ("evaluate", "evaluate"),
        ("pipeline", "run"),
        ("report", "report"),
    ],
)
def test_every_stage_explains_itself(forked: Forker, file: str, name: str) -> None:
    done = forked.call(run_as_file, f"stages/{file}.py").expect_success()
    assert "as --KEY VALUE" in done.out
    assert f"dualkl {name}" in done.out


# Evaluation keeps up with the student


@pytest.mark.thorough
def test_an_evaluation_in_the_middle_is_not_taken_for_the_last_one(forked: Forker, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "rollouts_per_refresh": 16,
        "refresh_every": 0,
        "eval_prompts": 4,
        "warmup_steps": 0,
    }
    forked.stage("stages.rollout", *small(tmp_path, **values)).expect_success()
    found = []
    for steps in (1, 3):
        for module in ("train", "evaluate"):
            forked.stage(f"stages.{module}", *small(tmp_path, max_steps=steps, **values)).expect_success()
        found.append(json.loads((tmp_path / "demo/eval/after.json").read_text()))
    assert found[0]["forward_kl"] != found[1]["forward_kl"]
    assert found[0]["on_student"]["forward_kl"] != found[1]["on_student"]["forward_kl"]
    assert found[1]["on_student"]["tokens"] <= 4 * 56  # rows of the last student alone


@pytest.mark.thorough
def test_more_held_out_prompts_are_measured_anew(forked: Forker, tmp_path: Path) -> None:
    tokens = []
    for num_prompts in (4, 8):
        forked.stage("stages.evaluate", *small(tmp_path, eval_prompts=num_prompts)).expect_success()
        tokens.append(json.loads((tmp_path / "demo/eval/before.json").read_text())["tokens"])
    assert tokens[1] > 1.3 * tokens[0]


@pytest.mark.parametrize("module", ["stages.pipeline", "stages.evaluate"])
def test_the_student_before_training_is_measured_again_with_changed_settings(
    forked: Forker, tmp_path: Path, module: str
) -> None:
    forked.stage("stages.pipeline", *small(tmp_path, max_steps=1)).expect_success()
    changed = {"eval_prompts": 12, "max_new_tokens": 24, "sample_top_k": 50}
    done = forked.stage(module, *small(tmp_path, max_steps=2, **changed)).expect_success()
    lines = [line for line in done.out.splitlines() if line.startswith("the evaluation's settings")]
    assert len(lines) == 2
    for line, who in zip(lines, ("the teacher", "the student, also as it was before training,"), strict=True):
        for part in ("eval_prompts 12 (was 16)", "max_new_tokens 24 (was ", f"{who} is measured again"):
            assert part in line
    assert "sample_top_k 50 (was 0)" in lines[1]
    found = {
        label: json.loads((tmp_path / "demo/eval" / f"{label}.json").read_text())
        for label in ("before", "after", "teacher")
    }
    for label, result in found.items():
        assert result["answers"] == 12, label
        assert result["of"]["max_new_tokens"] == 24, label
    assert found["before"]["of"]["policy_hash"] != found["after"]["of"]["policy_hash"]
    assert found["before"]["measured_on"] == found["after"]["measured_on"]
    for name in ("teacher_text", "on_student_before"):
        texts = cache.open(tmp_path / "demo/eval" / name)
        assert len(texts) == 12
        assert texts.fingerprint.recorded["max_new_tokens"] == 24
    again = forked.stage(module, *small(tmp_path, max_steps=2, **changed)).expect_success()
    assert "settings have changed" not in again.out


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
    refused(forked, "rollout", tmp_path, "teacher_model is missing", extra=["--teacher_model", ""])


def test_teacher_text_that_is_not_hidden_is_one_sentence(forked: Forker, piped: Path, tmp_path: Path) -> None:
    refused(forked, "evaluate", tmp_path, "holds topk rows", "hidden", eval_teacher_text=piped / "cache")


@torch.no_grad()
def test_divergences_are_token_means_of_exact_kls(
    piped: Path, student_model: Any, teacher_model: Any
) -> None:
    """`before` on the teacher's text, computed again from both models' plain logits in float64."""
    sums, agree, tokens = np.zeros(2), 0, 0
    for record in cache.open(piped / "eval" / "teacher_text")[:]:
        ids = torch.from_numpy(np.concatenate([record.prompt_ids, record.completion_ids]).astype(np.int64))[
            None
        ]
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
        f"runs_dir: {folder}\ndevice: cpu\nmax_steps: 2\nrefresh_every: 1\nmax_age:"
        " 0\nrollouts_per_refresh: 16\n"
        "rollouts_per_unit: 8\neval_dataset: examples/arithmetic/heldout.jsonl\neval_prompts: 4\n"
        "chat_template_kwargs: {}\nanswer_checker:"
        " examples/word_problems.py:check\ngradient_checkpointing: false\n"
    )
    return ["--config", str(path)]


def check_original(folder: Path) -> None:
    assert [record["step"] for record in records_of(folder, "step")] == [1, 2]
    assert [record["refresh_index"] for record in records_of(folder, "refresh")] == [1]
    assert json.loads((folder / "report.json").read_text()).keys() >= KEYS.keys()
    assert list(folder.rglob("*.wandb"))
    assert (folder / "student" / "adapter_model.safetensors").is_file()


@pytest.mark.thorough
def test_the_original_flags_run_under_torchrun(tmp_path: Path) -> None:
    """All of them, three made smaller for time."""
    pytest.importorskip("wandb")
    smaller = ["--batch_size", "32", "--grad_accum", "4", "--max_new_tokens", "56"]
    torchrun("-m", "stages.pipeline", *overlay(tmp_path), *ORIGINAL_FLAGS, *smaller).expect_success()
    check_original(tmp_path / "run")


@pytest.mark.slow
def test_the_original_flags_run_verbatim(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    torchrun("-m", "stages.pipeline", *overlay(tmp_path), *ORIGINAL_FLAGS).expect_success()
    check_original(tmp_path / "run")


def test_other_prompts_under_the_same_name_are_measured_again(forked: Forker, tmp_path: Path) -> None:
    rows = (ROOT / "examples/arithmetic/train.jsonl").read_text().splitlines(keepends=True)
    held_out = tmp_path / "held-out.jsonl"
    keys = {"max_steps": 1, "eval_dataset": held_out, "eval_prompts": 4}
    held_out.write_text("".join(rows[-8:-4]))
    forked.stage("stages.pipeline", *small(tmp_path, **keys)).expect_success()
    held_out.write_text("".join(rows[-4:]))
    done = forked.stage("stages.pipeline", *small(tmp_path, **keys)).expect_success()
    sentence = (
        f"the held-out prompts of {held_out} are others than those measured before; the {{}} is measured"
    )
    assert sentence.format("teacher") in done.out
    assert sentence.format("student, also as it was before training,") in done.out
    kept = (json.loads((tmp_path / f"demo/eval/{label}.json").read_text()) for label in ("before", "after"))
    assert len({result["of"]["prompts"] for result in kept}) == 1
    again = forked.stage("stages.pipeline", *small(tmp_path, **keys)).expect_success()
    assert "measured before" not in again.out
