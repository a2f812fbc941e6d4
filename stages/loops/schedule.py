"""Main loop of stage two: which rows to train on, when to refresh and why, and how to resume after a crash.

Every decision depends only on the contents of a checkpoint: a killed run repeats it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import cache
from stages.data.pool import Pool, live_pool
from stages.loops import gating, setup, steps, versions
from stages.loops.elsewhere import Arrivals, wait_for
from stages.loops.feed import global_batches
from stages.loops.refresh import cut_share
from stages.loops.steps import Training, begin_checkpoint, save_checkpoint
from stages.loops.versions import Version
from stages.models.student import Student, policy_hash
from stages.runtime import checkpoint, ending
from stages.runtime.checkpoint import Position, Refresh
from stages.runtime.config import Config
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.split import DRIFT_WINDOW, rollouts_of
from stages.runtime.terminal import Bar

WriteRows = Callable[[Training, int, Refresh], None]
"""Called with a refresh and its index; writes its rows."""


def due(config: Config, position: Position) -> str:
    """Reason why new rows are due before the next step; "" if none are due, and after the last step."""
    policy = config.refresh
    since = position.step - position.step_of(position.newest)
    if not config.refreshes or position.step >= config.train.max_steps or since < 1:
        return ""
    if policy.refresh_every and since >= policy.refresh_every:
        return f"every: {since} steps since the weights of the one before"
    if position.newest > position.refresh_index:
        return ""  # newer rows are on their way, whatever the drift of these
    if policy.refresh_drift and len(position.recent) == DRIFT_WINDOW:
        drift = sum(position.recent) / DRIFT_WINDOW
        if drift >= policy.refresh_drift:
            return f"drift: {drift:.4g} nats a token, the bound is {policy.refresh_drift:g}"
    if _too_old(config, position):
        return f"age: rows of step {position.step_of(position.refresh_index)} at step {position.step}"
    return ""


def _too_old(config: Config, position: Position) -> bool:
    """Whether training must wait for newer rows from elsewhere."""
    age = position.step - position.step_of(position.refresh_index)
    return config.refresh.refresh_mode == "external" and age > config.refresh.max_age


def last_step(config: Config, position: Position) -> int:
    """The latest step at which training on these rows stops: new rows are then due or awaited."""
    for step in range(position.step + 1, config.train.max_steps):
        later = replace(position, step=step)
        if due(config, later) or _too_old(config, later):
            return step
    return config.train.max_steps


def lost(run: Run, position: Position) -> str:
    """Reason for a refresh if rows in use are gone from the cache (damaged or pruned); "" if all exist.

    The student that wrote them has changed since, so all rows are written again.
    """
    if not position.num_rows or position.step >= run.config.train.max_steps:
        return ""
    there = _own_pool(run, position, cache.open(run.config.cache_root)).num_own if run.world.is_main else 0
    missing = position.num_rows - run.world.gather(there)[0]
    if missing <= 0:
        return ""
    rows = f"{missing} of the {position.num_rows} rows"
    found = f"{rows} in use are gone from {run.config.cache_root}"
    if not run.config.refreshes:
        run.metrics.say(f"warning: {found}; training continues with the others, since refresh_mode is off")
        return ""
    run.metrics.say(f"{found}: a refresh is due now")
    return f"lost: {missing} of {position.num_rows} rows were gone"


def resume(run: Run, training: Training) -> Position | None:
    """Load the checkpoint to resume from, if there is one (collective)."""
    path = setup.checkpoint_to_go_on_from(run)
    if path is None:
        if run.world.is_main:
            checkpoint.forget_best(run.folder / "checkpoints")
        run.metrics.rewind(0, 0)
        return None
    position = checkpoint.load(
        path, training.student.trainable, training.optimizer, training.scheduler, run.world, training.engine
    )
    training.step, training.adaptive = position.step, gating.starting(run.config, position.adaptive_tau)
    run.metrics.rewind(position.step, position.refresh_index)
    run.metrics.say(f"resuming from {path}")
    return position


def fit(run: Run, training: Training, refresh: WriteRows, evaluate: steps.Evaluate | None = None) -> None:
    """Train from the current step to `max_steps`.

    `evaluate(training)` returns held-out KLs. It is called every `eval_every` steps and after the last one;
    the weights with the lowest reverse KL are kept. A checkpoint is saved before every refresh and before
    every published version, and is on disk before the first rows of its weights are: a killed run resumes
    from saved weights, never from recomputed ones, and so writes the same rows again. Under `refresh_mode:
    external` the rows come from elsewhere. A version's rows are used only when all of them have arrived.
    """
    config = run.config
    arrivals = Arrivals(run) if config.refresh.refresh_mode == "external" else None
    with run.clock.phase("prepare"):
        start = {0: Refresh(0, policy_hash(training.student), "start")}
        position = resume(run, training) or Position(0, 0, refreshes=start)
        if arrivals is not None:
            versions.set_finished(run, training.step >= config.train.max_steps)
        _log_packing(run, training.student)
        gone = lost(run, position)
    pool, snapshot, began = None, None, training.step
    is_shown = run.world.is_main and not run.metrics.style.quiet
    bar = Bar("training", "step", config.train.max_steps, training.step, shown=is_shown, at_once=True)
    with bar, ending.finishing(), run.saver.finishing():
        while training.step < config.train.max_steps:
            reason, gone = due(config, position) or gone, ""
            if reason:
                with run.clock.phase("refresh"):
                    writes = refresh if arrivals is None else None
                    position = _renew(run, training, position, reason, writes)
            if arrivals is not None:
                with run.clock.phase("wait"):
                    position = _take_up_arrivals(run, training, position, arrivals, pool)
            if pool is None or snapshot is None or pool.version != position.refresh_index:
                with run.clock.phase("refresh"):
                    training.last_forward = None  # holds the head of the last pool's teacher
                    pool, snapshot = open_pool(run, position)
                    position = replace(position, num_rows=pool.num_own)
                    _discard_later(run, training.step)
            with run.clock.phase("train"):
                position = _fit_pool(run, training, position, pool, snapshot, arrivals, bar, evaluate)
        if training.step > began:
            save_checkpoint(run, training, position)
    if arrivals is not None:
        versions.set_finished(run, True)


def _log_packing(run: Run, student: Student) -> None:
    has_groups = run.config.rollout.group_size > 1
    unshared_because = student.unshared_because if has_groups else "group_size is 1"
    rows = f"padded ({student.padded_because})"
    if student.packs:
        shared = "shared" if not unshared_because else f"not shared ({unshared_because})"
        rows = f"packed, prompts are {shared}" if has_groups else "packed"
    run.metrics.say(
        f"training rows are {rows}"
        + (", the student's layers are compiled in the first step" if student.is_compiled else "")
    )
    run.metrics.log(
        "packing",
        packed=student.packs,
        reason=student.padded_because,
        shared=not unshared_because,
        unshared_reason=unshared_because,
        compiled=student.is_compiled,
    )


def _renew(
    run: Run, training: Training, position: Position, reason: str, refresh: WriteRows | None
) -> Position:
    """Have the current student's rows written, by `refresh` or, if None, elsewhere (collective)."""
    _discard_later(run, training.step)
    begin_checkpoint(run, training, position)
    index, started = position.newest + 1, Refresh(training.step, policy_hash(training.student), reason)
    position = replace(position, refreshes=position.refreshes | {index: started})
    if refresh is None:
        num_rollouts = len(rollouts_of(run.config, index))
        version = Version(index, started.step, started.policy_hash, num_rollouts)
        run.saver.settle(run.world)
        versions.publish(run, training.student, version)
        return position
    # a signal may end this at once: the checkpoint is on disk before any unit, and committed units are kept
    with ending.at_once(), steps.unwrapped(run.world, training):
        refresh(training, index, started)
    return _taken_up(position, index)


def _discard_later(run: Run, step: int) -> None:
    """With `resume_from`, discard the checkpoints after `step`, once training is certain to start."""
    if run.config.train.resume_from:
        run.saver.settle(run.world)
    if run.world.is_main and run.config.train.resume_from:
        checkpoint.discard_after(run.folder / "checkpoints", step)
    run.world.barrier()


def _stop_if_asked(run: Run, training: Training, position: Position) -> None:
    """Between two steps: if a signal asked any process to end, save a checkpoint and exit (collective)."""
    number = int(run.world.max([float(ending.asked())])[0])
    if not number or training.step >= run.config.train.max_steps:
        return
    path = save_checkpoint(run, training, position)
    run.metrics.close()
    run.world.barrier()  # a launcher ends the other processes as soon as one leaves
    line = (
        f"stopped by {signal.Signals(number).name} after step {training.step}; run the same command again to"
        f" resume from {path}"
    )
    raise ending.Stopped(line if run.world.is_main else "", 128 + number)


def _fit_pool(
    run: Run,
    training: Training,
    position: Position,
    pool: Pool,
    snapshot: cache.Snapshot,
    arrivals: Arrivals | None,
    bar: Bar,
    evaluate: steps.Evaluate | None,
) -> Position:
    """Train on the rows of `pool`.

    Until a refresh is due, newer rows arrive, training must wait, or max_steps is reached.
    """
    train, last = run.config.train, last_step(run.config, position)
    indices = range(training.step - pool.opened_at, last - pool.opened_at)
    with closing(global_batches(run, training.student, snapshot, pool, indices, training.caps)) as batches:
        while training.step < last:
            figures = steps.train_step(run, training, pool, next(batches))
            position = after_step(position, figures)
            bar.update(1, _figures(figures))
            if evaluate is not None and steps.is_evaluated(run.config, training.step):
                steps.evaluate_now(run, training, evaluate)
            _stop_if_asked(run, training, position)
            if due(run.config, position) or (arrivals and arrivals.bring_newer(position)):
                break
            if training.step % train.checkpoint_every == 0 and training.step < train.max_steps:
                begin_checkpoint(run, training, position)
    return position


def after_step(position: Position, figures: dict[str, Any]) -> Position:
    """`position` after a step with these figures (see `steps.train_step`): all that `due` may look at."""
    own = figures["own_drift"]
    recent = position.recent if own is None else [*position.recent, own]
    return replace(position, step=figures["step"], recent=recent[-DRIFT_WINDOW:])


def _figures(step: dict[str, Any]) -> str:
    """The figures of a step that progress shows."""
    names = {"loss": "loss", "rkl": "reverse KL", "fkl": "forward KL", "gate": "λ"}
    found = [f"{text} {step[key]:.4g}" for key, text in names.items() if step.get(key) is not None]
    if step.get("seconds"):
        found.append(f"{step['tokens'] / step['seconds']:,.0f} tokens/s")
    return ", ".join(found)


def _taken_up(position: Position, index: int) -> Position:
    """`position` on the rows of refresh `index`."""
    return replace(position, refresh_index=index, opened_at=position.step, recent=[])


def open_pool(run: Run, position: Position) -> tuple[Pool, cache.Snapshot]:
    """Rows to train on at `position`, same on all ranks even if others write to the caches (collective)."""
    config, version = run.config, position.refresh_index
    roots = [config.cache_root, *(root for root, weight in config.run.extra_caches.items() if weight)]
    snapshots = [cache.open(root) for root in roots]
    found = (
        [
            _own_pool(run, position, snapshot)
            if snapshot is snapshots[0]
            else live_pool(snapshot, "", version, 0, 0, {}, config.rollout.group_size)
            for snapshot in snapshots
        ]
        if run.world.is_main
        else []
    )
    pool, *others = run.world.gather(found)[0]
    snapshots = [snapshot.refresh() for snapshot in snapshots]  # at least what the main rank has seen
    for root, one, snapshot in zip(roots, (pool, *others), snapshots, strict=True):
        if not one.row_ids:
            raise UserError(
                f"{root} holds no rollouts to train on ({len(snapshot)} rows, all too old or from"
                " discarded steps); run `dualkl rollout` with the same configuration first."
            )
    for root, one, snapshot in zip(roots[1:], others, snapshots[1:], strict=True):
        pool = pool.with_extra(one, snapshot, config.run.extra_caches[root])
    if pool.num_off_policy:
        run.metrics.say(
            f"{pool.num_off_policy} of {len(pool.ages)} rows were written by another run or other weights"
            " (off-policy)"
        )
    return pool, snapshots[0]


def _own_pool(run: Run, position: Position, snapshot: cache.Snapshot) -> Pool:
    """This run's rows that `position` trains on, and other runs' rows in its cache."""
    return live_pool(
        snapshot,
        run.run_id,
        position.refresh_index,
        position.opened_at,
        run.config.refresh.max_age,
        position.policies,
        run.config.rollout.group_size,
    )


def _take_up_arrivals(
    run: Run, training: Training, position: Position, arrivals: Arrivals, pool: Pool | None
) -> Position:
    """Switch to the newest complete rows, after waiting for them if those in use are too old (collective)."""

    def look() -> int | None:
        index = arrivals.newest(position)
        if index >= 0 and not (index == position.refresh_index and _too_old(run.config, position)):
            return index
        _stop_if_asked(run, training, position)
        if run.world.is_main:
            versions.point_to(run.folder, position)
        return None

    def tell() -> None:
        run.metrics.say(
            f"waiting for rollouts of refresh {position.newest} (step {position.step_of(position.newest)});"
            f" training is at step {position.step} and max_age is {run.config.refresh.max_age}. They are"
            f" written by `dualkl rollout --follow {run.folder}`"
        )

    index = wait_for(look, on_wait=tell)
    assert index is not None  # it waits without limit
    if index == position.refresh_index:
        return position
    if pool is not None:
        save_checkpoint(run, training, position)
    started = position.refreshes[index]
    run.metrics.log(
        "refresh",
        step=position.step,
        refresh_index=index,
        policy_hash=started.policy_hash,
        policy_step=started.step,
        reason=started.reason,
        cut_share=cut_share(run, index),
    )
    return _taken_up(position, index)
