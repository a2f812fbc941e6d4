"""Progress of stage one: the bar, and `rollout_progress` records in metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

import cache
from stages.runtime import metrics
from stages.runtime.cuts import cut_sentence
from stages.runtime.gpu_memory import highest_bytes
from stages.runtime.metrics import Clock
from stages.runtime.rounds import PROGRESS
from stages.runtime.run import Run
from stages.runtime.terminal import Bar

PHASES = {"generate": "rollout", "score": "score"}  # phase: its name in the run's clock
WAITS = ("write", "rows")  # for the writer thread; for a generator's rows


_SHARES = {
    "generate": "generating",
    "score": "scoring",
    "write": "waiting for the writer",
    "rows": "waiting for rollouts",
}


@dataclass
class Counts:
    """Work done: rollouts, those cut off, and tokens generated, scored, and scored including padding."""

    rollouts: int = 0
    cut_rollouts: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    padded_tokens: int = 0


def counts_of(rows: list[cache.Record], *, generated: bool) -> Counts:
    """Counts of a unit's rows; `generated`: whether their tokens were generated just now."""
    num_cut = sum(row.finish_reason == "length" for row in rows)
    return Counts(len(rows), num_cut, sum(len(row.completion_ids) for row in rows) if generated else 0)


class Progress:
    """Rates, time left, GPU memory and time shares over all processes; a context manager.

    Token rates use the main process's time in the respective phase, other rates the time since the start.
    """

    def __init__(self, run: Run, num_rollouts: int) -> None:
        self._run = run
        self._clock = Clock((*PHASES, *WAITS))
        self._total, self._done = num_rollouts, Counts()
        self._of = {
            "began": round(time.time(), 3),
            "evaluation": run.clock.is_evaluating,
        }  # distinguishes records
        is_shown = run.world.is_main and not run.metrics.style.quiet
        self._bar = Bar("rollouts", "rollout", num_rollouts, shown=is_shown)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._run.clock.phase(PHASES[name]), self._clock.phase(name):
            yield

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Count time spent waiting for one of `WAITS`, inside or outside a phase."""
        with self._clock.phase(what):
            yield

    def add(self, counts: Counts) -> None:
        """Add this process's work of a round (collective) and log the progress of stage one."""
        sums = self._run.world.sum([float(value) for value in vars(counts).values()])
        self._done = Counts(*(a + int(b) for a, b in zip(vars(self._done).values(), sums, strict=True)))
        record = self._record()
        self._run.metrics.log(PROGRESS, **record)
        cut = f"{record['cut_share']:.0%} cut at max_new_tokens"
        self._bar.update(int(sums[0]), ", ".join(filter(None, [_rates(record), cut])))

    def shares(self) -> dict[str, float]:
        """Shares of the time since the start, by phase and wait, on this process."""
        total = self._clock.total()
        return {name: seconds / total for name, seconds in self._clock.seconds.items()}

    def _record(self) -> dict[str, Any]:
        done, seconds, total = self._done, self._clock.seconds, self._clock.total()
        rate = done.rollouts / total
        device = self._run.world.device
        on_gpu = device.type == "cuda"
        return {
            "start": self._run.clock.started,
            **self._of,
            **vars(done),
            "cut_share": _ratio(done.cut_rollouts, done.rollouts),
            "rollouts_left": self._total - done.rollouts,
            "seconds": total,
            "rollouts_per_second": rate,
            "eta_seconds": (self._total - done.rollouts) / rate if rate else None,
            "generated_tokens_per_second": _ratio(done.generated_tokens, seconds["generate"]),
            "scored_tokens_per_second": _ratio(done.scored_tokens, seconds["score"] + seconds["write"]),
            "padding_waste": 1 - done.scored_tokens / done.padded_tokens if done.padded_tokens else 0.0,
            **{f"share_{name}": share for name, share in self.shares().items()},
            "memory_allocated_bytes": torch.cuda.memory_allocated(device) if on_gpu else 0,
            "peak_memory_bytes": highest_bytes(device),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()


def _ratio(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0


def _rates(record: dict[str, Any]) -> str:
    generated, scored = record["generated_tokens_per_second"], record["scored_tokens_per_second"]
    parts = [f"{generated:,.0f} tokens/s generated"] * bool(generated) + [f"{scored:,.0f} scored"] * bool(
        scored
    )
    if record["peak_memory_bytes"]:
        parts.append(
            f"{record['memory_allocated_bytes'] / 2**30:.1f} GiB, peak"
            f" {record['peak_memory_bytes'] / 2**30:.1f}"
        )
    return ", ".join(parts)


def last_line(run: Run) -> str:
    """Summary of the last record since this start of the run; empty if there is none (main process)."""
    found = [
        r
        for r in metrics.read(run.metrics.path)
        if r["kind"] == PROGRESS and r.get("start") == run.clock.started
    ]
    if not found:
        return ""
    last = found[-1]
    shares = ", ".join(
        f"{last[f'share_{name}']:.1%} {text}" for name, text in _SHARES.items() if last[f"share_{name}"]
    )
    return (
        f"{last['rollouts']} rollouts in {last['seconds']:.0f} s, {last['rollouts_per_second']:.1f} a"
        f" second: {_rates(last)}; {cut_sentence(last['cut_share'])}; time: {shares}; padding"
        f" {last['padding_waste']:.1%}"
    )
