"""A run's output: `metrics.jsonl`, phase timing, Weights & Biases, and terminal lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime import config as configuration
from stages.runtime import files, history, schema, site
from stages.runtime.config import Config
from stages.runtime.files import replace_text
from stages.runtime.terminal import Style
from stages.runtime.watch import Watch

if TYPE_CHECKING:
    from stages.runtime.distributed import World

PHASES = (
    "startup",  # imports, configuration, the other processes
    "prepare",  # checks of files, prompts, sizes of forwards
    "load",  # models, read and checked
    "rollout",
    "score",
    "write",  # waiting for rows to be written
    "probe",
    "refresh",  # all else in a refresh
    "train",
    "wait",  # for rows that other processes write
    "save",  # checkpoints
    "evaluate",
    "report",  # the exported student, its card, the report
)
"""What the time of a run is spent on; what is in none of them is reported as `other`."""
WORK = ("rollout_progress", "step", "refresh", "version", "eval", "evaluation", "export")
"""Kinds of records that a command writes only if it has done real work."""
COUNTED = {
    "step": "step",
    "gate": "step",
    "eval": "step",
    "evaluation": "step",
    "warning": "step",
    "export": "step",
    "config": "from_step",
    "refresh": "refresh_index",
}
"""The field that orders records of each kind; on resuming, later records are dropped by it."""
Record = dict[str, Any]


class Clock:
    """Seconds of this process by phase; inner phases count separately, except inside `evaluate`."""

    def __init__(self, phases: tuple[str, ...] = PHASES, began: float | None = None) -> None:
        """`began`: a `time.perf_counter()` from which time counts, in the first phase until now."""
        self.started = round(time.time(), 3)  # identifies this process among those of a resumed run
        now = time.perf_counter()
        self._start = now if began is None else began
        self.seconds = dict.fromkeys(phases, 0.0)
        self.seconds[phases[0]] = now - self._start
        self._open: list[tuple[str, float]] = []
        self.noted = 0.0  # `total` when it was last written down

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
        """Seconds since the start; also brings `seconds` up to date."""
        self._pause()
        return time.perf_counter() - self._start

    def totals(self, world: World) -> dict[str, float]:
        """Seconds by phase and in total, of the slowest rank (collective)."""
        names = [*self.seconds, "total"]
        total = self.total()
        own = [*self.seconds.values(), total]
        return dict(zip(names, world.max(own), strict=True))


class Metrics:
    """Append records to `metrics.jsonl` (docs/metrics.md) and Weights & Biases; only the main process writes.

    A command that does no work leaves no files: other records are buffered until the first one of a kind in
    `WORK`; until then the folder, config.yaml and the Weights & Biases run are untouched. `keeps_config`:
    this command's configuration becomes the run's.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        notes: str = "metrics.jsonl",
        keeps_config: bool = True,
        style: Style = Style(),  # noqa: B008  # frozen
    ) -> None:
        self.style = style
        self.last_step: Record = {}  # of this process, like `first_refresh`
        self.first_refresh: Record = {}  # after a step
        self.path = config.run_folder / notes
        self.world = world
        self._config, self._keeps_config = config, keeps_config
        self._held: list[Record] = []
        self._said: set[str] = set()
        self._watch = Watch()
        self.listeners: list[Callable[[Record], None]] = []  # called with every record (main process)
        self._rewound: tuple[int, int] | None = None
        self._has_begun = self._has_trained = False
        self._site = site.open_site(config) if world.is_main and config.log.wandb_project else None

    def log(self, kind: str, **values: Any) -> None:
        if not self.world.is_main:
            return
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        if kind == "step":
            self.last_step = record
        if kind == "refresh" and self.last_step and not self.first_refresh:
            self.first_refresh = record
        if not self._has_begun and kind not in WORK:
            self._held.append(record)
            return
        self._begin()
        if kind == "step" and self._keeps_config and not self._has_trained:
            self._has_trained = True
            self._note_configuration(values["step"])
        self._write(record)
        for listener in self.listeners:
            listener(record)
        for text in self._watch.look(record):
            self.say(f"warning: {text}")
            self._write(
                {"kind": "warning", "time": record["time"], "step": values.get("step", 0), "text": text}
            )

    def note(self, kind: str, **values: Any) -> None:
        """Append a record to metrics.jsonl alone, if this command has begun it; from any thread."""
        if self.world.is_main and self._has_begun:
            record = {"kind": kind, "time": round(time.time(), 3), **values}
            files.append(self.path, json.dumps(record) + "\n")

    def rewind(self, step: int, refresh_index: int) -> None:
        """At the next record, drop those after `step` and `refresh_index`, which will be written again."""
        if self.world.is_main:
            self._rewound = step, refresh_index
            if self._has_begun:
                self._drop_rewound()

    def keep_config(self) -> None:
        """Write config.yaml now, for waiting processes, unless the run has already trained (main process)."""
        if not any(record["kind"] == "step" for record in read(self.path)):
            replace_text(self.path.parent / "config.yaml", configuration.to_yaml(self._config))

    def say(self, line: str) -> None:
        if self.world.is_main:
            self.style.say(line)

    def conclude(self, text: str, facts: dict[str, Any]) -> None:
        """Print the command's result, in words or, with --json, as `facts`."""
        if self.world.is_main:
            self.style.conclude(text, facts)

    def say_once(self, line: str) -> None:
        """Print a line at most once per run."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def close(self) -> None:
        """Send remaining records to Weights & Biases, within `site.PATIENCE` seconds."""
        if self._site is not None:
            self._site.close()

    def _begin(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(self.path)
        self._drop_rewound()
        self._watch = Watch(read(self.path))
        if self._keeps_config:
            self.keep_config()
        for record in self._held:
            self._write(record)

    def _write(self, record: Record) -> None:
        files.append(self.path, json.dumps(record) + "\n")
        if self._site is not None:
            self._site.send(record)

    def _note_configuration(self, step: int) -> None:
        """Write config.yaml, and a `config` record if `step` is the first with this configuration."""
        record = history.config_record(self._config, self.world, step)
        if not history.is_same_span(history.last_config(read(self.path)), record):
            self._write({"kind": "config", "time": round(time.time(), 3), **record})
        replace_text(self.path.parent / "config.yaml", configuration.to_yaml(self._config))

    def _drop_rewound(self) -> None:
        if self._rewound is None:
            return
        step, refresh_index = self._rewound
        found = read(self.path)
        kept = [
            r
            for r in found
            if r.get(COUNTED.get(r["kind"], ""), 0) <= (refresh_index if r["kind"] == "refresh" else step)
        ]
        if len(kept) < len(found):
            replace_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self._watch = Watch(kept)
        self._rewound = None


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`; skips lines that are truncated or lack required fields."""
    records = []
    for line in (files.read(path) or b"").decode(errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if schema.is_record(record):
            records.append(record)
    return records


def _end_last_line(path: Path) -> None:
    """End a line truncated by a crash, so that the next record starts a new line."""
    if not (files.read(path) or b"\n").endswith(b"\n"):
        files.append(path, "\n")
