"""SIGKILL at random moments, the same command again until it is done: the same rows, the same student, bit for bit."""

import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache
from tests.helpers import Forker, assert_same_weights, records_of, small, weights_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_KILLS = 10
VALUES: dict[str, Any] = {
    "rollouts_per_refresh": 48, "rollouts_per_unit": 8, "max_steps": 6, "refresh_every": 3, "checkpoint_every": 2,
    "lora_dropout": 0.1, "eval_prompts": 8, "trace_every": 1,
}  # fmt: skip
STAGES = {"rollout": ["rollout"], "train": ["rollout", "train"], "pipeline": ["pipeline"]}


@dataclass
class Trial:
    """One run that is killed again and again; `seconds` are those of one start that nobody stopped."""

    forked: Forker
    stage: str
    processes: int
    root: Path
    dice: random.Random
    seconds: float
    count: int = 0
    kills: list[float] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.root / str(self.count)

    def prepare(self) -> None:
        """A new folder, in which all stages before this one are done."""
        self.count += 1
        self.folder.mkdir()
        for stage in STAGES[self.stage][:-1]:
            self.forked.stage(f"stages.{stage}", *small(self.folder, **VALUES)).expect_success()

    def start_and_kill(self) -> bool:
        """Starts the stage and kills all its processes at a random moment; False if it was done before that."""
        after = self.dice.uniform(0, self.seconds)
        workers = self.forked.start(f"stages.{self.stage}", *small(self.folder, **VALUES), processes=self.processes)
        end = time.monotonic() + after
        while time.monotonic() < end and any(worker.is_alive() for worker in workers):
            time.sleep(0.005)
        alive = all(worker.is_alive() for worker in workers)
        for worker in workers:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        if alive:
            self.kills.append(after)
        return alive

    def finish(self) -> None:
        arguments = small(self.folder, **VALUES)
        self.forked.stage(f"stages.{self.stage}", *arguments, processes=self.processes).expect_success()


def assert_same_rows(left: Path, right: Path) -> None:
    """Ids, all plain columns and the decoded signals."""
    one, other = cache.open(left), cache.open(right)
    assert one.verify() == other.verify() == []
    assert one.row_ids == other.row_ids
    assert one.to_table().equals(other.to_table())
    for a, b in zip(one[:], other[:], strict=True):
        assert isinstance(a.signal, cache.TopK)
        assert isinstance(b.signal, cache.TopK)
        for name in ("ids", "logprobs", "log_tail_mass"):
            assert np.array_equal(getattr(a.signal, name), getattr(b.signal, name))


def assert_same_result(stage: str, folder: Path, expected: Path) -> None:
    assert_same_rows(folder / "demo/cache", expected / "demo/cache")
    if stage == "rollout":
        return
    assert_same_weights(weights_in(folder / "demo/student"), weights_in(expected / "demo/student"))
    for name in ("step", "refresh"):
        found, wanted = ([r["step"] for r in records_of(f / "demo", name)] for f in (folder, expected))
        assert found == wanted, name
    if stage == "pipeline":
        for label in ("before", "after", "teacher"):
            texts = [(f / "demo/eval" / f"{label}.json").read_text() for f in (folder, expected)]
            assert json.loads(texts[0]) == json.loads(texts[1])


@pytest.mark.parametrize("stage", sorted(STAGES))
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stage_that_was_killed_again_and_again_ends_as_if_it_had_not_been(
    forked: Forker, tmp_path: Path, stage: str, processes: int
) -> None:
    seed = time.time_ns() % 2**32
    trial = Trial(forked, stage, processes, tmp_path, random.Random(seed), 0.0)
    trial.prepare()
    expected, started = trial.folder, time.monotonic()
    trial.finish()
    trial.seconds = time.monotonic() - started
    trial.prepare()
    try:
        while len(trial.kills) < NUM_KILLS:
            if not trial.start_and_kill():  # done before it could be killed: check, and begin another run
                trial.finish()
                assert_same_result(stage, trial.folder, expected)
                trial.prepare()
        trial.finish()
        assert_same_result(stage, trial.folder, expected)
    finally:
        times = ", ".join(f"{kill:.2f}" for kill in trial.kills)
        print(
            f"{stage} x {processes}: seed {seed}, {trial.count - 1} runs, killed after {times} of {trial.seconds:.2f} s"
        )
