"""Sizes follow from models, data and machine; given keys are kept and the sizes fit them."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from stages.data.prompts import PromptSet
from stages.loops import sizing
from stages.loops.setup import Vocabulary
from stages.loops.sizing import GIB, Choice, Machine, choose, config_of
from stages.loops.survey import Data, Model, Survey
from stages.runtime.errors import UserError

CPU, GPUS = Machine(1, 0.0, 24 * GIB), Machine(4, 80.0, 500 * GIB)
NAMES = {"student_model": Choice("s"), "teacher_model": Choice("t"), "dataset": Choice("d.jsonl")}


def survey_of(
    num_records: int = 4000, *, answers: Any = (), positions: int | None = 8192, width: int = 2560
) -> Survey:
    lengths = np.array([20] * 99 + [900])
    read = PromptSet([], {}, Counter(), 100, num_records)
    model = Model("m", "llama", 4_000_000_000, 36, width, 1000, positions)
    data = Data(read, lengths, np.array(answers), "")
    return Survey(model, model, Vocabulary(None, 1000), data, [])


def values(found: Survey, machine: Machine, **given: Any) -> dict[str, Any]:
    return {leaf: choice.value for leaf, choice in choose(found, machine, given).items()}


@pytest.mark.parametrize("machine", [CPU, GPUS, Machine(3, 24.0, GIB)], ids=["cpu", "4 GPUs", "3 GPUs"])
@pytest.mark.parametrize("num_records", [20, 300, 4000, 1_000_000])
@pytest.mark.parametrize(
    "given", [{}, {"group_size": 4}, {"batch_size": 24, "max_steps": 5}, {"eval_prompts": 0}]
)
def test_the_sizes_go_together(machine: Machine, num_records: int, given: dict[str, Any]) -> None:
    found = survey_of(num_records)
    chosen = choose(found, machine, given)
    config = config_of(NAMES | chosen)
    assert {leaf: chosen[leaf].value for leaf in given} == given
    assert config.train.batch_size % machine.processes == 0
    assert config.data.num_prompts + chosen["eval_prompts"].value <= found.data.num_usable
    assert config.refresh.rollouts_per_refresh >= config.refresh.refresh_every * config.train.batch_size
    assert (
        config.rollout.rollouts_per_unit * machine.processes
        <= config.refresh.rollouts_per_refresh + 4 * machine.processes
    )
    assert config.train.warmup_steps < config.train.max_steps


def test_sizes_that_decide_what_is_trained_are_the_same_on_all_gpus() -> None:
    one, four = (values(survey_of(), Machine(n, gib, GIB)) for n, gib in ((1, 24.0), (4, 80.0)))
    differing = {leaf for leaf in one | four if one.get(leaf) != four.get(leaf)}
    assert differing <= {"rollouts_per_unit", "teacher_ds_zero3"}


def test_lengths_follow_the_data_and_the_positions() -> None:
    plain = values(survey_of(), GPUS)
    assert (plain["max_prompt_tokens"], plain["max_new_tokens"]) == (64, 512)
    assert values(survey_of(answers=[100] * 100), GPUS)["max_new_tokens"] == 224
    assert values(survey_of(answers=[100] * 100), CPU)["max_new_tokens"] == 224
    assert values(survey_of(answers=[5000]), GPUS)["max_new_tokens"] == 1024
    short = values(survey_of(positions=80), GPUS)
    assert short["max_prompt_tokens"] + short["max_new_tokens"] <= 80


def test_narrow_students_and_short_runs_take_larger_steps_and_full_fine_tuning_smaller_ones() -> None:
    usual = values(survey_of(), GPUS, max_steps=256)["lr"]
    assert usual == pytest.approx(1e-4)
    assert values(survey_of(width=576), GPUS, max_steps=256)["lr"] > 2 * usual
    assert values(survey_of(), GPUS, max_steps=64)["lr"] == pytest.approx(2 * usual)
    assert values(survey_of(), GPUS, max_steps=256, use_lora=False)["lr"] == pytest.approx(usual / 10)


@pytest.mark.parametrize("given", [{"max_steps": 6, "batch_size": 8}, {"max_steps": 12}, {}], ids=str)
@pytest.mark.parametrize("other", [{}, {"eval_dataset": "e.jsonl"}], ids=["split off", "given"])
def test_evaluation_does_not_outlast_training(given: dict[str, Any], other: dict[str, Any]) -> None:
    chosen = values(survey_of(), CPU, **given, **other)
    rollouts = chosen["max_steps"] * chosen["batch_size"]
    assert 8 <= chosen["eval_prompts"] <= max(8, rollouts // 8)
    assert values(survey_of(), CPU, eval_prompts=60, **given)["eval_prompts"] == 60


def test_a_cpu_gets_a_small_run_whose_activations_fit() -> None:
    found = values(survey_of(width=576), CPU)
    assert (found["dtype"], found["batch_size"], found["max_steps"]) == ("bf16", 16, 40)
    numbers = found["micro_batch_tokens"] * 36 * 576 * sizing.LAYER_NUMBERS
    assert 4 * numbers <= 0.26 * 24 * GIB


def test_a_teacher_is_sharded_only_where_it_does_not_fit_beside_the_student() -> None:
    assert values(survey_of(), GPUS)["teacher_ds_zero3"] is False
    assert values(survey_of(), Machine(4, 24.0, GIB))["teacher_ds_zero3"] is True
    assert values(survey_of(), Machine(1, 24.0, GIB))["teacher_ds_zero3"] is False


@pytest.mark.parametrize(
    ("model", "name"),
    [("Qwen/Qwen3-4B@main", "qwen3-4b"), ("/a/My Model/", "my-model"), ("..", "run"), ("é x", "é-x")],
)
def test_a_run_is_named_after_its_student(model: str, name: str) -> None:
    assert sizing.run_name(model) == name
    assert config_of(NAMES | {"run_name": Choice(name)}).run.run_name == name


def test_all_prompts_may_be_asked_for() -> None:
    found = choose(survey_of(400), GPUS, {"num_prompts": 0, "max_steps": 10})
    assert found["num_prompts"].value == 0
    assert found["max_steps"].why.startswith("each prompt is used ")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_new_tokens": 9000}, "max_new_tokens 9,000 leaves no room for a prompt: the models take 8,192"),
        ({"eval_prompts": 400}, "eval_prompts 400 leaves no prompt to train on: the data has "),
    ],
    ids=["positions", "held out"],
)
def test_sizes_that_leave_no_room_for_prompts_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sizing._check_given(survey_of(300), given)
    sizing._check_given(survey_of(300), {"eval_prompts": 400, "eval_dataset": "e.jsonl"})


def test_small_data_is_used_whole() -> None:
    short = values(survey_of(20), CPU, batch_size=4, max_steps=2)
    assert (short["num_prompts"], short["eval_prompts"]) == (8, 8)  # of 19: evaluation stays small
    grouped = values(survey_of(20), CPU, batch_size=8, max_steps=2, group_size=4)
    assert (grouped["num_prompts"], grouped["eval_prompts"]) == (4, 8)
    usual = values(survey_of(20), CPU)
    assert (usual["num_prompts"], usual["eval_prompts"]) == (18, 1)
    assert choose(survey_of(4), GPUS, {})["eval_prompts"].value == 1
    assert choose(survey_of(2), GPUS, {})["eval_prompts"] == Choice(0, "no evaluation")
