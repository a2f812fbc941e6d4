"""Rounds of stage one from `rollout_progress` records; in a round each process makes one unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROGRESS = "rollout_progress"
SPENT = ("generate", "score", "write", "rows")  # uses of time other than `other`
COUNTED = ("rollouts", "generated_tokens", "scored_tokens", "padded_tokens")


@dataclass(frozen=True)
class Round:
    """Increment of one round: seconds by use (including `other`), work by kind; `peak` GPU bytes so far.

    `is_first`: whether it is the first round of the rollouts written together.
    """

    is_first: bool
    seconds: dict[str, float]
    work: dict[str, float]
    peak: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def generated_rate(self) -> float | None:
        """Tokens generated per second of generation; None without any."""
        return _ratio(self.work["generated_tokens"], self.seconds["generate"])

    @property
    def scored_rate(self) -> float | None:
        """Tokens scored per second of scoring, including waits for the writer; None without any."""
        return _ratio(self.work["scored_tokens"], self.seconds["score"] + self.seconds["write"])


def rounds_of(records: list[dict[str, Any]]) -> list[Round]:
    """Rounds of stage one and its refreshes in record order, without those of evaluations."""
    found, before = [], dict[float, dict[str, Any]]()
    for record in records:
        if record["kind"] != PROGRESS or record.get("evaluation", True):  # older runs lack it
            continue
        last = before.get(record["began"])
        found.append(_added(record, last))
        before[record["began"]] = record
    return found


def _added(record: dict[str, Any], last: dict[str, Any] | None) -> Round:
    """Difference from the last record; counts are cumulative over a set of rollouts."""

    def grown(of: dict[str, Any] | None) -> dict[str, float]:
        if of is None:
            return dict.fromkeys(("seconds", *SPENT, *COUNTED), 0.0)
        spent = {name: of[f"share_{name}"] * of["seconds"] for name in SPENT}
        return {"seconds": of["seconds"]} | spent | {name: float(of[name]) for name in COUNTED}

    now, then = grown(record), grown(last)
    added = {name: max(0.0, now[name] - then[name]) for name in now}
    seconds = {name: added[name] for name in SPENT}
    seconds["other"] = max(0.0, added["seconds"] - sum(seconds.values()))
    return Round(last is None, seconds, {name: added[name] for name in COUNTED}, record["peak_memory_bytes"])


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Totals: seconds and time shares by use, tokens per second, padding, peak GPU bytes (None: no GPU)."""
    seconds = {name: sum(r.seconds[name] for r in rounds) for name in (*SPENT, "other")}
    work = {name: sum(r.work[name] for r in rounds) for name in COUNTED}
    whole = Round(True, seconds, work, max((r.peak for r in rounds), default=0))
    return {
        "rounds": len(rounds),
        "rollouts": round(work["rollouts"]),
        "seconds": whole.total,
        "shares": {name: value / whole.total if whole.total else 0.0 for name, value in seconds.items()},
        "generated_tokens_per_second": whole.generated_rate,
        "scored_tokens_per_second": whole.scored_rate,
        "padding_waste": 1 - work["scored_tokens"] / work["padded_tokens"] if work["padded_tokens"] else None,
        "peak_memory_bytes": whole.peak or None,
    }


def _ratio(amount: float, seconds: float) -> float | None:
    return amount / seconds if amount and seconds else None
