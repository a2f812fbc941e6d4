"""Gate statistics of a run's first and last steps: histograms, and tables by position and by age."""

from __future__ import annotations

from typing import Any

PART = 4
"""The first and the last 1 / PART of the steps are summarised."""
COLUMNS = ("gate", "share_forward", "rkl", "fkl")
MASSES = ("student_support_mass", "teacher_support_mass")
Record = dict[str, Any]


def gate_summary(records: list[Record]) -> Record:
    """Summarise the `first` and `last` quarter of the steps, at least one each; {} without `gate` records.

    Each holds `steps` (first and last one), `tau` (at its last step; None without a threshold), the summed
    histograms, tables with `tokens`, `share` of the tokens and token means of `COLUMNS`, and the mass on kept
    ids.
    """
    gates = [record for record in records if record["kind"] == "gate"]
    gates = [gate for gate in gates if _bins(gate) == _bins(gates[-1])]  # other versions had other bins
    if not gates:
        return {}
    steps = {record["step"]: record for record in records if record["kind"] == "step"}
    count = max(1, len(gates) // PART)
    return {"first": _pooled(gates[:count], steps), "last": _pooled(gates[-count:], steps)}


def _bins(gate: Record) -> list[float]:
    lengths = [len(gate[name]) for name in ("gate_histogram", "divergence_histogram")]
    return [*lengths, gate["histogram_from"], gate["histogram_bins_per_decade"]]


def _pooled(gates: list[Record], steps: dict[int, Record]) -> Record:
    summed = {
        name: [sum(counts) for counts in zip(*(gate[name] for gate in gates), strict=True)]
        for name in ("gate_histogram", "divergence_histogram")
    }
    kept = {name: gates[0][name] for name in ("histogram_from", "histogram_bins_per_decade")}
    tables = {name: _table([gate[name] for gate in gates]) for name in ("by_position", "by_age")}
    parts = [steps[gate["step"]] for gate in gates if gate["step"] in steps]
    masses = {name: _mean([(part.get("tokens", 0), part.get(name)) for part in parts]) for name in MASSES}
    span = [gates[0]["step"], gates[-1]["step"]]
    return {"steps": span, "tau": gates[-1].get("tau"), **summed, **kept, **tables, **masses}


def _table(tables: list[dict[str, Record]]) -> dict[str, Record]:
    """Pool rows of equal name over steps, weighted by tokens; ranges in order, names without numbers last."""
    names = sorted({name for table in tables for name in table}, key=_place)
    total = sum(row["tokens"] for table in tables for row in table.values())
    found = {}
    for name in names:
        rows = [table[name] for table in tables if name in table]
        tokens = sum(row["tokens"] for row in rows)
        means = {column: _mean([(row["tokens"], row.get(column)) for row in rows]) for column in COLUMNS}
        found[name] = {"tokens": tokens, "share": tokens / total, **means}
    return found


def _place(name: str) -> tuple[bool, int]:
    start = name.rstrip("+").split("-")[0]
    return not start.isdecimal(), int(start) if start.isdecimal() else 0


def _mean(weighted: list[tuple[int, float | None]]) -> float | None:
    """Weighted mean of the values that are not None."""
    known = [(weight, value) for weight, value in weighted if value is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if total else None
