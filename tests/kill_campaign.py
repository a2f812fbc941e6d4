"""Kill commands at random moments, rerun them until done, and compare with uninterrupted runs.

    python -m tests.kill_campaign --kills 300 --seed 1 --workers 2 [--minutes 60] [--output kills.json]

Kinds: stage one, stage two with inline refreshes and the pipeline, each in 1, 2 and 4 processes; stage two
next to a follower (external refreshes); `cache export`. Signals: SIGKILL to all processes or one of them,
SIGTERM and SIGINT to all. Moments: any, or while a checkpoint or a shard is being written. After the last
kill the command runs to its end: all columns of rows, decoded signals, steps, refreshes, evaluations and the
student must equal those of the uninterrupted run bit for bit, with no partial files left. SIGTERM and SIGINT
must end a command within a minute, with exit code 143 or 130 and no traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import cache
from tests.support.helpers import (
    Forker,
    assert_same_weights,
    environment,
    make_forker,
    records_of,
    small,
    weights_in,
)

ROOT = Path(__file__).resolve().parent.parent
VALUES: dict[str, Any] = {
    "rollouts_per_refresh": 48,
    "rollouts_per_unit": 8,
    "max_steps": 6,
    "refresh_every": 3,
    "checkpoint_every": 2,
    "lora_dropout": 0.1,
    "eval_prompts": 8,
}
EXTERNAL = {"refresh_mode": "external", "max_age": 2}
BEFORE = {"rollout": [], "train": ["rollout"], "pipeline": [], "external": [], "export": ["rollout"]}
KINDS = [(kind, n) for n in (1, 2, 4) for kind in ("rollout", "train", "pipeline")] + [
    ("external", 1),
    ("export", 1),
]
WAYS = ("kill all", "kill all", "kill one", "terminate", "interrupt")
MOMENTS = ("any", "any", "checkpoint", "shard")
CODES = {"terminate": (signal.SIGTERM, 143), "interrupt": (signal.SIGINT, 130)}
PATIENCE = 60.0  # seconds for a command to end after SIGTERM, and for peers after one is killed


@dataclass
class Command:
    """A running command: its processes and their output."""

    workers: list[Any]
    where: Path

    @property
    def is_alive(self) -> bool:
        return all(worker.is_alive() for worker in self.workers)

    def send(self, number: int, workers: list[Any] | None = None) -> None:
        for worker in self.workers if workers is None else workers:
            if worker.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    def join(self, seconds: float) -> bool:
        """Whether all its processes end within that time."""
        end = time.monotonic() + seconds
        for worker in self.workers:
            worker.join(max(0.0, end - time.monotonic()))
        return not any(worker.is_alive() for worker in self.workers)

    def errors(self) -> str:
        return "".join(path.read_text() for path in sorted(self.where.glob("err-*")))


@dataclass
class Kind:
    """A kind of run, with the result and duration of an uninterrupted one."""

    forked: Forker
    name: str
    processes: int
    expected: Path = Path()
    seconds: float = 0.0

    def prepare(self, folder: Path) -> None:
        """A new folder with all earlier stages done."""
        folder.mkdir(parents=True)
        for stage in BEFORE[self.name]:
            self.forked.stage(f"stages.{stage}", *small(folder, **VALUES)).expect_success()

    def start(self, folder: Path) -> list[Command]:
        if self.name == "external":
            flags = small(folder, **(VALUES | EXTERNAL))
            return [
                self._start("stages.train", flags),
                self._start("stages.rollout", ["--follow", str(folder / "demo"), *flags]),
            ]
        if self.name == "export":
            out = str(folder / "exported")
            return [
                self._start("cache.__main__", ["export", "--to", "parquet", str(folder / "demo/cache"), out])
            ]
        return [self._start(f"stages.{self.name}", small(folder, **VALUES))]

    def _start(self, module: str, arguments: list[str]) -> Command:
        return Command(*self.forked.launch(module, *arguments, processes=self.processes))

    def finish(self, folder: Path) -> None:
        for command in self.start(folder):
            if not command.join(600):
                command.send(signal.SIGKILL)
                raise AssertionError(f"it did not end in 600 s\n{command.errors()[-3000:]}")
            codes = [worker.exitcode for worker in command.workers]
            exists = self.name == "export" and "is not empty" in command.errors()
            assert exists or not any(codes), f"exit codes {codes}\n{command.errors()[-3000:]}"

    def measure(self, folder: Path) -> None:
        """Do the uninterrupted reference run; its refreshes are inline."""
        undisturbed = Kind(self.forked, "pipeline", 1) if self.name == "external" else self
        self.prepare(folder)
        started = time.monotonic()
        if self.name == "external":
            for stage in ("rollout", "train"):
                self.forked.stage(f"stages.{stage}", *small(folder, **VALUES)).expect_success()
        else:
            undisturbed.finish(folder)
        self.expected, self.seconds = folder, time.monotonic() - started

    def compare(self, folder: Path) -> None:
        """AssertionError if `folder` differs from the uninterrupted run."""
        if self.name == "export":
            left, right = (sorted((f / "exported").rglob("*.parquet")) for f in (folder, self.expected))
            assert [path.name for path in left] == [path.name for path in right]
            assert all(a.read_bytes() == b.read_bytes() for a, b in zip(left, right, strict=True)), (
                "exported bytes"
            )
        else:
            assert_same_rows(folder / "demo/cache", self.expected / "demo/cache")
        if self.name in ("train", "pipeline", "external"):
            assert_same_weights(
                weights_in(folder / "demo/student"), weights_in(self.expected / "demo/student")
            )
            for name in ("step", "refresh"):
                found, wanted = (
                    [r["step"] for r in records_of(f / "demo", name)] for f in (folder, self.expected)
                )
                assert found == wanted, f"{name} records {found} instead of {wanted}"
        if self.name == "pipeline":
            for label in ("before", "after", "teacher"):
                texts = [(f / "demo/eval" / f"{label}.json").read_text() for f in (folder, self.expected)]
                assert json.loads(texts[0]) == json.loads(texts[1]), f"eval/{label}.json"
        left_over = [
            str(path) for path in folder.rglob("*") if ".partial" in path.name or path.name.endswith(".tmp")
        ]
        assert not left_over, f"left over: {left_over}"


def assert_same_rows(left: Path, right: Path) -> None:
    """Compare ids, all plain columns and the decoded signals."""
    one, other = cache.open(left), cache.open(right)
    assert one.verify() == other.verify() == []
    assert one.row_ids == other.row_ids
    assert one.to_table().equals(other.to_table())
    for a, b in zip(one[:], other[:], strict=True):
        assert isinstance(a.signal, cache.TopK)
        assert isinstance(b.signal, cache.TopK)
        for name in ("ids", "logprobs", "log_tail_mass"):
            assert np.array_equal(getattr(a.signal, name), getattr(b.signal, name))


@dataclass
class Trial:
    """One run of a kind that is killed `ends` times."""

    kind: Kind
    folder: Path
    dice: random.Random
    landed: list[dict[str, Any]] = field(default_factory=list)

    def run(self, ends: int) -> None:
        self.kind.prepare(self.folder)
        for _ in range(ends):
            self._start_and_end()
        self.kind.finish(self.folder)
        self.kind.compare(self.folder)

    def _start_and_end(self) -> None:
        way, moment = self.dice.choice(WAYS), self.dice.choice(MOMENTS)
        commands = self.kind.start(self.folder)
        started = time.monotonic()
        self._wait(commands, moment)
        victim = self.dice.choice(commands)
        landed = victim.is_alive
        after = round(time.monotonic() - started, 2)
        try:
            if landed:
                self._end(victim, way)
                self.landed.append({"way": way, "moment": moment, "after": after})
        finally:
            for command in commands:
                command.send(signal.SIGKILL)
                command.join(30)

    def _wait(self, commands: list[Command], moment: str) -> None:
        until = time.monotonic() + self.dice.uniform(0, self.kind.seconds)
        seen = _writing(self.folder, moment)
        while time.monotonic() < until and all(command.is_alive for command in commands):
            if moment != "any" and _writing(self.folder, moment) - seen:
                return
            time.sleep(0.002)

    def _end(self, victim: Command, way: str) -> None:
        if way == "kill all":
            victim.send(signal.SIGKILL)
        elif way == "kill one":
            victim.send(signal.SIGKILL, [self.dice.choice(victim.workers)])
            if len(victim.workers) > 1:  # the others notice, or a launcher ends them
                time.sleep(1.0)
                victim.send(signal.SIGTERM)
                victim.join(5)
        else:
            number, code = CODES[way]
            victim.send(number)
            if not victim.join(PATIENCE):
                raise AssertionError(f"{way}: not ended after {PATIENCE:.0f} s\n{victim.errors()[-3000:]}")
            codes = {worker.exitcode for worker in victim.workers}
            assert codes <= {code, -number, 0}, f"{way}: exit codes {codes}\n{victim.errors()[-3000:]}"
            assert "Traceback" not in victim.errors(), victim.errors()[-3000:]


def _writing(folder: Path, moment: str) -> set[str]:
    """Files of a checkpoint or the cache that are being written, or have just been."""
    below = folder / "demo" / {"checkpoint": "checkpoints", "shard": "cache/shards"}.get(moment, "nowhere")
    return {str(path) for path in below.glob("*")}


def campaign(
    forked: Forker,
    folder: Path,
    kills: int,
    seed: int,
    kinds: list[tuple[str, int]] = KINDS,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Run random kinds until `kills` have landed or time is up; counts by kind, way, moment, and failures."""
    end = time.monotonic() + 60 * minutes
    dice, ready = random.Random(seed), {}
    counts: Counter[str] = Counter()
    failed: list[str] = []
    trials = landed = 0
    while landed < kills and trials < 3 * kills + 10 and time.monotonic() < end:
        name, processes = dice.choice(kinds)
        trials += 1
        place, number = folder / f"trial-{trials}", dice.choice((1, 2, 2, 3))
        if (name, processes) not in ready:
            ready[name, processes] = Kind(forked, name, processes)
            ready[name, processes].measure(folder / f"expected-{name}-{processes}")
        trial = Trial(ready[name, processes], place, random.Random(dice.random()))
        try:
            trial.run(number)
            shutil.rmtree(place)
        except (AssertionError, OSError, ValueError) as error:
            failed.append(f"seed {seed}, trial {trials}, {name} x {processes}, {trial.landed}: {error}")
            print(f"FAILED {failed[-1]}", flush=True)
        landed += len(trial.landed)
        for one in trial.landed:
            counts.update([f"{name} x {processes}", one["way"], f"moment: {one['moment']}"])
        how = (
            ", ".join(f"{one['way']} after {one['after']} s" for one in trial.landed)
            or "done before a signal"
        )
        print(
            f"seed {seed}, trial {trials}: {name} x {processes}, {how}; {landed} of {kills} kills,"
            f" {len(failed)} not exact",
            flush=True,
        )
    return {"seed": seed, "kills": landed, "trials": trials, "counts": dict(counts), "failed": failed}


def _worker(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True) as temporary:
        (Path(temporary) / "forked").mkdir()
        forked = make_forker(Path(temporary) / "forked")
        found = campaign(forked, Path(temporary), options.kills, options.seed, minutes=options.minutes)
        if found["failed"]:
            kept = Path(tempfile.mkdtemp(prefix="kills-failed-"))
            shutil.copytree(temporary, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("expected-*"))
            print(f"kept in {kept}", flush=True)
    return found


def _all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run `workers` campaigns in parallel, with consecutive seeds."""
    share, running = -(-options.kills // options.workers), []
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(options.workers):
            output = Path(temporary) / f"{i}.json"
            arguments = ["--kills", str(share), "--seed", str(options.seed + i), "--output", str(output)]
            arguments += ["--minutes", str(options.minutes)]
            command = [sys.executable, "-m", "tests.kill_campaign", *arguments]
            running.append((output, subprocess.Popen(command, cwd=ROOT, env=environment())))
        for output, process in running:
            process.wait()
            results += json.loads(output.read_text()) if output.exists() else []
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300, help="signals that must land on a running command")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no trial after that time")
    parser.add_argument("--workers", type=int, default=1, help="campaigns beside each other")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    results = [_worker(options)] if options.workers == 1 else _all(options)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))
    if options.workers > 1 or not options.output:
        total: Counter[str] = sum((Counter(result["counts"]) for result in results), Counter())
        kills, failed = sum(r["kills"] for r in results), [line for r in results for line in r["failed"]]
        print("\n".join(f"{count:5} {name}" for name, count in sorted(total.items())))
        print(f"{kills} kills in {sum(r['trials'] for r in results)} runs, {len(failed)} not exact")
        sys.exit(bool(failed) or kills < options.kills)


if __name__ == "__main__":
    main()
