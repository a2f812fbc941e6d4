"""Weights & Biases: records are sent from a background thread, so an unreachable site never blocks the run.

Names on the site are `<kind>/<key>` of the records in metrics.jsonl (docs/metrics.md). No call passes a step,
since wandb drops data for a step below its own counter; `step` and `time` are the axes instead
(`define_metric`).
"""

from __future__ import annotations

import math
import re
import secrets
import threading
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from cache.plain import plain
from stages.runtime import ending
from stages.runtime.config import Config
from stages.runtime.errors import UserError, one_line
from stages.runtime.files import read, replace_text

PATIENCE = 20.0  # seconds a command waits for the site at its end; metrics.jsonl is complete by then
BY_STEP = ("step", "gate", "eval", "evaluation", "refresh", "warning")
MEASURES = ("forward_kl", "reverse_kl", "top1_agreement", "accuracy", "cut_share")
Record = dict[str, Any]


def open_site(config: Config) -> Site:
    """Open the site lazily, at the first record; UserError if wandb is not installed."""
    try:
        found = find_spec("wandb") is not None
    except ValueError:  # a module without a spec
        found = False
    if not found:
        raise UserError(
            "wandb_project is set, but wandb cannot be imported here; install it (pip install wandb), or"
            " leave wandb_project empty: metrics.jsonl has the same records."
        )
    return Site(config)


class Site:
    """One Weights & Biases run for all starts of a run's folder."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._records: Queue[Record | None] = Queue()
        self._thread: threading.Thread | None = None
        self._evaluations: dict[str, Record] = {}

    def send(self, record: Record) -> None:
        """Queue a record for the thread, except `config`: the site has the configuration from the start."""
        if record["kind"] == "config":
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
            ending.at_end(self.close)
        self._records.put(record)

    def close(self) -> None:
        """Wait until everything is sent, at most `PATIENCE` seconds; later calls return at once."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._records.put(None)
        thread.join(PATIENCE)
        if thread.is_alive():
            ending.abandon()  # wandb's own exit would wait for the site
            _tell(
                f"wandb did not take all records within {PATIENCE:.0f} s; metrics.jsonl has them, and `wandb"
                f" sync` sends what is in {self._config.run_folder / 'wandb'}"
            )

    def _work(self) -> None:
        run = None
        try:
            run = _start(self._config)
            while (record := self._records.get()) is not None:
                self._log(run, record)
            run.finish()
        except Exception as error:  # no error of wandb may stop training
            _tell(f"wandb stopped taking records ({one_line(error)}); metrics.jsonl has them all")
            while self._records.get() is not None:
                pass

    def _log(self, run: Any, record: Record) -> None:
        kind, values = (
            record["kind"],
            {key: value for key, value in record.items() if key not in ("kind", "time")},
        )
        shared = {"time": record["time"]} | (
            {"step": values["step"]} if kind in BY_STEP and "step" in values else {}
        )
        run.log(shared | scalars(kind, values) | _histograms(kind, values))
        if kind == "evaluation":
            self._evaluations[values["label"]] = values
            _tell_evaluation(run, values["label"], values, self._evaluations)
        if "cut_share" in values:
            run.summary["cut_share"] = values["cut_share"]


def scalars(prefix: str, values: Record) -> dict[str, float]:
    """Numbers of a record, including nested tables, by path: `gate/by_age/0-3/rkl`."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= scalars(f"{prefix}/{key}", value)
        elif isinstance(value, int | float):
            found[f"{prefix}/{key}"] = value
    return found


def _histograms(kind: str, values: Record) -> dict[str, Any]:
    """wandb histograms of λ over [0, 1], and of the gated divergence over log10 of nats."""
    if kind != "gate" or "gate_histogram" not in values:
        return {}
    import wandb

    counts, divergences = values["gate_histogram"], values["divergence_histogram"]
    start, width = values["histogram_from"], 1 / values["histogram_bins_per_decade"]
    first = math.log10(start)
    edges = {
        "gate/lambda": (counts, [place / len(counts) for place in range(len(counts) + 1)]),
        "gate/log10_divergence": (
            divergences,
            [first + width * (place - 1) for place in range(len(divergences) + 1)],
        ),
    }
    return {
        name: wandb.Histogram(np_histogram=(np.array(pair[0]), np.array(pair[1])))
        for name, pair in edges.items()
    }


def _tell_evaluation(run: Any, label: str, values: Record, known: dict[str, Record]) -> None:
    """Log `before/reverse_kl` etc. to the summary, and tables of all evaluations and this one's samples."""
    import wandb

    for name, value in scalars(label, values).items():
        run.summary[name] = value
    own = [f"on_student/{name}" for name in MEASURES[:3]]
    rows = [[which, *(_found(found, name) for name in (*MEASURES, *own))] for which, found in known.items()]
    tables = {"evaluations": wandb.Table(columns=["student", *MEASURES, *own], data=rows)}
    samples = [[s["prompt"], s["completion"], s["solved"]] for s in values.get("samples", [])]
    if samples:
        tables[f"samples/{label}"] = wandb.Table(columns=["prompt", "completion", "solved"], data=samples)
    run.log(tables)


def _found(values: Record, path: str) -> Any:
    for name in path.split("/"):
        values = values.get(name) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values


def _start(config: Config) -> Any:
    import wandb

    own = "-score" if config.rollout.role == "score" else ""  # it runs at the same time as its generator
    path = Path(config.run_folder / f"wandb_id{own}")
    name = (read(path) or b"").decode(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", name):  # none yet, or damaged by a crash
        name = secrets.token_hex(4)
        replace_text(path, name)
    options: dict[str, Any] = {
        "project": config.log.wandb_project,
        "name": (config.log.wandb_name or config.run.run_name) + own,
        "dir": str(config.run_folder),
        "config": config.model_dump(),
        "id": name,
        "resume": "allow",
    }
    try:
        run = wandb.init(**options)  # WANDB_MODE=offline keeps records for `wandb sync`
    except Exception as error:  # no network or key: local records can be sent later
        where = config.run_folder / "wandb"
        _tell(f"wandb cannot be reached ({one_line(error)}); records are kept in {where} for `wandb sync`")
        run = wandb.init(mode="offline", **options)
    for axis in ("step", "time"):
        run.define_metric(axis)
    for kind in BY_STEP:
        run.define_metric(f"{kind}/*", step_metric="step")
    for kind in ("rollout_progress", "clock", "memory"):
        run.define_metric(f"{kind}/*", step_metric="time")
    return run


def _tell(line: str) -> None:
    print(plain(line), flush=True)
