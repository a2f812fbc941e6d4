"""What commands refuse, and say, before they read a weight: the models here have none that could be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import cache
from stages.loops import preflight, setup
from stages.loops.preflight import Work, check_early
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from tests.support.helpers import ROOT, STUDENT, TEACHER, Forker, make_run, refused

EVERYTHING = Work(generates=True, scores=True, trains=True, evaluates=True)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Copies of the embedded models: configurations may be changed, weight files are truncated."""
    found = {}
    for side, source in (("student_model", STUDENT), ("teacher_model", TEACHER)):
        folder = Path(shutil.copytree(ROOT / source, tmp_path / side))
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
        found[side] = str(folder)
    return found


def configure(model: str, **values: Any) -> None:
    path = Path(model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path, work: Work, **values: Any) -> str:
    run = make_run(folder, **values)
    with pytest.raises(UserError) as caught:
        check_early(run, work)
    assert "\n" not in str(caught.value)
    assert not (run.folder / "cache").exists()
    return str(caught.value)


def ready(folder: Path, work: Work, **values: Any) -> preflight.Ready:
    return check_early(make_run(folder, student_model=STUDENT, teacher_model=TEACHER, **values), work)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"batch_size": 4, "grad_accum": 8}, ("batch_size 4", "grad_accum 8")),
        ({"dataset": "nowhere.jsonl"}, ("nowhere.jsonl",)),
        ({"eval_dataset": "nowhere.jsonl"}, ("nowhere.jsonl",)),
        ({"answer_checker": "nowhere.py:check"}, ("nowhere.py:check",)),
        ({"answer_checker": "examples/word_problems.py:answer_of"}, ("answer_of",)),
        ({"teacher_ds_zero3": "true", "teacher_ds_config": "nowhere.json"}, ("nowhere.json",)),
        ({"extra_caches": "{nowhere: 1}"}, ("extra_caches", "nowhere")),
        ({"eval_teacher_text": "nowhere"}, ("nowhere",)),
        ({"student_adapter": "nowhere"}, ("student_adapter nowhere",)),
        ({"cache_dir": "pipeline.yaml/cache"}, ("pipeline.yaml is a file", "cache_dir")),
        ({"answer_checker": "gsm8k", "eval_dataset": "PROMPTS"}, ("gsm8k", "column `answer`", "question")),
        ({"max_new_tokens": 512}, ("512 positions", "lower max_new_tokens to 4")),
        ({"attn_implementation": "flash_attention_9"}, ("flash_attention_9", "sdpa")),
        ({"eos_token": "<|nothing|>"}, ("eos_token", "<|nothing|>")),
        ({}, ("model.safetensors", "its header says")),
    ],
    ids=str,
)
def test_a_pipeline_that_cannot_work_reads_no_weights(
    tmp_path: Path, models: dict[str, str], values: dict[str, Any], parts: tuple[str, ...]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"question": "How many?"}\n')
    values = {key: prompts if value == "PROMPTS" else value for key, value in values.items()}
    try:
        message = refusal(tmp_path, EVERYTHING, **(models | values))
    except cache.CacheError as error:
        message = str(error)
    for part in parts:
        assert part in message, message


def test_a_command_checks_what_it_uses_alone(tmp_path: Path) -> None:
    wrong = {"eval_dataset": "nowhere.jsonl", "answer_checker": "nowhere.py:check", "grad_accum": 5}
    assert ready(tmp_path, Work(generates=True, scores=True), **wrong).prompts
    unused = {"dataset": "nowhere.jsonl", "teacher_ds_config": "nowhere.json", "grad_accum": 5}
    found = ready(tmp_path, Work(evaluates=True), **unused)
    assert found.heldout
    assert not found.prompts


@pytest.mark.parametrize("side", ["student_model", "teacher_model"])
def test_more_tokens_than_either_model_has_positions_is_refused(
    tmp_path: Path, models: dict[str, str], side: str
) -> None:
    configure(models[side], max_position_embeddings=60)
    message = refusal(tmp_path, Work(generates=True, scores=True), max_new_tokens=40, **models)
    assert f"{side} {models[side]} has 60 positions" in message
    assert "lower max_prompt_tokens to 20 or max_new_tokens to" in message


def test_the_remedy_for_too_many_tokens_works(tmp_path: Path, models: dict[str, str]) -> None:
    configure(models["student_model"], max_position_embeddings=60)
    values = {"max_new_tokens": 30, "max_prompt_tokens": 30, "num_prompts": 0}
    message = refusal(tmp_path, Work(generates=True, scores=True), **values, **models)
    assert "its header says" in message, "the weights: everything before them is right"


def with_token(model: str, token: str, template: str = "") -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.chat_template += template
    tokenizer.save_pretrained(model)


@pytest.mark.parametrize("padded", [False, True])
def test_a_template_token_beyond_the_cut_is_refused(
    tmp_path: Path, models: dict[str, str], padded: bool
) -> None:
    with_token(models["student_model"], "<|think|>", "{% if add_generation_prompt %}<|think|>{% endif %}")
    configure(models["student_model"], vocab_size=256)
    configure(models["teacher_model"], vocab_size=256 if padded else 230)
    message = refusal(tmp_path, Work(generates=True, scores=True), **models)
    assert (
        "64 of 64 prompts contain '<|think|>' (id 230), which the chat template of the student adds"
        in message
    )


def test_a_token_beyond_the_cut_in_one_held_out_text_is_refused(
    tmp_path: Path, models: dict[str, str]
) -> None:
    with_token(models["student_model"], "<|think|>")
    configure(models["student_model"], vocab_size=256)
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "How many?"}\n{"question": "How <|think|> many?"}\n')
    message = refusal(tmp_path, Work(evaluates=True), eval_dataset=data, answer_checker="", **models)
    assert "1 of 2 held-out prompts contain '<|think|>' (id 230), which is in their text" in message


def test_rows_longer_than_the_students_positions_cannot_be_trained_on(
    tmp_path: Path, models: dict[str, str], caches: Any
) -> None:
    configure(models["student_model"], max_position_embeddings=20)
    run = make_run(tmp_path, cache_dir=caches(), **models)
    with pytest.raises(UserError, match=r"rows of up to \d+ tokens, but the student .* has 20 positions"):
        check_early(run, Work(trains=True), setup.cached_vocabulary)


def said(run: Run, work: Work, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    check_early(run, work)
    return capsys.readouterr().out


def test_settings_beyond_what_is_there_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "How many?"}\n{"question": "How many pens?"}\n')
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"question": "How many cups?"}\n{"question": "How many hats?"}\n')
    values = {
        "dataset": data,
        "num_prompts": 3,
        "eval_dataset": heldout,
        "answer_checker": "",
        "rollouts_per_refresh": 8,
        "group_size": 4,
        "eval_prompts": 4,
        "warmup_steps": 5,
        "signal_k": 231,
    }
    found = said(make_run(tmp_path, **values), EVERYTHING, capsys)
    for part in (
        "warmup_steps 5 is longer than the run of max_steps 4",
        "signal_k 231 is above the 230 ids",
        "num_prompts is 3, but there are 2",
        "eval_prompts is 4, but there are 2",
    ):
        assert part in found
    within = {"num_prompts": 2, "eval_prompts": 2, "warmup_steps": 4, "signal_k": 230}
    assert said(make_run(tmp_path, **(values | within)), EVERYTHING, capsys).splitlines() == [
        f"2 prompts from {data}"
    ]


def test_keys_of_the_gate_beside_a_constant_mix_are_said_to_have_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "no effect: tau, alpha, since gating 0.25 is a constant mix"
    keys = {"tau": 0.2, "alpha": 9.0}
    assert told in said(make_run(tmp_path, gating=0.25, **keys), EVERYTHING, capsys)
    assert "no effect" not in said(make_run(tmp_path, gating="hard", **keys), EVERYTHING, capsys)
    assert "no effect" not in said(make_run(tmp_path, gating=0.25, tau=1.0, alpha=5.0), EVERYTHING, capsys)


@pytest.mark.parametrize("module", ["pipeline", "rollout", "train", "evaluate"])
def test_every_command_checks_before_it_reads_weights(
    forked: Forker, tmp_path: Path, models: dict[str, str], module: str
) -> None:
    if module == "train":
        run = make_run(tmp_path)
        print_ = setup.fingerprint(run.config, setup.shared_vocabulary(run.config), run.config.teacher_signal)
        with cache.Writer(run.config.cache_root, print_):
            pass
    wrong = {"dataset": "nowhere.jsonl", "eval_dataset": "nowhere.jsonl", "refresh_every": 2}
    values = wrong | {"student_model": models["student_model"]}
    refused(forked, module, tmp_path, "nowhere.jsonl does not exist", **values)
