"""The harder arithmetic task: right solutions, disjoint splits, and checkpoints that the pipeline accepts."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from stages.data.checkers import load_checker
from tests.support.helpers import ROOT, run_python

sys.path.insert(0, str(ROOT / "examples"))
import long_problems
import make_long_checkpoints as script

EASY = long_problems.Difficulty(1, 2, 20)
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}


@pytest.mark.parametrize("by", [long_problems.Difficulty(), EASY, long_problems.Difficulty(5, 8, 5000)])
def test_solutions_compute_and_use_the_numbers_of_the_story(by: long_problems.Difficulty) -> None:
    lengths = set()
    for problem in long_problems.problems("train", 1500, 1, by, distinct=False):
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        *steps, conclusion = problem.solution.removesuffix(".").split(". ")
        for step in steps:
            left, operator, right, _, result = step.split(" ")
            assert {int(left), int(right)} <= known, problem
            assert OPERATIONS[operator](int(left), int(right)) == int(result) <= by.total
            known.add(int(result))
        assert conclusion == f"The answer is {int(result)}"
        lengths.add(len(steps))
    assert lengths == set(range(by.min_steps, by.max_steps + 1))


def test_no_calculation_is_in_two_splits_or_twice_in_one() -> None:
    splits = {
        split: [p.canonical for p in long_problems.problems(split, 400, 2, EASY)]
        for split in ("train", "tuning", "heldout", "distil")
    }
    together = [canonical for split in splits.values() for canonical in split]
    assert len(set(together)) == len(together) == 1600


def test_a_split_with_too_few_calculations_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_problems, "TRIES", 20)
    with pytest.raises(ValueError, match=r"split heldout: .* found, 5000 wanted; ask for fewer"):
        list(long_problems.problems("heldout", 5000, 0, long_problems.Difficulty(1, 1, 20)))
    with pytest.raises(ValueError, match="steps are 4 to 3"):
        long_problems.Difficulty(4, 3)


def test_the_checker_of_the_pipeline_accepts_the_answer_and_no_other() -> None:
    checker = load_checker(str(ROOT / "examples/word_problems.py:check"))
    assert checker is not None
    for problem in long_problems.problems("heldout", 200):
        row = long_problems.row_of(problem)
        assert checker(row, problem.solution)
        assert not checker(row | {"answer": problem.answer + 1}, problem.solution)


def test_data_is_the_same_for_any_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "GENERATED_TOGETHER", 40)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = script.make_tokenizer(long_problems.problems("train", 500))
    one, two = (script.make_data(tokenizer, 100, 296, 0, long_problems.Difficulty(), n) for n in (1, 2))
    assert torch.equal(one.ids, two.ids)
    ids, labels = one.batch(torch.arange(3), 296)
    text = tokenizer.decode(labels[0][labels[0] != -100])
    assert re.fullmatch(r"\d+ [-+*/] \d+ = .* The answer is \d+\.<\|end\|>", text)
    assert tokenizer.decode(ids[0, : one.lengths[0]]).endswith(f"now?<|assistant|>{text}")


def test_an_epoch_of_batches_has_each_row_once_without_much_padding() -> None:
    lengths = torch.randint(60, 200, (5000,), generator=torch.Generator().manual_seed(0))
    rows: list[int] = []
    plan = script.batches(lengths, 1000, 0)
    while len(rows) < 4500:
        width, batch = next(plan)
        assert width - 16 < lengths[batch].min()
        assert lengths[batch].max() <= width
        rows += batch.tolist()
    assert len(set(rows)) == len(rows)


def test_small_checkpoints_are_trained_and_run_through_the_pipeline(tmp_path: Path) -> None:
    made = tmp_path / "made"
    sizes = "--teacher_width 28 --student_width 14 --teacher_layers 2 --student_layers 1 --teacher_steps 4"
    sizes += (
        " --student_steps 3 --batch_tokens 1000 --teacher_eval_every 2 --device cpu --no-bf16 --no-compile"
    )
    sizes += " --num_train 400 --num_distil 60 --num_heldout 20 --num_tuning 40 --workers 1 --min_steps 1"
    sizes += " --max_steps 2 --warmup 1"
    assert script.main(["--out", str(made), *sizes.split()]) == 1  # it solves nothing yet, and says so
    record = json.loads((made / "teacher.json").read_text())["result"]
    assert record["steps"] == 4
    assert record["greedy"] == 0
    run_python(
        *("-m", "stages.cli", "run", "demo", "--runs_dir", str(tmp_path), "--run_name", "tried"),
        *("--student_model", str(made / "student"), "--teacher_model", str(made / "teacher")),
        *("--dataset", str(made / "distil.jsonl"), "--eval_dataset", str(made / "heldout.jsonl")),
        *("--max_prompt_tokens", "160", "--max_new_tokens", "24", "--rollouts_per_refresh", "16"),
        *("--rollouts_per_unit", "16", "--batch_size", "8", "--max_steps", "2", "--eval_prompts", "8"),
        *("--warmup_steps", "1", "--refresh_every", "0"),
    ).expect_success()
    assert (tmp_path / "tried/report.json").exists()
