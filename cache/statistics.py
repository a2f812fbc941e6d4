"""Counts and histograms of a shard's rows, kept in its commit record so that summaries read no shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from cache.schema import Array, Record

BINS_PER_OCTAVE = 8
_LEAST_BIN = -40 * BINS_PER_OCTAVE  # 2**-40, about 1e-12; the bin below takes everything smaller, 0 included
_MOST_BINS = 1024 * BINS_PER_OCTAVE  # number of bins for the range of float64
HISTOGRAMS = ("behaviour_entropy", "teacher_entropy", "tail_mass")


@dataclass
class Statistics:
    """Sums over rows; `signal_bytes` is the size of the signals in the shard.

    `histograms` are over per-token values: entropies in nats, tail mass as a probability.
    """

    rows: int = 0
    prompt_tokens: int = 0
    scored_tokens: int = 0
    signal_bytes: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Counter[int]] = field(
        default_factory=lambda: {name: Counter() for name in HISTOGRAMS}
    )

    def add(self, records: Sequence[Record]) -> None:
        self.rows += len(records)
        self.prompt_tokens += sum(len(record.prompt_ids) for record in records)
        self.scored_tokens += sum(len(record.completion_ids) for record in records)
        self.finish_reasons.update(record.finish_reason for record in records)
        values = (
            [record.behaviour_entropy for record in records],
            [record.teacher_entropy for record in records],
            [None if r.log_tail_mass is None else np.exp(r.log_tail_mass) for r in records],
        )
        for name, arrays in zip(HISTOGRAMS, values, strict=True):
            if known := [array for array in arrays if array is not None]:
                self.histograms[name].update(_bins(np.concatenate(known)))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; a histogram maps bin numbers, as text, to token counts."""
        histograms = {name: {str(b): n for b, n in sorted(h.items())} for name, h in self.histograms.items()}
        return {**vars(self), "finish_reasons": dict(self.finish_reasons), "histograms": histograms}


_NAMES = vars(Statistics()).keys()


def check_statistics(part: Any, expected: tuple[int, int, int]) -> bool:
    """Return whether `part` is valid `to_json` output with the expected rows, prompt and scored tokens."""
    try:
        sums, histograms = (part["rows"], part["prompt_tokens"], part["scored_tokens"]), part["histograms"]
        counts = [part["signal_bytes"], *part["finish_reasons"].values()]
        bins = [name for histogram in histograms.values() for name in histogram]
        counts += [count for histogram in histograms.values() for count in histogram.values()]
        is_known = part.keys() == _NAMES and histograms.keys() <= set(HISTOGRAMS)
    except (AttributeError, KeyError, TypeError):
        return False
    return is_known and sums == expected and _are_counts(counts) and all(map(_is_bin, bins))


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


@lru_cache(maxsize=_MOST_BINS)
def _is_bin(name: str) -> bool:
    digits = name.removeprefix("-")
    return (
        digits.isascii() and digits.isdigit() and len(digits) < 6 and _LEAST_BIN - 1 <= int(name) < _MOST_BINS
    )


def merge(parts: Iterable[dict[str, Any]]) -> Statistics:
    """Merge the statistics of several shards, each in `to_json` form."""
    total = Statistics()
    for part in parts:
        for name in ("rows", "prompt_tokens", "scored_tokens", "signal_bytes"):
            setattr(total, name, getattr(total, name) + part[name])
        total.finish_reasons.update(part["finish_reasons"])
        for name, histogram in part["histograms"].items():
            total.histograms[name].update({int(b): n for b, n in histogram.items()})
    return total


def quantiles(histogram: Counter[int], shares: Iterable[float]) -> dict[str, float] | None:
    """Quantiles over tokens, within 5 % (1/8-octave bins), for each of `shares`; None without tokens."""
    if not histogram:
        return None
    bins = np.array(sorted(histogram))
    reached = np.cumsum([histogram[b] for b in bins.tolist()])
    found = {}
    for share in shares:
        b = int(bins[np.searchsorted(reached, share * reached[-1])])
        found[f"{share:g}"] = 0.0 if b < _LEAST_BIN else float(2 ** ((b + 0.5) / BINS_PER_OCTAVE))
    return found


def _bins(values: Array) -> dict[int, int]:
    with np.errstate(divide="ignore"):
        exponents = np.floor(np.log2(np.maximum(values.astype(np.float64), 0.0)) * BINS_PER_OCTAVE)
    bins, counts = np.unique(np.maximum(exponents, _LEAST_BIN - 1).astype(int), return_counts=True)
    return dict(zip(bins.tolist(), counts.tolist(), strict=True))
