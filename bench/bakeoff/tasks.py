"""What is distilled: pairs of models, prompts, and the sizes of a run; cells, and their order of value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.bakeoff.arms import ARMS, OBJECTIVES
from bench.measuring import ROOT, Record

DEFAULT_SIGNAL = "topk-64"
SEEDS = (0, 1, 2)
HORIZON, HORIZON_LONGER = 0.25, 1.5


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run, equal for all arms. `num_samples`: checked completions of each held-out prompt."""

    steps: int = 64
    batch_size: int = 64
    refresh_every: int = 16
    max_new_tokens: int = 128
    max_prompt_tokens: int = 400
    warmup_steps: int = 4
    heldout: int = 150
    num_samples: int = 0
    slots: int = 320
    forward_tokens: int = 16_384


@dataclass(frozen=True)
class Task:
    """A teacher, its students and prompts. Paths are relative to the folder `--data`.

    Attributes:
        lr: the learning rate that all arms share; `sweep`: factors on it that are tried as well.
        checker: as the configuration's answer_checker, relative to the repository; "" without answers.
        keys: further configuration keys.
        measures_outside: whether to measure perplexity on the text of outside.jsonl.
    """

    teacher: str
    students: dict[str, str]
    train: str
    heldout: str
    lr: float
    sizes: Sizes
    keys: dict[str, Any]
    sweep: tuple[float, ...] = (0.5, 2.0)
    checker: str = ""
    measures_outside: bool = False

    @property
    def main_student(self) -> str:
        return next(iter(self.students))


FULL = {"use_lora": False, "gradient_checkpointing": False, "compile": False, "teacher_ds_zero3": False}
"""All weights are trained: the students are small, and LoRA would add its rank to every comparison."""
TASKS = {
    "real": Task(
        "models/smollm2-135m",
        {"24l": "models/smollm2-24l", "26l": "models/smollm2-26l", "22l": "models/smollm2-22l"},
        "prompts/train.jsonl",
        "prompts/heldout.jsonl",
        lr=2e-4,
        sizes=Sizes(),
        keys=FULL | {"dtype": "bf16", "teacher_dtype": "bf16"},
        measures_outside=True,
    ),
    "arithmetic": Task(
        "arithmetic/teacher",
        {"quarter": "arithmetic/student"},
        "arithmetic/distil.jsonl",
        "arithmetic/heldout.jsonl",
        lr=4e-4,
        sizes=Sizes(
            batch_size=128, max_new_tokens=192, max_prompt_tokens=256, heldout=200, num_samples=16, slots=1024
        ),
        keys=FULL | {"dtype": "bf16", "teacher_dtype": "bf16"},
        checker="examples/word_problems.py:check",
    ),
    "demo": Task(
        f"{ROOT}/examples/arithmetic/teacher",
        {"demo": f"{ROOT}/examples/arithmetic/student"},
        f"{ROOT}/examples/arithmetic/train.jsonl",
        f"{ROOT}/examples/arithmetic/heldout.jsonl",
        lr=1e-3,
        sizes=Sizes(
            steps=48,
            batch_size=32,
            max_new_tokens=56,
            max_prompt_tokens=96,
            heldout=100,
            num_samples=4,
            slots=256,
        ),
        keys=FULL | {"dtype": "fp32", "teacher_dtype": "fp32"},
        checker="examples/word_problems.py:check",
    ),
}
TINY = Sizes(
    steps=4,
    batch_size=4,
    refresh_every=2,
    max_new_tokens=24,
    warmup_steps=1,
    heldout=6,
    num_samples=2,
    slots=12,
)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        refresh: "" as the task's sizes, steps between refreshes, "never", or "drift-NATS".
        signal: KIND-SIZE of the teacher's signal.
        horizon: share of max_new_tokens that the first refresh writes; it grows to 1 by the last. 1: off.
        longer: steps, relative to the task's.
    """

    task: str
    student: str
    arm: str
    lr: float
    seed: int
    refresh: str = ""
    signal: str = DEFAULT_SIGNAL
    horizon: float = 1.0
    longer: float = 1.0

    @property
    def name(self) -> str:
        parts = [self.task, self.student, self.arm, f"lr{self.lr:g}"]
        parts += [f"refresh-{self.refresh}"] * bool(self.refresh)
        parts += [self.signal] * (self.signal != DEFAULT_SIGNAL)
        parts += [f"horizon{self.horizon:g}"] * (self.horizon < 1)
        parts += [f"longer{self.longer:g}"] * (self.longer != 1)
        return ".".join([*parts, f"s{self.seed}"])

    @property
    def group(self) -> Cell:
        """The same cell for all seeds."""
        return replace(self, seed=-1)

    @property
    def mean_gate_of(self) -> Cell | None:
        """The cell whose mean λ is this one's constant λ."""
        mean_of = ARMS[self.arm].mean_of
        return replace(self, arm=mean_of) if mean_of else None


@dataclass(frozen=True)
class Start:
    """What the cells of a seed share: the first cache, the measurement before training, and thresholds."""

    task: str
    student: str
    seed: int
    signal: str = DEFAULT_SIGNAL

    @property
    def name(self) -> str:
        parts = [self.task, self.student, "start"] + [self.signal] * (self.signal != DEFAULT_SIGNAL)
        return ".".join([*parts, f"s{self.seed}"])


@dataclass(frozen=True)
class Contender:
    """A program that trains the student.

    Attributes:
        arm: the objective of this project's own run; "" is TRL.
        as_long_as: the contender whose speed tells how many steps fill the seconds; "": the task's steps.
        batch_factor: TRL's rollouts per step, relative to the task's.
    """

    what: str
    arm: str = ""
    as_long_as: str = ""
    batch_factor: int = 1
    use_vllm: bool = False


CONTENDERS = {
    "ours-reverse": Contender("this project, reverse KL", "reverse"),
    "trl": Contender("TRL, transformers' generate"),
    "trl-vllm": Contender("TRL, vLLM", use_vllm=True),
    "ours-reverse-long": Contender("this project, reverse KL, all of the time", "reverse", "ours-reverse"),
    "ours-mix": Contender("this project, λ = 0.5", "mix-0.5"),
    "ours-mix-long": Contender("this project, λ = 0.5, all of the time", "mix-0.5", "ours-mix"),
    "ours-soft": Contender("this project, gate on R, soft", "soft"),
    "ours-soft-long": Contender("this project, gate on R, soft, all of the time", "soft", "ours-soft"),
    "trl-x4": Contender("TRL, transformers' generate, 4 × the batch", batch_factor=4),
    "trl-vllm-x4": Contender("TRL, vLLM, 4 × the batch", batch_factor=4, use_vllm=True),
}


@dataclass(frozen=True)
class Rival:
    """A contender's run from the seed's start, measured at points of its own wall time.

    TRL trains for `seconds`, this project for the task's steps, or for as many as fill the seconds.
    """

    task: str
    student: str
    contender: str
    lr: float
    seed: int
    seconds: int = 60

    @property
    def name(self) -> str:
        return f"{self.task}.{self.student}.rival-{self.contender}.lr{self.lr:g}.t{self.seconds}.s{self.seed}"

    @property
    def group(self) -> Rival:
        """The same for all seeds."""
        return replace(self, seed=-1)

    @property
    def pilot(self) -> Rival | None:
        """The run whose speed decides how many steps this one takes."""
        name = CONTENDERS[self.contender].as_long_as
        return replace(self, contender=name) if name else None

    @property
    def cell(self) -> Cell:
        """The cell whose configuration it has; TRL's is that of reverse KL."""
        arm = CONTENDERS[self.contender].arm or "reverse"
        return Cell(self.task, self.student, arm, self.lr, self.seed)


Job = Cell | Start | Rival


# --- results ---


class Results:
    """A folder of records, one JSON file each. A record counts while its settings are those asked for."""

    def __init__(self, folder: Path, sizes: Callable[[str], Sizes], journal: Path | None = None) -> None:
        self.folder, self.journal, self._sizes = folder, journal, sizes
        folder.mkdir(parents=True, exist_ok=True)
        self.all: dict[str, Record] = {
            p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))
        }

    def get(self, job: Job | str) -> Record | None:
        name = job if isinstance(job, str) else job.name
        record = self.all.get(name)
        if record is None or record["sizes"] != asdict(self._sizes(name.split(".")[0])):
            return None
        return record

    def put(self, name: str, record: Record) -> None:
        """Write the record, and append it to the journal, which takes one line a record."""
        self.all[name] = record
        partial, path = self.folder / f"{name}.tmp", self.folder / f"{name}.json"
        partial.write_text(json.dumps(record) + "\n")
        partial.replace(path)
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(json.dumps({"name": name, "record": record}) + "\n")

    def take(self, journal: Path) -> int:
        """Write the records of a journal that are not here yet; return their number."""
        lines = [line for line in journal.read_text().splitlines() if line.endswith("}")]
        found = {entry["name"]: entry["record"] for entry in map(json.loads, lines)}
        new = {name: record for name, record in found.items() if self.all.get(name) != record}
        for name, record in new.items():
            self.put(name, record)
        return len(new)


def mean_kl(measured: Record) -> float:
    """Mean of forward and reverse KL on the student's own and on the teacher's text."""
    parts = [measured[on][kl] for on in ("on_student", "on_teacher") for kl in ("forward_kl", "reverse_kl")]
    return float(sum(parts) / len(parts))


def quality(record: Record) -> float:
    """What decides between learning rates, larger is better: avg@k, else minus the mean of the four KLs."""
    after = record["after"]
    return -mean_kl(after) if after.get("avg") is None else float(after["avg"])


# --- order of value ---


def plan(results: Results, tasks: list[str], students: dict[str, list[str]]) -> Iterator[Job]:
    """All cells, the most valuable first; learning rates other than the shared one as results allow."""
    pairs = [(task, student) for task in tasks for student in students[task]]
    main = [pair for pair in pairs if pair[1] == TASKS[pair[0]].main_student]
    for phase in (_objectives, _sweeps, _best_rates, _refreshes, _signals, _supports, _horizons):
        for seeds in ((0,), SEEDS[1:]):
            for pair in main:
                yield from phase(results, *pair, seeds)
    for pair in pairs:
        if pair not in main:
            for arm in ("reverse", "soft", "forward", "mix-mean"):
                yield from (Cell(*pair, arm, TASKS[pair[0]].lr, seed) for seed in SEEDS)


def headline(tasks: list[str], students: dict[str, list[str]]) -> Iterator[Cell]:
    """The row that the first sentences of docs/results.md rest on, with one seed."""
    for task in tasks:
        for student in students[task]:
            for arm in ("reverse", "soft", "forward", "mix-mean"):
                yield Cell(task, student, arm, TASKS[task].lr, SEEDS[0])


def rivals(tasks: list[str], students: dict[str, list[str]], seconds: int) -> Iterator[Rival]:
    """All contenders at the task's rate, then TRL's generate at other rates, then further seeds."""
    pairs = [(task, student) for task in tasks for student in students[task]]
    first, later = SEEDS[0], SEEDS[1:]
    for pair in pairs:
        rate, sweep = TASKS[pair[0]].lr, TASKS[pair[0]].sweep
        yield from (Rival(*pair, name, rate, first, seconds) for name in CONTENDERS)
        yield from (Rival(*pair, "trl", rate * factor, first, seconds) for factor in sweep)
        yield from (Rival(*pair, name, rate, seed, seconds) for seed in later for name in CONTENDERS)


def _objectives(results: Results, task: str, student: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    for seed in seeds:
        for arm in OBJECTIVES:
            yield Cell(task, student, arm, TASKS[task].lr, seed)


def _sweeps(results: Results, task: str, student: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    """Other learning rates, with seed 0."""
    for factor in TASKS[task].sweep if 0 in seeds else ():
        for arm in OBJECTIVES:
            yield Cell(task, student, arm, TASKS[task].lr * factor, 0)


def _best_rates(results: Results, task: str, student: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    """Each arm at its own best rate, once its sweep is done."""
    for arm in OBJECTIVES:
        best = best_rate(results, task, student, arm)
        if best is not None:
            yield from (Cell(task, student, arm, best, seed) for seed in seeds)


def best_rate(results: Results, task: str, student: str, arm: str) -> float | None:
    """The rate at which the arm ends best with seed 0; None until all of them are done."""
    rates = [TASKS[task].lr * factor for factor in (1.0, *TASKS[task].sweep)]
    found = {rate: results.get(Cell(task, student, arm, rate, 0)) for rate in rates}
    if any(record is None for record in found.values()):
        return None
    return max(rates, key=lambda rate: quality(found[rate] or {}))


def _refreshes(results: Results, task: str, student: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    for refresh in ("never", "4", "drift-0.05", "1"):
        for arm in ("reverse", "forward", "soft"):
            yield from (Cell(task, student, arm, TASKS[task].lr, seed, refresh=refresh) for seed in seeds)


def _signals(results: Results, task: str, student: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    for signal in ("topk-8", "topk-16", "topk-256", "nucleus-0.99", "hidden-0"):
        for arm in ("soft", "reverse", "forward"):
            yield from (Cell(task, student, arm, TASKS[task].lr, seed, signal=signal) for seed in seeds)


def _supports(results: Results, task: str, student: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    for signal in ("topk-8", DEFAULT_SIGNAL):
        for arm in ("soft-renormalised", "reverse-renormalised", "forward-renormalised"):
            yield from (Cell(task, student, arm, TASKS[task].lr, seed, signal=signal) for seed in seeds)


def _horizons(results: Results, task: str, student: str, seeds: tuple[int, ...]) -> Iterator[Cell]:
    """At equal steps and rows; then with the steps that make up for the shorter completions.

    With a refresh every quarter of the steps the limit is 62.5 % of the full one on average, with six
    refreshes in 1.5 times the steps 65 %: 0.98 of the tokens, if all completions reach the limit.
    """
    for arm in ("soft", "reverse"):
        for seed in seeds:
            first = Cell(task, student, arm, TASKS[task].lr, seed, horizon=HORIZON)
            yield from (first, replace(first, longer=HORIZON_LONGER))
