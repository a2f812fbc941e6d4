"""Gives cells to workers in order of value, and keeps what they find."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from bench.bakeoff import worker
from bench.bakeoff.arms import ARMS
from bench.bakeoff.tasks import Job, Results, Rival, Start
from bench.bakeoff.worker import Place
from bench.measuring import ROOT, Record


@dataclass
class Worker:
    number: int
    process: Any
    connection: Connection
    job: Job | None = None
    since: float = 0.0
    pair: tuple[str, str] | None = None


@dataclass
class Schedule:
    """Jobs that were asked for, those done in this call, and those that failed in it."""

    place: Place
    results: Results
    jobs: Any  # () -> iterable of jobs in order of value; it may depend on the results
    num_workers: int
    cards: list[str]
    minutes: float
    started: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    spent: list[float] = field(default_factory=list)

    def run(self) -> None:
        begun = time.monotonic()
        deadline = begun + 60 * self.minutes
        (self.place.work / "logs").mkdir(parents=True, exist_ok=True)
        workers: list[Worker] = []
        while True:
            for number in range(self.num_workers):
                idle = next((w for w in workers if w.number == number), None)
                if idle is None or idle.job is None:
                    if time.monotonic() + self._usual() > deadline or not (job := self._next(idle)):
                        continue
                    if idle is None:
                        workers.append(idle := self._start(number))
                    self._give(idle, job)
            busy = {w.connection: w for w in workers if w.job is not None}
            if not busy:
                break
            ready = wait(list(busy), timeout=max(0.0, deadline - time.monotonic()))
            for connection in ready:
                found = busy[connection]  # type: ignore[index]
                if not self._take(found, time.monotonic() - begun):
                    workers.remove(found)
            if not ready:
                print(
                    f"stopped after {self.minutes:g} minutes; unfinished cells will be run again", flush=True
                )
                break
        for one in workers:
            one.process.kill()

    def _usual(self) -> float:
        return statistics.median(self.spent) if self.spent else 0.0

    def _next(self, idle: Worker | None) -> Job | None:
        """The most valuable job that can start now: its needs are there, or the first need that is not."""
        for job in self.jobs():
            for one in [*self._missing(job), job]:
                if one.name not in self.started and not self._missing(one) and not self._is_done(one):
                    return one
        return None

    def _is_done(self, job: Job) -> bool:
        if isinstance(job, Start):
            return job.name in self.made
        return self.results.get(job) is not None

    def _missing(self, job: Job) -> list[Job]:
        found: list[Job] = []
        if not isinstance(job, Start) and self.results.get(job) is None:
            cell = job.cell if isinstance(job, Rival) else job
            own = Start(cell.task, cell.student, cell.seed, cell.signal)
            first = Start(cell.task, cell.student, 0)
            found = [own, *([first] if ARMS[cell.arm].gate_on else [])]
            if cell.mean_gate_of is not None:
                found.append(cell.mean_gate_of)
            if isinstance(job, Rival) and job.pilot is not None:
                found.append(job.pilot)
        return [one for one in found if not self._is_done(one)]

    def _start(self, number: int) -> Worker:
        if self.cards:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.cards[number % len(self.cards)]
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = self.place.work / "logs" / f"worker-{number}.log"
        process = context.Process(target=worker.main, args=(theirs, self.place, log), daemon=True)
        process.start()
        theirs.close()
        return Worker(number, process, ours)

    def _give(self, idle: Worker, job: Job) -> None:
        idle.job, idle.since = job, time.monotonic()
        self.started.add(job.name)
        idle.connection.send((job, *self._known(job)))

    def _known(self, job: Job) -> tuple[Record | None, float | None]:
        """What the job takes from earlier records: thresholds, and a constant λ or a factor on the steps."""
        if isinstance(job, Start):
            return None, None
        cell = job.cell if isinstance(job, Rival) else job
        thresholds, number = None, None
        if ARMS[cell.arm].gate_on:
            thresholds = (self.results.get(Start(cell.task, cell.student, 0)) or {})["thresholds"]
        if cell.mean_gate_of is not None:
            number = (self.results.get(cell.mean_gate_of) or {})["mean_gate"]
        if isinstance(job, Rival) and job.pilot is not None:
            pilot = self.results.get(job.pilot) or {}
            number = job.seconds / pilot["points"][-1]["seconds"]
        return thresholds, number

    def _take(self, found: Worker, now: float) -> bool:
        """Keep what a worker sends; return whether it lives."""
        job, found.job = found.job, None
        assert job is not None
        try:
            answer = found.connection.recv()
        except (EOFError, ConnectionResetError):
            answer, found.process = f"worker {found.number} ended (see its log)", None
        if isinstance(answer, str):
            self.failed.add(job.name)
            print(f"{now:6.0f} s  {job.name} failed: {answer.strip().splitlines()[-1]}", flush=True)
            return found.process is not None
        self.made.add(job.name)
        if not isinstance(job, Start):
            self.spent.append(time.monotonic() - found.since)
        if not isinstance(job, Start) or self.results.get(job) is None:
            self.results.put(job.name, answer | self._identity(job))
        print(f"{now:6.0f} s  {job.name}  {line(answer)}", flush=True)
        return True

    def _identity(self, job: Job) -> Record:
        device = self.place.device
        return {
            "cell": asdict(job),
            "sizes": asdict(self.place.sizes(job.task)),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "workers": self.num_workers,
            "torch": torch.__version__,
            "commit": commit(),
            "command": " ".join(["python -m bench.bakeoff", *sys.argv[1:]]),
        }


def line(record: Record) -> str:
    """The figures of a record that a person reads while it runs."""
    after = record.get("after") or record.get("before")
    text = f"{record['seconds']['whole']:.0f} s"
    if after is None:
        return text
    for on in ("on_student", "on_teacher"):
        text += f"  {on} F {after[on]['forward_kl']:.4f} R {after[on]['reverse_kl']:.4f}"
    return text + (f"  avg {after['avg']:.3f}" if after.get("avg") is not None else "")


def commit() -> str:
    """The commit of this tree: git's, or the file COMMIT of an archive."""
    path = ROOT / "COMMIT"
    if path.is_file():
        return path.read_text().strip()
    done = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"{ROOT} is no git checkout and has no file COMMIT; write the commit's hash into it."
        )
    return done.stdout.strip()
