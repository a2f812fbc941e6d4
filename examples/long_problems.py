"""Arithmetic stories of three to six steps with larger numbers, harder than those of word_problems.py.

Someone has some things, and then things are found, lost, bought in boxes, handed out, multiplied or split.
Solutions are written out as in the demo; its checker (`word_problems.py:check`) reads the answer. A hash of
the calculation decides the split, so no calculation is in two of `train`, `tuning`, `heldout` and `distil`.

    python examples/long_problems.py --split heldout --num_problems 500 > heldout.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from word_problems import NAMES, THINGS, Problem, Step

SHARES = {"heldout": 0.05, "tuning": 0.05, "distil": 0.2, "train": 0.7}
SPLITS = tuple(SHARES)
TRIES = 200  # draws for each problem wanted, before a split counts as empty

Event = tuple[str, list[Step]]


@dataclass(frozen=True)
class Difficulty:
    """The number of steps is uniform in [min_steps, max_steps]. Numbers in a story are at most `largest`,
    those in boxes at most a tenth of it (or 9), totals at most ten times as large.
    """

    min_steps: int = 3
    max_steps: int = 6
    largest: int = 999

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"steps are {self.min_steps} to {self.max_steps}; expected 1 <= min <= max.")
        if self.largest < 20:
            raise ValueError(f"largest is {self.largest}; expected 20 or more.")

    @property
    def total(self) -> int:
        return 10 * self.largest

    @property
    def boxed(self) -> int:
        return max(9, self.largest // 10)


def _found(r: random.Random, now: int, by: Difficulty) -> Event | None:
    if now + 2 > by.total:
        return None
    b = r.randint(2, min(by.largest, by.total - now))
    text = r.choice(("{n} finds %d more {t}.", "A friend gives {n} %d more {t}.", "{n} buys %d more {t}."))
    return text % b, [(now, "+", b)]


def _lost(r: random.Random, now: int, by: Difficulty) -> Event | None:
    if now < 4:
        return None
    b = r.randint(2, min(by.largest, now - 1))
    text = r.choice(("{n} loses %d {t}.", "{n} gives %d {t} to a friend.", "{n} sells %d {t}."))
    return text % b, [(now, "-", b)]


def _boxes(r: random.Random, now: int, by: Difficulty) -> Event | None:
    a, b = r.randint(2, 9), r.randint(2, by.boxed)
    if now + a * b > by.total:
        return None
    text = r.choice(("{n} buys %d boxes with %d {t} in each.", "{n} gets %d bags of %d {t}."))
    return text % (a, b), [(a, "*", b), (now, "+", a * b)]


def _handed_out(r: random.Random, now: int, by: Difficulty) -> Event | None:
    a, b = r.randint(2, 9), r.randint(2, by.boxed)
    if a * b >= now:
        return None
    text = r.choice(("{n} gives %d friends %d {t} each.", "{n} sells %d bags of %d {t}."))
    return text % (a, b), [(a, "*", b), (now, "-", a * b)]


def _multiplied(r: random.Random, now: int, by: Difficulty) -> Event | None:
    m = r.randint(2, 5)
    if now > by.largest or m * now > by.total:
        return None
    text = "{n} wins a game and then has %d times as many {t}."
    return text % m, [(now, "*", m)]


def _split(r: random.Random, now: int, by: Difficulty) -> Event | None:
    divisors = [d for d in range(2, 10) if now % d == 0 and now // d >= 2]
    if not divisors:
        return None
    d = r.choice(divisors)
    text = r.choice(
        ("{n} makes %d equal piles and keeps one pile.", "%d friends, {n} among them, share the {t} equally.")
    )
    return text % d, [(now, "/", d)]


EVENTS: tuple[Callable[[random.Random, int, Difficulty], Event | None], ...] = (
    _found,
    _lost,
    _boxes,
    _handed_out,
    _multiplied,
    _split,
)


def _result(step: Step) -> int:
    return Problem("", (step,)).answer


def draw_problem(r: random.Random, by: Difficulty) -> Problem:
    """One story; the result of each event is what the next one begins with."""
    wanted, now = r.randint(by.min_steps, by.max_steps), r.randint(2, by.largest)
    steps: list[Step] = []
    sentences = [f"{{n}} has {now} {{t}}."]
    while len(steps) < wanted:
        event = r.choice(EVENTS)(r, now, by)
        if event is None or len(steps) + len(event[1]) > wanted:
            continue
        sentences.append(event[0])
        steps += event[1]
        now = _result(steps[-1])
    sentences.append("How many {t} does {n} have now?")
    return Problem(" ".join(sentences).format(n=r.choice(NAMES), t=r.choice(THINGS)), tuple(steps))


def split_of(problem: Problem) -> str:
    """The split that the calculation belongs to, whatever its story."""
    digest = hashlib.sha256(problem.canonical.encode()).digest()
    point = int.from_bytes(digest[:4], "big") / 2**32
    for name, share in SHARES.items():
        point -= share
        if point < 0:
            return name
    return "train"


def problems(
    split: str, num_problems: int, seed: int | str = 0, by: Difficulty | None = None, distinct: bool = True
) -> Iterator[Problem]:
    """Yields `num_problems` problems of `split`, the same for the same seed.

    With `distinct`, no calculation occurs twice. Raises ValueError if the split has too few of them.
    """
    by = by or Difficulty()
    draw = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    found = 0
    for _ in range(TRIES * max(num_problems, 1)):
        if found == num_problems:
            return
        problem = draw_problem(draw, by)
        if split_of(problem) != split or (distinct and problem.canonical in seen):
            continue
        if distinct:
            seen.add(problem.canonical)
        found += 1
        yield problem
    if found < num_problems:
        raise ValueError(
            f"split {split}: {found} distinct calculations found, {num_problems} wanted; ask for fewer, or"
            f" for harder problems than {by}."
        )


def row_of(problem: Problem) -> dict[str, str | int]:
    """The problem as a line of a data set."""
    return {"question": problem.question, "answer": problem.answer, "solution": problem.solution}


def add_difficulty(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min_steps", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=6)
    parser.add_argument("--largest", type=int, default=999, help="largest number in a story")


def difficulty_of(options: argparse.Namespace) -> Difficulty:
    return Difficulty(options.min_steps, options.max_steps, options.largest)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--num_problems", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    add_difficulty(parser)
    options = parser.parse_args()
    for problem in problems(options.split, options.num_problems, options.seed, difficulty_of(options)):
        print(json.dumps(row_of(problem)))


if __name__ == "__main__":
    main()
