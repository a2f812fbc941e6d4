"""Arithmetic word problems with written-out steps and an answer that a program can check.

A problem is drawn from one of fourteen templates (one to three steps, numbers up to 198). Its *canonical
problem* is the calculation without the story, operands of + and * in order, e.g. `2*8,71-16`. A hash of it
decides the split, so no calculation of the held-out set occurs in the training set under whatever names and
things.

    python examples/word_problems.py --split train --num_problems 3000 --seed 0 > train.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = ("Leo", "Mia", "Sam", "Ana", "Tom", "Eva", "Ben", "Zoe", "Max", "Ida")
THINGS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "cups", "eggs", "toys")
HELDOUT_SHARE = 0.1

Step = tuple[int, str, int]


@dataclass(frozen=True)
class Problem:
    """One word problem; `steps` are (left, operator, right), each result feeding a later step or being the
    answer.
    """

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return _result(self.steps[-1])

    @property
    def solution(self) -> str:
        """The written-out reasoning, e.g. `2 * 8 = 16. 71 - 16 = 55. The answer is 55.`"""
        lines = [f"{a} {op} {b} = {_result((a, op, b))}." for a, op, b in self.steps]
        return " ".join([*lines, f"The answer is {self.answer}."])

    @property
    def canonical(self) -> str:
        """The calculation without the story; + and * have their operands in ascending order."""
        ordered = [(min(a, b), op, max(a, b)) if op in "+*" else (a, op, b) for a, op, b in self.steps]
        return ",".join(f"{a}{op}{b}" for a, op, b in ordered)

    @property
    def split(self) -> str:
        digest = hashlib.sha256(self.canonical.encode()).digest()
        return "heldout" if int.from_bytes(digest[:4], "big") < HELDOUT_SHARE * 2**32 else "train"


def _result(step: Step) -> int:
    a, op, b = step
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]


def _buy(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, b = r.randint(2, 99), r.randint(2, 99)
    return f"{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", [(a, "+", b)]


def _lose(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a = r.randint(10, 99)
    b = r.randint(2, a - 1)
    return f"{n} had {a} {t} but lost {b} of them. How many {t} are left?", [(a, "-", b)]


def _boxes(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, b, c = r.randint(2, 9), r.randint(2, 12), r.randint(2, 60)
    question = f"{n} has {a} boxes with {b} {t} in each box, and {c} loose {t}. How many {t} in all?"
    return question, [(a, "*", b), (a * b, "+", c)]


def _reads(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, b = r.randint(2, 9), r.randint(2, 10)
    c = r.randint(a * b + 1, 99)
    question = (
        f"{n} reads {a} pages a day for {b} days. The book has {c} pages. How many pages are still to read?"
    )
    return question, [(a, "*", b), (c, "-", a * b)]


def _gives(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, b = r.randint(5, 90), r.randint(5, 90)
    c = r.randint(2, min(90, a + b - 1))
    question = f"{n} had {a} {t}, found {b} more, and gave {c} to a friend. How many {t} does {n} have left?"
    return question, [(a, "+", b), (a + b, "-", c)]


def _shares(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    b, q, c = r.randint(2, 9), r.randint(2, 11), r.randint(2, 40)
    a = b * q
    question = (
        f"{n} and friends share {a} {t} equally among {b} people. Then {n} finds {c} more."
        f" How many {t} has {n}?"
    )
    return question, [(a, "/", b), (q, "+", c)]


def _price(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, b = r.randint(2, 9), r.randint(2, 10)
    c = r.randint(a * b + 1, 99)
    question = (
        f"{n} buys {a} {t} for {b} dollars each and pays with {c} dollars. How much money does {n} get back?"
    )
    return question, [(a, "*", b), (c, "-", a * b)]


def _older(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, b, c = r.randint(5, 40), r.randint(2, 40), r.randint(2, 20)
    question = f"{n} is {a} years old. A cousin is {b} years older. How old will the cousin be in {c} years?"
    return question, [(a, "+", b), (a + b, "+", c)]


def _twice(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, m = r.randint(3, 30), r.randint(2, 5)
    question = f"{n} has {a} {t}. A friend has {m} times as many. How many {t} do they have together?"
    return question, [(a, "*", m), (a, "+", a * m)]


def _packs(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    b, q = r.randint(2, 9), r.randint(3, 11)
    total = b * q
    c = r.randint(1, total - 1)
    question = (
        f"{n} has {total - c} {t} and gets {c} more, then packs them in bags of {b}. How many bags are there?"
    )
    return question, [(total - c, "+", c), (total, "/", b)]


def _rows(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    b, q = r.randint(2, 9), r.randint(2, 10)
    a = b * q
    c = r.randint(2, 10)
    question = f"{n} puts {a} {t} in {b} equal rows. How many {t} are in {c} such rows?"
    return question, [(a, "/", b), (q, "*", c)]


def _two_shops(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, b, c, d = r.randint(2, 9), r.randint(2, 9), r.randint(2, 9), r.randint(2, 9)
    question = f"{n} buys {a} bags of {b} {t} and {c} bags of {d} {t}. How many {t} does {n} buy?"
    return question, [(a, "*", b), (c, "*", d), (a * b, "+", c * d)]


def _saves(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a, b, c = r.randint(2, 9), r.randint(3, 10), r.randint(5, 60)
    d = r.randint(2, min(90, a * b + c - 1))
    question = (
        f"{n} saves {a} dollars a week for {b} weeks, gets {c} dollars as a gift and spends {d}."
        " How much is left?"
    )
    return question, [(a, "*", b), (a * b, "+", c), (a * b + c, "-", d)]


def _loses_twice(r: random.Random, n: str, t: str) -> tuple[str, list[Step]]:
    a = r.randint(40, 99)
    b = r.randint(2, a - 20)
    c = r.randint(2, a - b - 1)
    question = f"There are {a} {t} on a table. {n} takes {b} and a friend takes {c}. How many {t} stay there?"
    return question, [(a, "-", b), (a - b, "-", c)]


TEMPLATES: tuple[Callable[[random.Random, str, str], tuple[str, list[Step]]], ...] = (
    _buy,
    _lose,
    _boxes,
    _reads,
    _gives,
    _shares,
    _price,
    _older,
    _twice,
    _packs,
    _rows,
    _two_shops,
    _saves,
    _loses_twice,
)


def problems(split: str, num_problems: int, seed: int) -> Iterator[Problem]:
    """Yields `num_problems` problems of `split` ("train" or "heldout"), the same for the same seed."""
    draw = random.Random(f"{split}-{seed}")
    found = 0
    while found < num_problems:
        question, steps = draw.choice(TEMPLATES)(draw, draw.choice(NAMES), draw.choice(THINGS))
        problem = Problem(question, tuple(steps))
        if problem.split == split:
            found += 1
            yield problem


def check(row: dict, completion: str) -> bool:
    """True if `completion` ends in `The answer is N.` with the N of `row["answer"]`.

    (An `answer_checker` of stage code.)
    """
    found = re.search(r"The answer is (\d+)\.\s*$", completion)
    return found is not None and found.group(1) == str(row["answer"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=["train", "heldout"], required=True)
    parser.add_argument("--num_problems", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for problem in problems(options.split, options.num_problems, options.seed):
        print(
            json.dumps({"question": problem.question, "answer": problem.answer, "solution": problem.solution})
        )


if __name__ == "__main__":
    main()
