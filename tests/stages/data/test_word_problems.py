"""The arithmetic problems: right answers, disjoint splits, a checker that can tell, and the checkpoints
beside them.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[3]
ARITHMETIC = ROOT / "examples/arithmetic"
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("word_problems", ROOT / "examples/word_problems.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["word_problems"] = module
    spec.loader.exec_module(module)
    return module


word_problems = _load()


def evaluate(solution: str) -> tuple[int, int]:
    """(answer, number of steps) of a written-out solution, each step computed anew; AssertionError where one
    is wrong.
    """
    *steps, conclusion = [part.strip() for part in solution.removesuffix(".").split(".")]
    results = []
    for step in steps:
        left, operator, right, equals, result = step.split(" ")
        assert equals == "="
        assert OPERATIONS[operator](int(left), int(right)) == int(result), step
        results.append(int(result))
    stated = int(conclusion.removeprefix("The answer is "))
    assert stated == results[-1]
    return stated, len(steps)


def canonical(solution: str) -> str:
    """The calculation alone, operands of + and * in order: what the splits may not share."""
    parts = []
    for step in [part.strip() for part in solution.removesuffix(".").split(".")][:-1]:
        left, operator, right, _, _ = step.split(" ")
        a, b = (sorted((int(left), int(right)))) if operator in "+*" else (int(left), int(right))
        parts.append(f"{a}{operator}{b}")
    return ",".join(parts)


def shipped(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ARITHMETIC / name).read_text().splitlines()]


def test_there_are_at_least_eight_templates_of_one_to_three_steps() -> None:
    names = {template.__name__ for template in word_problems.TEMPLATES}
    assert len(names) >= 8
    pool = list(word_problems.problems("train", 2000, seed=3))
    assert {len(problem.steps) for problem in pool} == {1, 2, 3}
    for template in word_problems.TEMPLATES:
        question, steps = template(word_problems.random.Random(0), "Leo", "pens")
        assert "Leo" in question
        assert 1 <= len(steps) <= 3


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_written_solution_computes_to_its_answer(split: str) -> None:
    for problem in word_problems.problems(split, 3000, seed=5):
        answer, num_steps = evaluate(problem.solution)
        assert answer == problem.answer
        assert num_steps == len(problem.steps)
        assert answer >= 0


@pytest.mark.parametrize("seed", range(20))
def test_each_template_uses_the_numbers_of_its_question(seed: int) -> None:
    for template in word_problems.TEMPLATES:
        question, steps = template(word_problems.random.Random(seed), "Leo", "pens")
        asked = [int(word) for word in "".join(c if c.isdigit() else " " for c in question).split()]
        known = set(asked)
        for left, operator, right in steps:
            assert left in known, (question, steps)
            assert right in known, (question, steps)
            known.add(int(OPERATIONS[operator](left, right)))


def test_no_calculation_is_in_both_splits() -> None:
    train = {p.canonical for p in word_problems.problems("train", 20_000, seed=0)}
    heldout = {p.canonical for p in word_problems.problems("heldout", 2000, seed=0)}
    assert not train & heldout


def test_the_canonical_problem_forgets_story_and_order_of_operands() -> None:
    problem = word_problems.Problem
    assert problem("x", ((2, "+", 9),)).canonical == problem("y", ((9, "+", 2),)).canonical
    assert problem("x", ((9, "-", 2),)).canonical != problem("x", ((2, "-", 9),)).canonical
    for p in word_problems.problems("train", 500, seed=8):
        assert p.canonical == canonical(p.solution)


def test_the_shipped_files_are_right_and_share_no_calculation() -> None:
    train, heldout = shipped("train.jsonl"), shipped("heldout.jsonl")
    assert len(train) == 3000
    assert len(heldout) == 300
    for row in train + heldout:
        assert evaluate(row["solution"])[0] == row["answer"]
        assert word_problems.check(row, row["solution"])
    assert not {canonical(row["solution"]) for row in train} & {canonical(row["solution"]) for row in heldout}
    assert not {row["question"] for row in train} & {row["question"] for row in heldout}


@pytest.mark.parametrize(
    ("completion", "accepted"),
    [
        ("2 * 8 = 16. The answer is 16.", True),
        ("The answer is 16.", True),
        ("The answer is 16. \n", True),
        ("2 * 8 = 17. The answer is 17.", False),
        ("The answer is 16", False),
        ("The answer is 16. The answer is 17.", False),
        ("The answer is 116.", False),
        ("The answer is 160.", False),
        ("16", False),
        ("", False),
    ],
)
def test_the_checker_accepts_the_stated_answer_and_nothing_else(completion: str, accepted: bool) -> None:
    assert word_problems.check({"answer": 16}, completion) is accepted


def test_the_checker_rejects_a_wrong_answer_of_every_template() -> None:
    for problem in word_problems.problems("heldout", 300, seed=9):
        assert word_problems.check({"answer": problem.answer}, problem.solution)
        assert not word_problems.check({"answer": problem.answer + 1}, problem.solution)


def test_the_same_seed_gives_the_same_problems() -> None:
    first, again, other = (list(word_problems.problems("train", 200, seed=s)) for s in (4, 4, 5))
    assert first == again
    assert first != other


def parameters(name: str) -> int:
    with safe_open(ARITHMETIC / name / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118


def test_the_student_has_at_most_three_fifths_of_the_teachers_parameters() -> None:
    assert parameters("student") <= 0.6 * parameters("teacher")


def test_the_shipped_checkpoints_are_small() -> None:
    files = [
        path for name in ("student", "teacher") for path in (ARITHMETIC / name).rglob("*") if path.is_file()
    ]
    assert sum(path.stat().st_size for path in files) <= 6.2e6


@pytest.mark.parametrize(("name", "least", "most"), [("teacher", 0.90, 1.0), ("student", 0.20, 0.45)])
def test_the_shipped_models_solve_the_share_that_the_demo_counts_on(
    request: pytest.FixtureRequest, tokenizer: Any, name: str, least: float, most: float
) -> None:
    from stages.data.prompts import encode
    from tests.support.small_models import run

    rows = shipped("heldout.jsonl")
    prompts = [encode([{"role": "user", "content": row["question"]}], row, tokenizer, {}).ids for row in rows]
    completions = run(
        request.getfixturevalue(f"{name}_model"),
        prompts,
        56,
        greedy=True,
        vocab_size=len(tokenizer),
        eos_ids=(tokenizer.eos_token_id,),
    )
    texts = [tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
    solved = sum(word_problems.check(row, text) for row, text in zip(rows, texts, strict=True)) / len(rows)
    assert least <= solved <= most
