"""Set up one execution of a stage: configuration, processes, folder, clock and metrics."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import transformers

from stages.runtime import config as configuration
from stages.runtime import distributed, ending, locks
from stages.runtime.checkpoint import Saver
from stages.runtime.config import Config
from stages.runtime.distributed import World
from stages.runtime.errors import UserError, machine_error
from stages.runtime.gpu_memory import highest_bytes
from stages.runtime.metrics import Clock, Metrics, Record
from stages.runtime.terminal import Style, take_style

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
NOTE_SECONDS = 30.0
"""Between two clock records of a process, so that the report counts its time if it is killed."""
FOLDERS = ("checkpoints", "eval", "student", "trace", "versions", "wandb")
"""Subfolders in which a run writes and removes files."""


@dataclass(frozen=True)
class Run:
    config: Config
    world: World
    metrics: Metrics
    clock: Clock
    saver: Saver = field(default_factory=Saver)  # of checkpoints

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def run_id(self) -> str:
        """Identifies this run's rows in a cache; the same for every start and resume of the run."""
        config = self.config
        parts = (
            config.run.run_name,
            config.run.seed,
            config.models.student_model,
            config.models.student_adapter,
        )
        return f"{config.run.run_name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"

    def claim(self, *paths: Path) -> None:
        """Make this command the only writer of the run's folder, and of `paths`, until it ends (collective).

        UserError if another process is writing there, or if one of the run's own folders is a link.
        """
        problem = ""
        if self.world.is_main:
            try:
                _refuse_links(self.folder)
                locks.take(self.folder / "run.lock", f"the run in {self.folder}")
                for path in paths:
                    locks.take(path.with_name(f"{path.name}.lock"), str(path))
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = self._unwritable(error)
        problem = self.world.gather(problem)[0]
        if problem:
            raise UserError(problem)
        if self.world.size == 1:  # else the last totals are those of the slowest process
            ending.at_end(self._note_time, quick=True)

    def _unwritable(self, error: OSError) -> str:
        if error.errno not in UNWRITABLE:
            return machine_error(error)
        return (
            f"the run's folder {self.folder} cannot be written ({error.strerror}: {error.filename}); make runs_dir"
            f" {self.config.run.runs_dir} writable, or give another --runs_dir."
        )

    def keep_time(self, record: Record) -> None:
        """Note this process's seconds with a record, if that has not been done for NOTE_SECONDS."""
        if self.clock.total() - self.clock.noted >= NOTE_SECONDS:
            self._note_time()

    def _note_time(self) -> None:
        self.clock.noted = self.clock.total()
        with suppress(OSError):  # a full disk; the run's own records report it
            self.metrics.note("clock", start=self.clock.started, **self.clock.seconds, total=self.clock.noted)

    def log_totals(self, stage: str) -> None:
        """Log seconds by phase and peak GPU memory so far, each the maximum over ranks (collective)."""
        self.metrics.log("clock", start=self.clock.started, **self.clock.totals(self.world))
        peak = float(highest_bytes(self.world.device))
        self.metrics.log("memory", stage=stage, peak_memory_bytes=self.world.max([peak])[0])


def _refuse_links(folder: Path) -> None:
    for path in (folder / name for name in FOLDERS):
        if path.is_symlink():
            raise UserError(
                f"{path} is a link; a run replaces and removes files there, so it must be a folder of the"
                " run's own. Remove the link, or keep the whole run elsewhere with --runs_dir."
            )


def open_run(
    description: str,
    arguments: list[str] | None = None,
    *,
    read_only: bool = False,
    notes: str = "metrics.jsonl",
) -> Run:
    """Parse the command line and join the other processes; the first record of work creates the folder.

    `read_only`: the command only reads the run and keeps its configuration. `notes`: name of the metrics
    file.
    """
    style, arguments = take_style(sys.argv[1:] if arguments is None else arguments)
    config = configuration.parse_arguments(arguments, description)
    configuration.require(config, "student_model")
    return start(config, style, read_only=read_only, notes=notes, began=ending.began())


def start(
    config: Config,
    style: Style,
    *,
    read_only: bool = False,
    notes: str = "metrics.jsonl",
    began: float | None = None,
) -> Run:
    """Join the other processes with a configuration that is already there; see `open_run`.

    `began`: `time.perf_counter()` at the start of the command.
    """
    clock = Clock(began=began)
    with clock.phase("startup"):
        quieten_libraries()
        world = distributed.start(config.run.device)
    keeps_config = not read_only and config.rollout.role != "score"  # a scorer leaves that to its generator
    metrics = Metrics(config, world, notes, keeps_config, style)
    run = Run(config, world, metrics, clock)
    metrics.listeners.append(run.keep_time)
    return run


def quieten_libraries() -> None:
    """Hide progress bars for loading weights, and deprecation warnings between libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="torch.distributed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
