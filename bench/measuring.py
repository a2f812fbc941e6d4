"""What the benches share: clocks, a device's ceilings and memory, the file of results, and the text of
tables.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]
Found = dict[str, dict[str, Record]]  # device -> cell -> record


# --- clocks and ceilings ---


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single runs."""

    median: float
    least: float
    repeats: int


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_once(step: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run that starts on an idle device."""
    return time_runs(step, device, 1)[0]


def time_runs(step: Callable[[], Any], device: str, repeats: int) -> list[float]:
    """Milliseconds of each of several runs, back to back; on CUDA by events, without waiting in between."""
    synchronize(device)
    if device != "cuda":
        clocks = [time.perf_counter()]
        for _ in range(repeats):
            step()
            clocks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(clocks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def measure(step: Callable[[], Any], device: str, seconds: float) -> Timing:
    """The median over at least 10 runs, and as many (at most 200) as fill `seconds`, after two to warm up."""
    step()
    estimate = time_once(step, device)
    repeats = min(200, max(10, round(1e3 * seconds / max(estimate, 1e-3)))) if device == "cuda" else 3
    runs = time_runs(step, device, repeats)
    return Timing(statistics.median(runs), min(runs), repeats)


def ceilings(device: str, seconds: float) -> Record:
    """The rates of a large copy (bytes read and written) and of a large bf16 product of random matrices."""
    size = 8192 if device == "cuda" else 128
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.ones(8 * size * size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    product, copy = (
        measure(lambda: a @ b, device, seconds),
        measure(lambda: target.copy_(source), device, seconds),
    )
    return {
        "product_tflops": 2 * size**3 / product.median / 1e9,
        "copy_tb_per_second": 2 * source.nbytes / copy.median / 1e9,
    }


# --- memory ---


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """Peak memory since `reset_peak`, GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


# --- results ---


def version(package: str) -> str:
    """Of an installed package; empty if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def sources_digest(patterns: Iterable[str]) -> str:
    """8 hex digits over files of this repository: what was measured, committed or not."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:8]


class Results:
    """The file: device -> cell -> record. Records of other devices are kept."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.all: dict[str, dict[str, Record]] = (
            json.loads(self.path.read_text()) if self.path.exists() else {}
        )
        self.here = self.all.setdefault(torch.cuda.get_device_name() if device == "cuda" else "cpu", {})

    def put(self, name: str, record: Record) -> None:
        self.here[name] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.all, indent=1) + "\n")
        partial.replace(self.path)


def message_of(error: BaseException) -> str:
    """Type and text of an error, short enough for a table's file."""
    return f"{type(error).__name__}: {error}"[:600]


# --- tables ---


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)
