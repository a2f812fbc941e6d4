"""Warnings about slowly degrading training, from the records as they are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

WINDOW = 8  # steps averaged, at the start and now
RECENT = 16  # previous steps that a spike is compared with
SPIKE, GRADIENT_SPIKE = 3.0, 10.0  # multiples of the median of the recent steps
LEAST_LOSS = 0.1  # nats above the median: smaller jumps are noise
COLLAPSED, LONGER = 0.25, 2.0  # relative to the first steps
BELOW_TEACHER = 0.5  # relative to the teacher's entropy: a student that only becomes as certain is learning
MOST_CUT = 0.5
LOST_MASS, LOST_TIMES = 0.02, 2.0
Record = dict[str, Any]


class Watch:
    """Check every record; each warning is given once, a spike's again after `RECENT` steps."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._norms: deque[float] = deque(maxlen=RECENT)
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, deque[float]] = {}
        self._quiet_until: dict[str, int] = {}
        for record in records:
            self.look(record)

    def look(self, record: Record) -> list[str]:
        """Warnings raised by this record."""
        found = []
        if (cut := _number(record, "cut_share")) is not None and cut > MOST_CUT:
            found += self._once(
                "cut",
                f"{cut:.0%} of the completions were cut at max_new_tokens; raise it, or most rows lack their"
                " end",
            )
        if record.get("kind") == "step" and isinstance(record.get("step"), int):
            found += self._spikes(record) + self._drifts(record)
        return found

    def _spikes(self, record: Record) -> list[str]:
        found = []
        for name, seen, times, least in (
            ("loss", self._losses, SPIKE, LEAST_LOSS),
            ("grad_norm", self._norms, GRADIENT_SPIKE, 0.0),
        ):
            value = _number(record, name)
            if value is None:
                continue
            usual = median(seen) if len(seen) == RECENT else value
            if value > times * usual and value - usual > least:
                text = (
                    f"{name} {value:.4g} at step {record['step']} is {value / usual:.1f} times the median of"
                    f" the {RECENT} steps before ({usual:.4g})"
                    if usual
                    else f"{name} rose from 0 to {value:.4g} at step {record['step']}"
                )
                found += self._once(name, f"{text}; if it stays there, lower lr", record["step"], RECENT)
            seen.append(value)
        return found

    def _drifts(self, record: Record) -> list[str]:
        found = []
        surprise = _number(record, "student_logprob")
        for name, value in (
            ("teacher", _number(record, "teacher_entropy")),  # before "surprise", which is compared with it
            ("surprise", None if surprise is None else -surprise),
            ("length", _number(record, "mean_completion_tokens")),
            ("mass", _number(record, "teacher_support_mass")),
        ):
            if value is None:
                continue
            first = self._first.setdefault(name, [])
            last = self._last.setdefault(name, deque(maxlen=WINDOW))
            last.append(value)
            if len(first) < WINDOW:
                first.append(value)
            else:
                found += self._compare(name, fmean(first), fmean(last), record["step"])
        return found

    def _compare(self, name: str, before: float, now: float, step: int) -> list[str]:
        teacher = fmean(self._last.get("teacher") or [0.0])  # records of earlier versions have none
        if name == "surprise" and now < min(COLLAPSED * before, BELOW_TEACHER * teacher):
            text = (
                f"the student's mean -log p of its rows' tokens fell from {before:.3g} to {now:.3g} nats by"
                f" step {step}, while the teacher's entropy there is {teacher:.3g}: the student became much"
                " more certain than its teacher; lower lr or alpha, or refresh less often"
            )
        elif name == "length" and now > LONGER * before:
            text = (
                f"completions grew from {before:.0f} to {now:.0f} tokens on average by step {step}; look at"
                " the rows (dualkl cache show CACHE --longest 5)"
            )
        elif name == "mass" and 1 - now > max(LOST_MASS, LOST_TIMES * (1 - before)):
            text = (
                f"the teacher's probability on the kept ids fell from {before:.3f} to {now:.3f} by step"
                f" {step}: more of it is outside what the cache holds; raise signal_k, or use signal: hidden"
            )
        else:
            return []
        return self._once(name, text)

    def _once(self, name: str, text: str, step: int = 0, pause: int = 10**9) -> list[str]:
        if step < self._quiet_until.get(name, 0):
            return []
        self._quiet_until[name] = step + pause
        return [text]


def _number(record: Record, name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and value == value else None
