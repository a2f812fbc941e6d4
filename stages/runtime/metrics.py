"""What a run tells: `metrics.jsonl`, the clock of its phases, Weights & Biases, lines on the terminal."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.runtime.config import Config
from stages.runtime.distributed import World
from stages.runtime.errors import UserError
from stages.runtime.files import replace_text

PHASES = ("load", "rollout", "score", "train", "evaluate")


class Clock:
    """Seconds of this process by phase. A phase inside `evaluate` counts as evaluate, else the inner phase counts."""

    def __init__(self, phases: tuple[str, ...] = PHASES) -> None:
        self.started = round(time.time(), 3)  # names this process among those of a resumed run
        self._start = time.perf_counter()
        self.seconds = dict.fromkeys(phases, 0.0)
        self._open: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.is_evaluating:
            name = "evaluate"
        self._pause()
        self._open.append((name, time.perf_counter()))
        try:
            yield
        finally:
            self._pause()
            self._open.pop()
            if self._open:
                self._open[-1] = (self._open[-1][0], time.perf_counter())

    @property
    def is_evaluating(self) -> bool:
        return any(name == "evaluate" for name, _ in self._open)

    def _pause(self) -> None:
        if self._open:
            name, since = self._open[-1]
            now = time.perf_counter()
            self.seconds[name] += now - since
            self._open[-1] = (name, now)

    def total(self) -> float:
        """Seconds since the start; `seconds` is up to date then."""
        self._pause()
        return time.perf_counter() - self._start

    def totals(self, world: World) -> dict[str, float]:
        """Seconds by phase and in total, of the slowest rank (collective)."""
        names = [*self.seconds, "total"]
        total = self.total()
        own = [*self.seconds.values(), total]
        return dict(zip(names, world.max(own), strict=True))


class Metrics:
    """Appends records to `metrics.jsonl` (and to Weights & Biases) on the main process; silent on the others."""

    def __init__(self, config: Config, world: World, notes: str = "metrics.jsonl") -> None:
        self.path = config.run_folder / notes
        self.world = world
        self._wandb: Any = None
        if world.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _end_last_line(self.path)
            if config.log.wandb_project:
                self._wandb = _start_wandb(config)

    def log(self, kind: str, **values: Any) -> None:
        if not self.world.is_main:
            return
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._wandb is not None:
            self._wandb.log(_scalars(kind, values), step=values.get("step"))

    def rewind(self, step: int, refresh_index: int) -> None:
        """Drops what a run that resumes after `step` and refresh `refresh_index` will write again."""
        if not (self.world.is_main and self.path.exists()):
            return
        last = {"step": step, "refresh_index": refresh_index}
        counted = {"step": "step", "gate": "step", "eval": "step", "refresh": "refresh_index"}
        kept = [
            r for r in read(self.path) if r["kind"] not in counted or r[counted[r["kind"]]] <= last[counted[r["kind"]]]
        ]
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def _scalars(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, those of nested tables too, by their path: `gate/by_age/0-3/rkl`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _scalars(f"{prefix}/{key}", value)
        elif isinstance(value, int | float):
            found[f"{prefix}/{key}"] = value
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _end_last_line(path: Path) -> None:
    """Closes a line that a crash cut off, so that the next record has a line of its own."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def _start_wandb(config: Config) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(
            f"wandb_project is set, but wandb cannot be imported here ({error}); install it (pip install wandb), or leave"
            " wandb_project empty: metrics.jsonl has the same records."
        ) from error

    own = "-score" if config.rollout.role == "score" else ""  # it runs at the same time as its generator
    path = config.run_folder / f"wandb_id{own}"  # one run on the site for all starts of this run's folder
    if not path.exists():
        replace_text(path, secrets.token_hex(4))
    return wandb.init(
        project=config.log.wandb_project,
        name=(config.log.wandb_name or config.run.run_name) + own,
        mode=config.log.wandb_mode,
        dir=str(config.run_folder),
        config=config.model_dump(),
        id=path.read_text(),
        resume="allow",
    )
