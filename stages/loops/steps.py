"""Stage two: run and log one optimizer step on committed rows. schedule.py chooses the rows."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import cache
from dualkl import DualKLConfig, DualKLOutput, dual_kl
from dualkl.compress import Compressed, compress
from dualkl.thresholds import AdaptiveTau
from stages.data.alignment import at_scored
from stages.data.batches import MicroBatch, on_device
from stages.data.pool import Pool
from stages.loops import gating, tracing
from stages.loops.budgets import Caps, train_caps_of_run
from stages.loops.drift import NUM_SUMS, Drift, drift_of, row_sums
from stages.loops.feed import Batch
from stages.models.dropout import evaluating
from stages.models.student import Student
from stages.runtime import checkpoint
from stages.runtime.checkpoint import Best, Position
from stages.runtime.config import Config, TrainSection
from stages.runtime.distributed import World
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.traces import NUM_TOP

# Bound on the largest weight, as a multiple of max(1, its value at the start).
EXPLODED = 100.0
LR_MIN_RATIO = 0.1  # last learning rate, relative to the peak
MOST_NAMED = 4
MEANS = ("share_forward", "student_logprob", "teacher_entropy")
Evaluate = Callable[["Training"], dict[str, Any]]


class StudentLoss(nn.Module):
    """Student forward and gated loss in one module: DDP and DeepSpeed must see a single forward.

    The next forward puts the student's most likely ids at its first `num_traced` positions into `top`, at
    the loss's temperature.
    """

    def __init__(self, student: Student, config: DualKLConfig):
        super().__init__()
        self.num_traced, self.top = 0, cast(Compressed | None, None)
        self.model = student.model
        self._student, self._config = student, config  # a dataclass, not a submodule

    def forward(self, batch: MicroBatch) -> tuple[Tensor, DualKLOutput]:
        hidden_Nd = at_scored(self._student.hidden(batch.aligned), batch.aligned)
        entropy_N = batch.teacher_entropy if self._config.gate_on == "teacher_entropy" else None
        out = dual_kl(
            hidden_Nd,
            self._student.head,
            batch.teacher,
            self._config,
            batch.sampled,
            batch.weights,
            tau=batch.tau,
            teacher_entropy=entropy_N,
        )
        self.top = self._most_likely(hidden_Nd.detach(), batch) if self.num_traced else None
        return out.loss, out

    def _most_likely(self, hidden_Nd: Tensor, batch: MicroBatch) -> Compressed:
        first, config = slice(self.num_traced), self._config
        return compress(
            hidden_Nd[first],
            self._student.head,
            batch.sampled.ids[first],
            k=NUM_TOP,
            vocab_size=config.vocab_size,
            temperature=config.temperature,
        )


@dataclass
class Training:
    """The student, its optimizer and the state of training.

    Attributes:
        module: StudentLoss as wrapped by DDP or DeepSpeed.
        adaptive: adaptive gate threshold for the next step; None if τ is not adaptive.
        caps: size limits of a forward.
        step: optimizer steps done.
        size_at_start: largest trained weight when this process started.
        last_forward: row ids and host tensors of this process's first forward in the last step.
    """

    student: Student
    module: nn.Module
    optimizer: Any
    scheduler: Any
    caps: Caps
    adaptive: AdaptiveTau | None = None
    step: int = 0
    size_at_start: float = 0.0
    last_forward: tuple[list[str], MicroBatch] | None = None

    @property
    def loss(self) -> StudentLoss:
        """The module without DDP or DeepSpeed."""
        return cast(StudentLoss, getattr(self.module, "module", self.module))

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine; None under DDP and in a single process."""
        return self.module if hasattr(self.module, "set_gradient_accumulation_boundary") else None


def prepare(run: Run, student: Student) -> Training:
    """Wrap the student for this world; build AdamW with warm-up and cosine decay (collective)."""
    train, world = run.config.train, run.world
    module: nn.Module = StudentLoss(student, run.config.loss.settings(student.vocab_size))
    caps = train_caps_of_run(run, student, module)
    optimizer = torch.optim.AdamW(
        student.trainable.values(),
        lr=train.lr,
        weight_decay=0.0,
        fused=world.device.type == "cuda",
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(train, step))
    if world.student_is_deepspeed:
        _fill_student_deepspeed(run.config, world.accelerator.state.deepspeed_plugin.deepspeed_config)
        module, optimizer = world.accelerator.prepare(module, optimizer)
    elif world.size > 1:
        module = _in_ddp(world, module)
    adaptive = gating.starting(run.config, {})
    return Training(
        student, module, optimizer, scheduler, caps, adaptive, size_at_start=largest_weight(student)
    )


def _in_ddp(world: World, module: nn.Module) -> nn.Module:
    """The module with its gradients summed over processes.

    find_unused_parameters keeps DDP from regrouping gradients after the first step. Without it, a resumed run
    with three or more processes would sum them in another order.
    """
    devices = [world.device] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        module, device_ids=devices, broadcast_buffers=False, find_unused_parameters=True
    )


@contextmanager
def unwrapped(world: World, training: Training) -> Iterator[None]:
    """For a refresh, take DDP off the module and put it on again afterwards (collective).

    Frees DDP's gradient buffers and the last forward's inputs for the teacher. If the student is
    offloaded as well, PyTorch drops DDP's hooks when the weights change device, and DDP would not notice.
    """
    training.last_forward = None
    is_ddp = isinstance(training.module, nn.parallel.DistributedDataParallel)
    if is_ddp:
        training.module = cast(nn.Module, training.module.module)
        gc.collect()  # DDP is in reference cycles
    yield
    if is_ddp:
        training.module = _in_ddp(world, training.module)


def lr_factor(train: TrainSection, step: int) -> float:
    """Learning rate of 0-based `step` relative to the peak.

    Linear warm-up that ends at 1, then a cosine down to LR_MIN_RATIO.
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    share = min(1.0, (step - train.warmup_steps) / max(1, train.max_steps - 1 - train.warmup_steps))
    return LR_MIN_RATIO + (1 - LR_MIN_RATIO) * 0.5 * (1 + math.cos(math.pi * share))


def _fill_student_deepspeed(config: Config, settings: dict[str, Any]) -> None:
    """Fill in settings missing from the accelerate config.

    Gradient accumulation and normalisation over the step are done here, not by DeepSpeed.
    """
    if settings.get("zero_optimization", {}).get("stage", 0) == 3:
        raise UserError(
            "the student cannot be sharded with ZeRO-3 (it generates); use stage 2 in the accelerate config."
        )
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = config.train.max_grad_norm
    settings["bf16"] = {"enabled": False}  # trained weights stay fp32, as under DDP; the forward autocasts
    settings["zero_allow_untested_optimizer"] = True
    settings.pop("fp16", None)


def is_evaluated(config: Config, step: int) -> bool:
    """Whether to measure held-out KLs after `step`: every `eval_every` steps and after the last."""
    every = config.eval.eval_every
    return bool(every) and (step % every == 0 or step == config.train.max_steps)


def evaluate_now(run: Run, training: Training, evaluate: Evaluate) -> None:
    """Log the held-out KLs; keep the weights if they are the best of this run so far (collective)."""
    with run.clock.phase("evaluate"):
        found = evaluate(training)
    now = Best(training.step, found["reverse_kl"], found["measured_on"])
    is_best = run.world.is_main and _keep_if_best(run, training, now)
    run.world.barrier()
    run.metrics.log("eval", step=training.step, **found, is_best=is_best)


def _keep_if_best(run: Run, training: Training, now: Best) -> bool:
    """Save the weights if this is the lowest reverse KL so far by the same measure; return whether it is.

    Main process only.
    """
    folder = run.folder / "checkpoints"
    best = checkpoint.best(folder)
    if best is not None and best.measured_on != now.measured_on:
        run.metrics.say(
            f"the best student so far, of step {best.step}, was measured on other held-out text or in another"
            f" dtype: its reverse KL of {best.reverse_kl:.4f} is not comparable, and the search for the best"
            f" restarts at step {now.step}"
        )
        best = None
    # Equal if this evaluation repeats one from before a crash.
    is_best = best is None or now.reverse_kl < best.reverse_kl or best == now
    if is_best:
        checkpoint.save_best(folder, training.student.trainable, now)
    return is_best


def save_checkpoint(run: Run, training: Training, position: Position) -> Path:
    """Save the state after `training.step` steps on the rows of `position`; return its folder (collective).

    Raises UserError and saves nothing if the weights have exploded or their forward is not finite.
    """
    with run.clock.phase("save"):
        path = begin_checkpoint(run, training, position)
        run.saver.settle(run.world)
    return path


def begin_checkpoint(run: Run, training: Training, position: Position) -> Path:
    """The same, while the run goes on; `run.saver.settle` waits for it (collective)."""
    with run.clock.phase("save"):
        return _begin_checkpoint(run, training, position)


def _begin_checkpoint(run: Run, training: Training, position: Position) -> Path:
    _check_sound(run, training)
    adaptive = training.adaptive
    position = replace(
        position, step=training.step, adaptive_tau={} if adaptive is None else adaptive.state()
    )
    return run.saver.begin(
        run.folder / "checkpoints",
        position,
        training.student.trainable,
        training.optimizer,
        training.scheduler,
        run.world,
        run.config.train.keep_checkpoints,
        training.engine,
    )


def largest_weight(student: Student) -> float:
    """Largest absolute trained weight; infinite or NaN if any weight is."""
    norms = [p.detach().abs().max() for p in student.trainable.values() if p.numel()]
    return float(torch.stack([norm.float() for norm in norms]).max())


@torch.no_grad()
def _check_sound(run: Run, training: Training) -> None:
    """Raise UserError if weights exploded or the last step's forward is not finite now (collective)."""
    size, bound = largest_weight(training.student), EXPLODED * max(1.0, training.size_at_start)
    problem = (
        ""
        if size <= bound
        else f"the largest trained weight is {size:.3g}, it was {training.size_at_start:.3g}"
    )
    if not problem and training.last_forward is not None:
        row_ids, inputs = training.last_forward
        module = training.loss
        module.num_traced = 0
        with evaluating(module):
            out = module(on_device(inputs, run.world.device))[1]
        if not math.isfinite(float((out.rkl + out.fkl).sum())):
            problem = f"the forward on rows {', '.join(row_ids[:MOST_NAMED])} is not finite"
    found = [f"rank {rank}: {text}" for rank, text in enumerate(run.world.gather(problem)) if text]
    if found:
        raise UserError(
            f"the student's weights exploded by step {training.step} ({found[0]}); {_how_to_go_on(run)}"
        )


def _how_to_go_on(run: Run) -> str:
    """What is kept, and what may help (collective)."""
    unwritten = ""
    try:
        run.saver.settle(run.world)
    except UserError as error:
        unwritten = f" Before that, {error}"
    kept = checkpoint.complete(run.folder / "checkpoints")
    steps = ", ".join(str(checkpoint.step_of(path)) for path in kept)
    where = (
        f"this step was not saved, the checkpoints of steps {steps} are kept"
        if kept
        else "no checkpoint was written"
    )
    back = "; --resume_from STEP starts from one of them" if kept else ""
    return f"{where}. Lower lr (now {run.config.train.lr:g}) or max_grad_norm and run again{back}.{unwritten}"


def _suspects(batch: Batch, pool: Pool, outputs: list[DualKLOutput]) -> list[tuple[str, float]]:
    """This rank's rows with non-finite or else the largest divergences, as (row id, nats per token)."""
    rows: list[tuple[str, float]] = []
    forwards = [forward for forward in batch.forwards if not forward.is_idle]
    for forward, out in zip(forwards, outputs, strict=True):
        parts = (
            (out.rkl + out.fkl)
            .detach()
            .float()
            .cpu()
            .split([pool.lengths[key][1] for key in forward.row_ids])
        )
        rows += [(key, float(part.mean())) for key, part in zip(forward.row_ids, parts, strict=True)]
    broken = [row for row in rows if not math.isfinite(row[1])]
    return (broken or sorted(rows, key=lambda row: -row[1]))[:MOST_NAMED]


def _not_finite(
    run: Run, training: Training, grad_norm: float, suspects: list[tuple[str, float]]
) -> UserError:
    """The error for a step whose gradient is not finite (collective)."""
    everyone = run.world.gather(suspects)
    broken = [(rank, *row) for rank, rows in enumerate(everyone) for row in rows if not math.isfinite(row[1])]
    shown = broken or [(rank, *row) for rank, rows in enumerate(everyone) for row in rows]
    named = ", ".join(
        f"{key} of rank {rank} ({value:.3g} nats a token)" for rank, key, value in shown[:MOST_NAMED]
    )
    return UserError(
        f"the gradient of step {training.step + 1} is not finite (norm"
        f" {grad_norm});{'' if training.engine else ' the weights were not updated;'}"
        f" the {'non-finite' if broken else 'largest'} divergences are those of rows {named};"
        f" {_how_to_go_on(run)} `dualkl cache verify` checks whether the rows are damaged."
    )


def train_step(run: Run, training: Training, pool: Pool, batch: Batch) -> dict[str, Any]:
    """Run one optimizer step (collective); return its record and `own_drift`.

    The record is identical on all ranks except for timings. `own_drift` is the drift over this run's rows,
    None without any. The host waits for the device only once, to read the step's figures before the
    weights are updated.
    """
    started = time.perf_counter()
    config, world = run.config, run.world
    training.module.train()
    # Dropout differs between ranks.
    torch.manual_seed((config.run.seed * 1_000_003 + training.step) * 4096 + world.rank)
    tau = gating.threshold(config, training.adaptive)
    done = _run_forwards(run, training, pool, batch, tau)
    lr = training.scheduler.get_last_lr()[0]
    values, grad_norm = _update(training, config.train.max_grad_norm, done.sums())
    if not math.isfinite(grad_norm):
        raise _not_finite(run, training, grad_norm, _suspects(batch, pool, done.outputs))
    seconds = time.perf_counter() - started
    totals = _over_ranks(run, batch, done.num_cut, values)
    training.adaptive = gating.adapted(config, training.adaptive, totals.gate)
    lengths = [pool.lengths[key][1] for key in batch.row_ids]
    drift = drift_of(totals.rows_R3, lengths, [pool.ages[key] >= 0 for key in batch.row_ids])
    record = {
        "step": training.step,
        **_figures(training, pool, batch, totals, drift),
        **gating.step_figures(totals.gate, tau),
        "grad_norm": grad_norm,
        "lr": lr,
        "seconds": seconds,
        "read_wait_seconds": done.waited,
    }
    run.metrics.log("step", **record)
    run.metrics.log("gate", step=training.step, **gating.gate_record(totals.gate, tau))
    if done.top is not None:
        tracing.write(run, training.step, done.first, done.outputs[0], done.top)
    return record | {"own_drift": drift.own}


@dataclass
class _Forwards:
    """Results of this rank's forwards in one step, idle ones excluded.

    Attributes:
        outputs, teacher_entropies, gates, drifts: one per forward; statistics stay on the device.
        first: rows of the first forward.
        top: the student's most likely ids on its first rows, if the step is traced.
        num_cut: rows cut off at max_new_tokens.
        waited: seconds spent waiting for rows.
    """

    outputs: list[DualKLOutput] = field(default_factory=list)
    teacher_entropies: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    drifts: list[Tensor] = field(default_factory=list)
    first: list[cache.Record] = field(default_factory=list)
    top: Compressed | None = None
    num_cut: int = 0
    waited: float = 0.0

    def sums(self) -> Tensor:
        """Float64 on the device: loss, token sums of `MEANS`, gate statistics, `row_sums` of each row."""

        def of(out: DualKLOutput, entropy_N: Tensor) -> Tensor:
            assert out.student_logprobs is not None
            values = (out.loss.detach(), out.gate < 0.5, out.student_logprobs, entropy_N)
            return torch.stack([value.double().sum() for value in values])

        sums = torch.stack(list(map(of, self.outputs, self.teacher_entropies))).sum(0)
        return torch.cat([sums, torch.stack(self.gates).sum(0), torch.cat(self.drifts).flatten()])


def _run_forwards(run: Run, training: Training, pool: Pool, batch: Batch, tau: float | None) -> _Forwards:
    """Run forward and backward of everything in `batch`; gradients accumulate on the parameters."""
    config, world, done = run.config, run.world, _Forwards()
    for index, forward in enumerate(batch.forwards):
        asked = time.perf_counter()
        rows, inputs = next(batch.inputs)
        done.waited += time.perf_counter() - asked
        inputs = replace(inputs, tau=tau)
        if index == 0:
            done.first = rows
            training.last_forward = forward.row_ids, inputs
        inputs = on_device(inputs, world.device)
        is_traced = index == 0 and not forward.is_idle and tracing.is_due(run, training.step + 1)
        training.loss.num_traced = tracing.num_positions(rows) if is_traced else 0
        out = _backward(training, inputs, world.size, index == len(batch.forwards) - 1)
        if is_traced:
            done.top, training.loss.top = training.loss.top, None
        if not forward.is_idle:
            assert out.student_logprobs is not None
            assert inputs.teacher_entropy is not None
            lengths = [len(record.completion_ids) for record in rows]
            groups = gating.groups_of(pool, training.step, forward.row_ids, lengths, world.device)
            done.outputs.append(out)
            done.teacher_entropies.append(inputs.teacher_entropy)
            done.gates.append(gating.statistics_of(config, out, inputs, groups))
            done.drifts.append(row_sums(out.student_logprobs, inputs.sampled.behaviour_logprobs, lengths))
            done.num_cut += sum(record.finish_reason == "length" for record in rows)
    return done


def _backward(training: Training, batch: MicroBatch, world_size: int, last: bool) -> DualKLOutput:
    """Run one micro-batch, forward and backward. The factor undoes averaging of gradients over ranks."""
    engine = training.engine
    if engine is not None:
        loss, out = engine(batch)
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss * world_size)
        return out
    module = training.module
    with (
        module.no_sync()
        if isinstance(module, nn.parallel.DistributedDataParallel) and not last
        else nullcontext()
    ):
        loss, out = module(batch)
        (loss * world_size).backward()
    return out


def _update(training: Training, max_grad_norm: float, sums: Tensor) -> tuple[list[float], float]:
    """Clip, step and clear; return `sums` read from the device and the gradient norm before clipping.

    If that norm is not finite, no step is taken (but DeepSpeed has already stepped by then).
    """
    engine = training.engine
    if engine is not None:
        engine.step()
        values, grad_norm = sums.tolist(), float(engine.get_global_grad_norm() or 0.0)
    else:
        norm = nn.utils.clip_grad_norm_(training.student.trainable.values(), max_grad_norm)
        *values, grad_norm = torch.cat([sums, norm.double()[None]]).tolist()
        if math.isfinite(grad_norm):
            training.optimizer.step()
        training.optimizer.zero_grad()
    if not math.isfinite(grad_norm):
        return values, grad_norm
    training.scheduler.step()
    training.step += 1
    return values, grad_norm


@dataclass(frozen=True)
class _Totals:
    """Sums over one step's global batch: over tokens (`loss`, `means`, `gate`) and per row (`rows_R3`)."""

    num_cut: float
    loss: float
    means: dict[str, float]
    gate: Tensor
    rows_R3: np.ndarray


def _over_ranks(run: Run, batch: Batch, num_cut: int, values: list[float]) -> _Totals:
    """Sum `_Forwards.sums`, given as `values` read from the device, over all ranks (collective)."""
    end = 1 + len(MEANS) + gating.LENGTH
    rows_R3 = _spread_rows(run, batch, np.array(values[end:]).reshape(-1, NUM_SUMS))
    num_cut_all, loss, *rest = run.world.sum([num_cut, *values[:end], *rows_R3.flatten().tolist()])
    means, gate, rows = np.split(np.array(rest), [len(MEANS), len(MEANS) + gating.LENGTH])
    return _Totals(
        num_cut_all,
        loss,
        dict(zip(MEANS, (means / batch.total_tokens).tolist(), strict=True)),
        torch.from_numpy(gate),
        rows.reshape(-1, NUM_SUMS),
    )


def _figures(training: Training, pool: Pool, batch: Batch, totals: _Totals, drift: Drift) -> dict[str, float]:
    """Figures of a `step` record that describe the step's rows."""
    ages = [pool.ages[row_id] for row_id in batch.row_ids if pool.ages[row_id] >= 0]
    return {
        "loss": totals.loss,
        **totals.means,
        "refresh_index": pool.version,
        "tokens": batch.total_tokens,
        "mean_completion_tokens": batch.total_tokens / len(batch.row_ids),
        "cut_share": totals.num_cut / len(batch.row_ids),
        "staleness": (training.step - 1 - pool.opened_at) + sum(ages) / max(len(ages), 1),
        "drift": drift.drift,
        "ess": drift.ess,
        "ess_rows": drift.ess_rows,
    }


def _spread_rows(run: Run, batch: Batch, own_R3: np.ndarray) -> np.ndarray:
    """Place this rank's rows, given in the order of its forwards, in the global batch; zeros elsewhere."""
    size, world = len(batch.row_ids), run.world
    first = world.rank * size // world.size
    places: dict[str, list[int]] = {}
    for place in range(first, (world.rank + 1) * size // world.size):
        places.setdefault(batch.row_ids[place], []).append(place)
    order = [
        places[key].pop(0) for forward in batch.forwards if not forward.is_idle for key in forward.row_ids
    ]
    spread_R3 = np.zeros((size, own_R3.shape[1]))
    spread_R3[order] = own_R3
    return spread_R3
