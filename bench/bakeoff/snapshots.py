"""Copies of a student's weights at fixed points of a contender's time, and the contender's end."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class Snapshots:
    """Weights at the first step that ends after each multiple of `every` seconds, and at the end.

    Time is wall time since `begin`, without the copies; `setup` is the time from making this until `begin`:
    models, engines, whatever runs once.
    """

    every: float
    device: str
    clock: Callable[[], float] = time.perf_counter
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    setup: float = 0.0
    _copies: list[dict[str, Tensor]] = field(default_factory=list)
    _since: float = 0.0
    _paused: float = 0.0

    def __post_init__(self) -> None:
        self._since = self.clock()

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        self._synchronize()
        self.weights, now = weights, self.clock()
        self.setup, self._since = now - self._since, now

    def elapsed(self) -> float:
        return self.clock() - self._since - self._paused

    @torch.no_grad()
    def look(self, step: int, is_last: bool = False, **figures: Any) -> None:
        """Copy the weights if a point of time has passed since the last copy. Called after each step."""
        due = self.every * (1 + int(self.points[-1]["seconds"] / self.every if self.points else 0))
        if not is_last and self.elapsed() < due:
            return
        if self.points and self.points[-1]["step"] == step:
            return
        self._synchronize()
        seconds, started = self.elapsed(), self.clock()
        self._copies.append(
            {name: value.detach().to("cpu", copy=True) for name, value in self.weights.items()}
        )
        self.points.append({"step": step, "seconds": seconds, **figures})
        self._synchronize()
        self._paused += self.clock() - started

    def save(self, folder: Path, **figures: Any) -> None:
        """One file of weights a point, and found.json: points, setup seconds and `figures`."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, weights in enumerate(self._copies):
            save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{number}.safetensors")
        found = {"points": self.points, "setup_seconds": self.setup, **figures}
        (folder / "found.json").write_text(json.dumps(found))

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def end_with_parent() -> None:
    """End this process when the one that started it is gone, which a worker that is killed cannot do."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
