"""One process that runs cells one after the other, with models and device kept in memory between them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import cache
from bench.bakeoff import contenders, measures
from bench.bakeoff.arms import ARMS, PatchedLoss, Threshold, threshold_of
from bench.bakeoff.measures import Text
from bench.bakeoff.tasks import DEFAULT_SIGNAL, TASKS, TINY, Cell, Rival, Sizes, Start
from bench.measuring import ROOT, Record, release, synchronize
from stages.data.batches import on_device
from stages.data.pool import Pool, live_pool
from stages.data.prompts import Prompt, heldout_prompts
from stages.engine.opening import open_engine
from stages.loops import feed, refresh, schedule, setup, steps
from stages.loops.collect import plan
from stages.models.policy import Policy
from stages.models.student import Student, load_student
from stages.models.teacher import Teacher, check_writer, load_plain_model, plain_teacher
from stages.runtime.checkpoint import Position, Refresh
from stages.runtime.run import Run, open_run
from stages.runtime.split import rollouts_of

POLICY = "bake-off"
"""Takes the policy hash's place in row ids: all arms then draw the same random numbers and order of rows."""
GROUP = 1  # completions of a prompt; as TRL's
EVAL_EVERY = 16  # steps between measurements on the teacher's text
CALIBRATION_ROWS = 256


@dataclass(frozen=True)
class Place:
    """Where a worker finds its inputs and keeps its caches."""

    data: Path
    work: Path
    device: str
    tiny: bool = False
    changed: dict[str, int] = field(default_factory=dict)
    vllm: Path | None = None  # the folder of vLLM's packages

    def sizes(self, task: str) -> Sizes:
        return replace(TINY if self.tiny else TASKS[task].sizes, **self.changed)


class Lab:
    """The models of one pair, loaded, and what is shared by its cells."""

    def __init__(self, place: Place, task: str, student: str) -> None:
        self.place, self.name, self.pair = place, task, f"{task}.{student}"
        self.task, self.sizes, self.student_name = TASKS[task], place.sizes(task), student
        run = self.open(Cell(task, student, "reverse", self.task.lr, 0), {"gating": 1.0}, "load")
        self.vocabulary = setup.shared_vocabulary(run.config)
        self.student: Student = load_student(
            run.config, run.world.device, self.vocabulary.size, self.vocabulary.tokenizer
        )
        self.start_weights = {name: p.detach().clone() for name, p in self.student.trainable.items()}
        self.engine = open_engine(self.student.model)
        self.teacher: Teacher = plain_teacher(
            load_plain_model(run.config, run.world), run.world, run.config.train.packing
        )
        self.heldout: list[Prompt] = heldout_prompts(run.config, self.vocabulary.tokenizer).prompts
        self._prompts: dict[int, list[Prompt]] = {}

    def open(self, cell: Cell, keys: dict[str, Any], folder: str) -> Run:
        """A run with the cell's configuration; all runs of a seed have the same run id."""
        return open_run("", self.arguments(cell, keys, folder))

    def arguments(self, cell: Cell, keys: dict[str, Any], folder: str) -> list[str]:
        """The command line of a run with the cell's configuration."""
        sizes, task = self.sizes, self.task
        kind, _, size = cell.signal.partition("-")
        values: dict[str, Any] = {
            **task.keys,
            "runs_dir": self.place.work / "runs" / folder,
            "run_name": "run",
            "device": self.place.device,
            "seed": cell.seed,
            "student_model": self.place.data / task.students[cell.student],
            "teacher_model": self.place.data / task.teacher,
            "dataset": self.place.data / task.train,
            "eval_dataset": self.place.data / task.heldout,
            "eval_prompts": sizes.heldout,
            "max_prompt_tokens": sizes.max_prompt_tokens,
            "max_new_tokens": sizes.max_new_tokens,
            "group_size": GROUP,
            "gen_micro_batch": sizes.slots,
            "micro_batch_tokens": sizes.forward_tokens,
            "signal": kind,
            "batch_size": sizes.batch_size,
            "grad_accum": 1,
            "max_steps": round(sizes.steps * cell.longer),
            "warmup_steps": sizes.warmup_steps,
            "lr": cell.lr,
            "max_age": 0,
            "trace_every": 0,
            **_signal_keys(kind, size),
            **_refresh_keys(cell.refresh, sizes),
            **keys,
        }
        return ["--quiet", *(f"--{key}={_text(value)}" for key, value in values.items())]

    def reset(self) -> None:
        """Put the initial weights back."""
        self.take(self.start_weights)

    def take(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put these weights in; their names must be the student's."""
        own = self.student.trainable
        if own.keys() != weights.keys():
            raise ValueError(
                f"weights are named otherwise than the student's: {sorted(own.keys() ^ weights.keys())[:4]}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
                parameter.grad = None

    def policy(self, run: Run, step: int) -> Policy:
        rollout, student = run.config.rollout, self.student
        sampling = setup.Sampling(student.vocab_size, student.eos_ids)
        return Policy(
            student.model,
            self.engine,
            student.tokenizer,
            run.run_id,
            POLICY,
            step,
            sampling,
            rollout.max_new_tokens,
            student.autocast,
        )

    def prompts(self, run: Run) -> list[Prompt]:
        seed = run.config.run.seed
        if seed not in self._prompts:
            self._prompts[seed] = refresh.prompts_of(run, self.vocabulary)
        return self._prompts[seed]

    def write(self, run: Run, policy: Policy, index: int, rows: range, root: Path) -> list[str]:
        """Write the missing of these rollouts, scored; return their row ids. One worker writes at a time."""
        units = plan(
            self.prompts(run),
            seed=run.config.run.seed,
            run_id=run.run_id,
            policy_hash=POLICY,
            refresh_index=index,
            first_rollout=rows.start,
            num_rollouts=len(rows),
            group_size=GROUP,
            rollouts_per_unit=self.sizes.refresh_every * self.sizes.batch_size,
        )
        row_ids = [row.row_id for unit in units for row in unit.rows]
        root.parent.mkdir(parents=True, exist_ok=True)
        with root.with_name(f"{root.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (cache.exists(str(root)) and set(row_ids) <= set(cache.open(str(root)).row_ids)):
                signal = run.config.teacher_signal
                refresh.write_scored(
                    run, units, policy, self.vocabulary, lambda: self.teacher, str(root), signal
                )
        return row_ids

    def first_cache(self, seed: int, signal: str) -> Path:
        return self.place.work / "first" / f"{self.pair}.{signal}.s{seed}"

    @cached_property
    def teacher_texts(self) -> list[Text]:
        """The teacher's completions of the held-out prompts, written once for all workers."""
        path = self.place.work / "teacher_text" / f"{self.name}.json"
        if not path.exists():
            run = self.open(
                Cell(self.name, self.student_name, "reverse", self.task.lr, 0), {"gating": 1.0}, "text"
            )
            policy = setup.load_teacher_policy(run, self.vocabulary)
            check_writer(policy.model)
            with closing(policy.engine):
                texts = measures.write_texts(policy, self.heldout, self.sizes.slots)
            rows = [[t.prompt_ids.tolist(), t.completion_ids.tolist(), t.was_cut] for t in texts]
            _write(path, rows)
        return [Text(np.array(p), np.array(c), cut) for p, c, cut in json.loads(path.read_text())]

    def on_teacher(self) -> Record:
        return measures.divergences(self.student, self.teacher, self.teacher_texts, self.sizes.forward_tokens)

    def measure(self, run: Run, step: int) -> Record:
        """Everything that is measured before and after training."""
        found = self.measure_task(run, step)
        if self.task.measures_outside:
            found["outside_nll"] = measures.outside_nll(self.student, self.sizes.forward_tokens)
        self.engine.close()
        return found

    def measure_task(self, run: Run, step: int) -> Record:
        """On fresh text of the student and on the teacher's text, how the student writes, and its answers."""
        policy = self.policy(run, step)
        texts = measures.write_texts(policy, self.heldout, self.sizes.slots)
        found: Record = {
            "on_student": measures.divergences(self.student, self.teacher, texts, self.sizes.forward_tokens),
            "on_teacher": self.on_teacher(),
            "style": measures.style(texts),
        }
        if self.task.checker:
            spec, samples = str(ROOT / self.task.checker), self.sizes.num_samples
            found |= measures.solved_counts(policy, self.heldout, spec, samples, self.sizes.slots)
        return found


def _signal_keys(kind: str, size: str) -> dict[str, Any]:
    keys: dict[str, dict[str, Any]] = {
        "topk": {"signal_k": size},
        "nucleus": {"signal_p": size, "signal_k": 256},
        "hidden": {},
    }
    return keys[kind]


def _refresh_keys(refresh_policy: str, sizes: Sizes) -> dict[str, Any]:
    """Steps between refreshes; by drift, at most `refresh_every` steps' rows are written at once."""
    kind, _, value = refresh_policy.partition("-")
    if kind == "drift":
        rows = sizes.refresh_every * sizes.batch_size
        return {"refresh_every": 0, "refresh_drift": value, "rollouts_per_refresh": rows}
    every = sizes.steps if kind == "never" else int(kind or sizes.refresh_every)
    return {"refresh_every": every, "rollouts_per_refresh": every * sizes.batch_size}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _write(path: Path, value: Any) -> None:
    """Whole or not at all. Of several workers that write the same at once, the first wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(value))
    with suppress(FileExistsError):
        path.hardlink_to(partial)
    partial.unlink()


# --- jobs ---


def run_start(lab: Lab, job: Start) -> Record:
    """The shared first cache of a seed, the student before training, and the gates' thresholds."""
    cell = Cell(job.task, job.student, "reverse", lab.task.lr, job.seed, signal=job.signal)
    run = lab.open(cell, {"gating": 1.0}, job.name)
    lab.reset()
    started = time.perf_counter()
    root = lab.first_cache(job.seed, job.signal)
    with torch.random.fork_rng():
        rows = lab.write(run, lab.policy(run, 0), 0, rollouts_of(run.config, 0), root)
    snapshot = cache.open(str(root))
    bytes_per_token = snapshot.summary()["bytes_per_token"]
    record: Record = {
        "rows": len(rows),
        "seconds": {"first_cache": time.perf_counter() - started},
        "bytes_per_token": bytes_per_token,
    }
    if job.signal == DEFAULT_SIGNAL:
        record["before"] = lab.measure(run, 0)
        record["thresholds"] = {
            name: asdict(found) for name, found in _thresholds(lab, run, snapshot).items()
        }
    return record


@torch.no_grad()
def _thresholds(lab: Lab, run: Run, snapshot: cache.Snapshot) -> dict[str, Threshold]:
    """Of the initial student on the first rows of its first cache, by the divergence that is compared."""
    training = steps.prepare(run, lab.student)
    pool = live_pool(snapshot, run.run_id, 0, 0, 0, {})
    found: dict[str, list[torch.Tensor]] = {"rkl": [], "fkl": [], "teacher_entropy": []}
    num_steps = max(1, CALIBRATION_ROWS // run.config.train.batch_size)
    with closing(
        feed.global_batches(run, lab.student, snapshot, pool, range(num_steps), training.caps)
    ) as batches:
        for batch in batches:
            for _ in batch.forwards:
                inputs = on_device(next(batch.inputs)[1], run.world.device)
                out = training.module(inputs)[1]
                found["rkl"].append(out.rkl)
                found["fkl"].append(out.fkl)
                found["teacher_entropy"].append(inputs.teacher_entropy)
    return {name: threshold_of(torch.cat(parts)) for name, parts in found.items()}


def keys_of(cell: Cell, thresholds: Record | None, mean_gate: float | None) -> dict[str, Any]:
    """The configuration keys of the cell's objective."""
    arm = ARMS[cell.arm]
    keys = dict(arm.keys)
    if arm.gate_on:
        assert thresholds is not None
        keys |= {key: thresholds[arm.gate_on][key] for key in ("tau", "alpha")}
    if arm.mean_of:
        assert mean_gate is not None
        keys["gating"] = mean_gate
    return keys


def run_cell(lab: Lab, cell: Cell, thresholds: Record | None, mean_gate: float | None) -> Record:
    """Train and measure. Seconds are this process's: with others on the same card they are longer."""
    folder = lab.place.work / "runs" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    keys = keys_of(cell, thresholds, mean_gate)
    run = lab.open(cell, keys, cell.name)
    lab.reset()
    training = steps.prepare(run, lab.student)
    if ARMS[cell.arm].patch:
        settings = run.config.loss.settings(lab.student.vocab_size)
        training.module = PatchedLoss(lab.student, settings, ARMS[cell.arm].patch)
    record = _train(lab, run, cell, training)
    del training
    started = time.perf_counter()
    record["after"] = lab.measure(run, run.config.train.max_steps)
    record["seconds"]["measure"] = time.perf_counter() - started
    shutil.rmtree(folder, ignore_errors=True)
    return record | {"keys": keys}


def run_rival(lab: Lab, rival: Rival, thresholds: Record | None, longer: float | None) -> Record:
    """Let a contender train in a process of its own; then measure its student at each point of its time.

    `longer`: a factor on the steps of this project's run.
    """
    cell = replace(rival.cell, longer=longer or 1.0)
    keys = keys_of(cell, thresholds, None)
    folder = lab.place.work / "runs" / rival.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lab.reset()
    run = lab.open(cell, keys, rival.name)
    arguments = lab.arguments(cell, keys, rival.name)
    release(lab.place.device)
    found = contenders.train(rival, run.config, arguments, lab.prompts(run), folder, lab.place)
    started = time.perf_counter()
    for number, point in enumerate(found["points"]):
        lab.take(load_file(folder / "found" / f"{number}.safetensors"))
        is_last = number == len(found["points"]) - 1
        measured = (lab.measure if is_last else lab.measure_task)(run, point["step"])
        point |= {on: contenders.short(measured[on]) for on in ("on_student", "on_teacher")}
        point["avg"] = measured.get("avg")
    found["after"] = measured
    found["seconds"] = {"measure": time.perf_counter() - started}
    shutil.rmtree(folder, ignore_errors=True)
    return found | {"keys": keys}


def _train(lab: Lab, run: Run, cell: Cell, training: steps.Training) -> Record:
    """All steps, with refreshes as the configuration says."""
    seconds = {"train": 0.0, "refresh": 0.0}
    position = Position(0, 0, refreshes={0: Refresh(0, POLICY, "start")})
    history: list[Record] = []
    curve: list[Record] = []
    rollout_tokens = 0
    while training.step < run.config.train.max_steps:
        started = time.perf_counter()
        position, pool, snapshot = _rows(lab, run, cell, position)
        synchronize(lab.place.device)
        seconds["refresh"] += time.perf_counter() - started
        rollout_tokens += sum(pool.lengths[key][1] for key in pool.row_ids)
        last = schedule.last_step(run.config, position)
        indices = range(training.step - pool.opened_at, last - pool.opened_at)
        batches = feed.global_batches(run, lab.student, snapshot, pool, indices, training.caps)
        with closing(batches):
            while training.step < last:
                started = time.perf_counter()
                figures = steps.train_step(run, training, pool, next(batches))
                seconds["train"] += time.perf_counter() - started
                position = schedule.after_step(position, figures)
                history.append(figures)
                if training.step % EVAL_EVERY == 0:
                    found = lab.on_teacher()
                    del found["by_entropy"]
                    tokens = sum(step["tokens"] for step in history)
                    spent = sum(seconds.values())
                    curve.append({"step": training.step, "tokens": tokens, "seconds": spent, **found})
                if schedule.due(run.config, position):
                    break
    return {
        "seconds": seconds,
        "trained_tokens": sum(step["tokens"] for step in history),
        "rollout_tokens": rollout_tokens,
        "refreshes": position.refresh_index + 1,
        "mean_gate": sum(s["gate"] * s["tokens"] for s in history) / sum(s["tokens"] for s in history),
        "steps": {
            name: [step[name] for step in history] for name in ("loss", "rkl", "fkl", "gate", "grad_norm")
        },
        "curve": curve,
    }


def _rows(lab: Lab, run: Run, cell: Cell, position: Position) -> tuple[Position, Pool, cache.Snapshot]:
    """The rows to go on with: those of the shared first cache, or new ones of the student as it is now."""
    reason = schedule.due(run.config, position)
    policy = _policy_at(lab, run, cell, position.step)
    index = position.newest + 1 if reason else 0
    if reason:
        started = Refresh(position.step, POLICY, reason)
        position = replace(position, refreshes=position.refreshes | {index: started})
        position = replace(position, refresh_index=index, opened_at=position.step, recent=[])
    is_shared = not reason and cell.horizon == 1
    root = lab.first_cache(cell.seed, cell.signal) if is_shared else run.folder / "cache"
    row_ids = lab.write(run, policy, index, rollouts_of(run.config, index), root)
    snapshot = cache.open(str(root))
    pool = live_pool(snapshot, run.run_id, index, position.opened_at, 0, {})
    return position, replace(pool, row_ids=sorted(row_ids)), snapshot


def _policy_at(lab: Lab, run: Run, cell: Cell, step: int) -> Policy:
    """The student now; with a horizon, its limit grows linearly over the first 3/4 of the steps."""
    policy = lab.policy(run, step)
    if cell.horizon == 1:
        return policy
    share = min(1.0, step / (0.75 * run.config.train.max_steps))
    limit = round(run.config.rollout.max_new_tokens * (cell.horizon + (1 - cell.horizon) * share))
    return replace(policy, max_new_tokens=max(1, limit))


# --- the process ---


def main(connection: Any, place: Place, log: Path) -> None:
    """Run the jobs that arrive, until None does; answer each with its record or the text of an error."""
    sys.stdout.flush()
    file = log.open("a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    labs: dict[tuple[str, str], Lab] = {}
    while (message := connection.recv()) is not None:
        job, thresholds, number = message
        try:
            key = (job.task, job.student)
            if key not in labs:
                labs.clear()
                labs[key] = Lab(place, *key)
            started = time.perf_counter()
            if isinstance(job, Start):
                record = run_start(labs[key], job)
            elif isinstance(job, Rival):
                record = run_rival(labs[key], job, thresholds, number)
            else:
                record = run_cell(labs[key], job, thresholds, number)
            record["seconds"]["whole"] = time.perf_counter() - started
            connection.send(record)
        except Exception:
            text = traceback.format_exc()
            print(text, flush=True)
            connection.send(text)
