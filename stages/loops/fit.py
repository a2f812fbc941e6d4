"""Stage two: one optimizer step on committed rows. Which rows, and when others: schedule.py."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

import cache
from dualkl import DualKLConfig, DualKLOutput, Head, dual_kl
from stages.data.alignment import at_scored
from stages.data.batches import (
    MicroBatch,
    Pool,
    batch_rows,
    by_cache,
    dual_kl_head,
    micro_batches,
    read_ahead,
    to_tensors,
)
from stages.loops.drift import NUM_SUMS, Drift, drift_of, row_sums
from stages.models.student import Student
from stages.runtime import checkpoint
from stages.runtime.checkpoint import Position
from stages.runtime.config import Config, TrainSection, rows_per_micro_step
from stages.runtime.errors import UserError
from stages.runtime.run import Run

AUTO_TRAIN_ROWS = 64


class StudentLoss(nn.Module):
    """Student forward and gated loss in one module, so that DDP and DeepSpeed see one forward."""

    def __init__(self, student: Student, config: DualKLConfig):
        super().__init__()
        self.model = student.model
        self._student, self._config = student, config  # a dataclass, not a submodule

    def forward(self, batch: MicroBatch) -> tuple[Tensor, DualKLOutput]:
        hidden_Nd = at_scored(
            self._student.hidden(batch.aligned.input_ids, batch.aligned.attention_mask), batch.aligned
        )
        out = dual_kl(hidden_Nd, self._student.head, batch.teacher, self._config, batch.sampled, batch.weights)
        return out.loss, out


@dataclass
class Training:
    """The student with what updates it; `module` is StudentLoss as wrapped by DDP or DeepSpeed."""

    student: Student
    module: nn.Module
    optimizer: Any
    scheduler: Any
    step: int = 0

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine, or None under DDP and in a single process."""
        return self.module if hasattr(self.module, "set_gradient_accumulation_boundary") else None


def loss_config(config: Config, vocab_size: int) -> DualKLConfig:
    return DualKLConfig(**config.loss.model_dump(), vocab_size=vocab_size)


def prepare(run: Run, student: Student) -> Training:
    """Wraps the student for this world and makes AdamW with warm-up and cosine decay."""
    train, world = run.config.train, run.world
    module: nn.Module = StudentLoss(student, loss_config(run.config, student.vocab_size))
    optimizer = torch.optim.AdamW(student.trainable.values(), lr=train.lr, weight_decay=train.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(train, step))
    if world.student_is_deepspeed:
        _fill_student_deepspeed(run.config, world.accelerator.state.deepspeed_plugin.deepspeed_config)
        module, optimizer = world.accelerator.prepare(module, optimizer)
    elif world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        module = nn.parallel.DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
    return Training(student, module, optimizer, scheduler)


def lr_factor(train: TrainSection, step: int) -> float:
    """Learning rate of 0-based `step` over the peak: linear warm-up that ends at 1, then a cosine down to lr_min_ratio."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    share = min(1.0, (step - train.warmup_steps) / max(1, train.max_steps - 1 - train.warmup_steps))
    return train.lr_min_ratio + (1 - train.lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def _fill_student_deepspeed(config: Config, settings: dict[str, Any]) -> None:
    """What the accelerate config leaves open; accumulation and normalisation over the step are ours."""
    if settings.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError(
            "the student cannot be sharded with ZeRO-3 (it generates); use stage 2 in the accelerate config."
        )
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = config.train.max_grad_norm
    settings["bf16"] = {"enabled": False}  # trained weights stay fp32 as under DDP; the forward autocasts
    settings["zero_allow_untested_optimizer"] = True
    settings.pop("fp16", None)


def save_checkpoint(run: Run, training: Training, position: Position) -> None:
    """The state after `training.step` steps, on the rows that `position` names."""
    checkpoint.save(
        run.folder / "checkpoints", replace(position, step=training.step), training.student.trainable, training.optimizer,
        training.scheduler, run.world, run.config.train.keep_checkpoints, training.engine,
    )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step, by their keys in the pool.

    Attributes:
        row_ids: of all ranks.
        forwards: this rank's, cut into forwards, each of rows of one cache.
        records: the rows of `forwards`, read ahead; whoever takes a batch takes all of them before the next batch.
    """

    row_ids: list[str]
    forwards: list[list[str]]
    records: Iterator[list[cache.Record]]


def global_batches(run: Run, snapshot: cache.Snapshot, pool: Pool, indices: Iterable[int]) -> Iterator[Batch]:
    """The pool's batches of these numbers, in order; a thread reads and decodes the next forward's rows meanwhile."""
    world, size = run.world, run.config.train.batch_size
    micro_rows = rows_per_micro_step(run.config, world.size)

    def plan(index: int) -> tuple[list[str], list[list[str]]]:
        row_ids = batch_rows(pool, run.config.run.seed, index, size)
        own = row_ids[world.rank * size // world.size : (world.rank + 1) * size // world.size]
        return row_ids, list(_forwards(run.config, pool, own, micro_rows))

    def read(keys: list[str]) -> list[cache.Record]:
        places = [pool.locate(key, snapshot) for key in keys]
        return [source[source.position(row_id)] for source, row_id in places]

    plans, coming = tee(map(plan, indices))
    records = read_ahead(read, (rows for _, forwards in coming for rows in forwards))
    for row_ids, forwards in plans:
        yield Batch(row_ids, forwards, records)


def train_step(run: Run, training: Training, snapshot: cache.Snapshot, pool: Pool, batch: Batch) -> Drift:
    """One optimizer step (collective); returns how far the student was from the policies of its rows."""
    started = time.perf_counter()
    config, world, device = run.config, run.world, run.world.device
    scored = sum(pool.lengths[row_id][1] for rows in batch.forwards for row_id in rows)
    total_tokens = world.sum([float(scored)])[0]
    num_forwards = int(world.max([float(len(batch.forwards))])[0])
    pad_id, vocab_size = training.student.tokenizer.pad_token_id, training.student.vocab_size
    training.module.train()
    torch.manual_seed((config.run.seed * 1_000_003 + training.step) * 4096 + world.rank)  # dropout, apart on every rank
    outputs: list[DualKLOutput] = []
    drifts: list[Tensor] = []
    first: list[cache.Record] = []
    waited = 0.0
    for index in range(num_forwards):
        idle = index >= len(batch.forwards)  # short of work: join the collectives with weight 0
        asked = time.perf_counter()
        rows = first[:1] if idle else next(batch.records)
        waited += time.perf_counter() - asked
        first = first or rows
        head = _teacher_head(pool.locate(batch.forwards[0 if idle else index][0], snapshot)[0], device)
        inputs = to_tensors(rows, 0.0 if idle else 1.0 / total_tokens, head, pad_id, device, vocab_size)
        out = _backward(training, inputs, world.size, last=index == num_forwards - 1)
        if not idle:
            outputs.append(out)
            drifts.append(
                row_sums(out.student_logprobs, inputs.sampled.behaviour_logprobs, [len(r.completion_ids) for r in rows])
            )
    lr = training.scheduler.get_last_lr()[0]
    grad_norm = _update(training, config.train.max_grad_norm)
    times = {"seconds": time.perf_counter() - started, "read_wait_seconds": waited}
    drift = _report(run, training, pool, batch, outputs, drifts, total_tokens, grad_norm, lr, times)
    _trace(run, training, first, outputs)
    return drift


def _forwards(config: Config, pool: Pool, row_ids: list[str], micro_rows: int) -> Iterator[list[str]]:
    rows, tokens = config.rollout.lp_micro_batch, config.train.micro_batch_tokens
    for start in range(0, len(row_ids), micro_rows):
        for of_one_cache in by_cache(row_ids[start : start + micro_rows]):
            yield from micro_batches(
                of_one_cache,
                lambda row_id: sum(pool.lengths[row_id]),
                AUTO_TRAIN_ROWS if rows == "auto" else rows,
                None if tokens == "auto" else tokens,
            )


def _teacher_head(snapshot: cache.Snapshot, device: torch.device) -> Head | None:
    if snapshot.fingerprint.must_match["signal"]["kind"] != "hidden":
        return None
    return _cached_head(snapshot.root, device)


_heads: dict[tuple[str, torch.device], Head | None] = {}


def _cached_head(root: str, device: torch.device) -> Head | None:
    """The head of a `hidden` cache, read once a process: it never changes (its hash is in the fingerprint)."""
    key = (root, device)
    if key not in _heads:
        _heads[key] = dual_kl_head(cache.open(root).head(), device)
    return _heads[key]


def _backward(training: Training, batch: MicroBatch, world_size: int, last: bool) -> DualKLOutput:
    """Forward and backward of one micro-batch. Gradients are averaged over ranks, hence the factor."""
    engine = training.engine
    if engine is not None:
        loss, out = engine(batch)
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss * world_size)
        return out
    quiet = isinstance(training.module, nn.parallel.DistributedDataParallel) and not last
    with training.module.no_sync() if quiet else nullcontext():
        loss, out = training.module(batch)
        (loss * world_size).backward()
    return out


def _update(training: Training, max_grad_norm: float) -> float:
    """Clips, steps, clears; returns the gradient norm before clipping."""
    engine = training.engine
    if engine is not None:
        engine.step()
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
    else:
        grad_norm = float(nn.utils.clip_grad_norm_(training.student.trainable.values(), max_grad_norm))
        if math.isfinite(grad_norm):
            training.optimizer.step()
        training.optimizer.zero_grad()
    if not math.isfinite(grad_norm):
        raise UserError(
            f"the gradient of step {training.step + 1} is not finite (norm {grad_norm}); the weights were not updated."
            " The last checkpoint is kept. Lower lr or max_grad_norm, or look at the rows with `python -m cache verify`."
        )
    training.scheduler.step()
    training.step += 1
    return grad_norm


def _report(
    run: Run, training: Training, pool: Pool, batch: Batch, outputs: list[DualKLOutput], drifts: list[Tensor],
    total_tokens: float, grad_norm: float, lr: float, times: dict[str, float],
) -> Drift:  # fmt: skip
    """One `step` record: token means over the global batch, and its drift, which is returned."""
    sums = torch.zeros(6, dtype=torch.float64, device=run.world.device)
    for out in outputs:
        values = (out.rkl, out.fkl, out.gate, out.gate < 0.5, out.floored, out.student_logprobs)
        sums += torch.stack([value.double().sum() for value in values])
    losses = sum(float(out.loss.detach()) for out in outputs)
    own_rows = _spread_rows(run, batch, torch.cat(drifts)).flatten().tolist()
    reduced = run.world.sum([losses, *sums.tolist(), *own_rows])
    row_sums_R3 = np.array(reduced[1 + len(sums) :]).reshape(-1, NUM_SUMS)
    drift = drift_of(batch.row_ids, row_sums_R3, [pool.lengths[row_id][1] for row_id in batch.row_ids],
                     [pool.ages[row_id] >= 0 for row_id in batch.row_ids])  # fmt: skip
    means = dict(zip(("rkl", "fkl", "gate", "share_forward", "share_floored", "student_logprob"),
                     (value / total_tokens for value in reduced[1 : 1 + len(sums)]), strict=True))  # fmt: skip
    ages = [pool.ages[row_id] for row_id in batch.row_ids if pool.ages[row_id] >= 0]
    staleness = (training.step - 1 - pool.opened_at) + sum(ages) / max(len(ages), 1)
    run.metrics.log(
        "step", step=training.step, loss=reduced[0], **means, grad_norm=grad_norm, refresh_index=pool.version,
        lr=lr, tokens=int(total_tokens), staleness=staleness, drift=drift.drift, ess=drift.ess, ess_rows=drift.ess_rows,
        **times,
    )  # fmt: skip
    return drift


def _spread_rows(run: Run, batch: Batch, own_R3: Tensor) -> Tensor:
    """This rank's rows, in the order of its forwards, at their places in the global batch; zeros elsewhere."""
    size, world = len(batch.row_ids), run.world
    first = world.rank * size // world.size
    places: dict[str, list[int]] = {}
    for place in range(first, (world.rank + 1) * size // world.size):
        places.setdefault(batch.row_ids[place], []).append(place)
    order = [places[key].pop(0) for keys in batch.forwards for key in keys]
    spread_R3 = torch.zeros(size, own_R3.shape[1], dtype=own_R3.dtype, device=own_R3.device)
    spread_R3[torch.tensor(order, device=own_R3.device)] = own_R3
    return spread_R3


def _trace(run: Run, training: Training, rows: list[cache.Record], outputs: list[DualKLOutput]) -> None:
    """Every `trace_every` steps: λ, reverse and forward KL of each token of `rows`, the main rank's first forward."""
    every = run.config.log.trace_every
    if not (run.world.is_main and every and training.step % every == 0):
        return
    out = outputs[0]
    columns: dict[str, list[Any]] = {"row_id": [], "position": [], "token_id": []}
    for record in rows:
        columns["row_id"] += [record.row_id] * len(record.completion_ids)
        columns["position"] += range(len(record.completion_ids))
        columns["token_id"] += record.completion_ids.tolist()
    values = {"gate": out.gate, "reverse_kl": out.rkl, "forward_kl": out.fkl}
    table = pa.table(columns | {name: value.float().cpu().numpy() for name, value in values.items()})
    path = Path(run.folder / "trace" / f"step-{training.step:06d}.arrow")
    path.parent.mkdir(exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
