"""Stage two: train the student on the cached rollouts, with refreshes.

    dualkl train FILE
    torchrun --nproc_per_node N -m stages.train FILE       on N GPUs

Resumes from the run's newest checkpoint. The teacher is loaded for refreshes
only: never with --refresh_mode off; with external, another process loads it
(dualkl rollout --follow RUN).
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "train")

from typing import Any

import cache
from stages.data.prompts import Prompt
from stages.engine.opening import open_engine
from stages.loops import leaks, measure, preflight, refresh, schedule, setup, steps
from stages.loops.elsewhere import wait_for
from stages.loops.setup import Vocabulary
from stages.models import student as students
from stages.models.student import Student, policy_hash
from stages.models.teacher import TeacherLoader
from stages.runtime import card, checkpoint, metrics
from stages.runtime.config import Config
from stages.runtime.errors import UserError, command
from stages.runtime.files import replace_text
from stages.runtime.run import Run, open_run


def main() -> None:
    run = open_run(__doc__ or "")
    with run.clock.phase("prepare"):
        ready = _prepare(run)
    student, _ = setup.current_student(run, ready.vocabulary)
    step = train(run, student, ready.vocabulary, ready.prompts)
    last, path = run.metrics.last_step, run.folder / "student"
    how = f" (reverse KL {last['rkl']:.4f}, forward KL {last['fkl']:.4f})" if last else ""
    run.metrics.conclude(
        f"trained to step {step}{how}; the student is in {path}\n"
        f"next:  dualkl evaluate with the same configuration, then dualkl report {run.folder}",
        {"step": step, "student": str(path), "cache": run.config.cache_root, "last_step": last},
    )


def _prepare(run: Run) -> preflight.Ready:
    """All checks that need no weights; waits for the cache if another process writes it."""
    run.claim()
    setup.check_history(run)
    if run.config.refresh.refresh_mode == "external":
        _await_cache(run)
    if not cache.exists(run.config.cache_root):
        raise UserError(
            f"there is no teacher cache at {run.config.cache_root}; run `dualkl rollout` with the"
            " same configuration first, or name one with --cache_dir."
        )
    return preflight.check_early(run, _work(run.config), setup.cached_vocabulary)


def _work(config: Config) -> preflight.Work:
    """Work to check before training. Without refreshes no teacher is needed: its text may already exist."""
    inline = config.refreshes and config.refresh.refresh_mode == "inline"
    if inline:
        refresh.refuse_role(config)
    return preflight.Work(
        generates=inline, scores=inline, trains=True, evaluates=bool(config.eval.eval_every)
    )


def train(
    run: Run,
    student: Student,
    vocabulary: Vocabulary,
    prompts: list[Prompt] | None = None,
    teacher: TeacherLoader | None = None,
) -> int:
    """Train to max_steps and export the student to `runs/<name>/student`; return its step.

    `prompts`: read if not given. `teacher`: one that refreshes share with other work.
    """
    if teacher is None:
        with TeacherLoader(run.config, run.world, run.metrics.say_once) as own:
            return train(run, student, vocabulary, prompts, own)
    inline = run.config.refreshes and run.config.refresh.refresh_mode == "inline"
    with run.clock.phase("prepare"):
        training = steps.prepare(run, student)
        if prompts is None:
            prompts = refresh.prompts_of(run, vocabulary) if inline else []
        engine = open_engine(student.model)
    if (
        run.config.refresh.refresh_mode != "external"  # else the follower checks its generator
        and checkpoint.latest(run.folder / "checkpoints") is None
    ):
        refresh.check_generator(run, student, engine, 0)

    def refresh_now(now: steps.Training, index: int, started: checkpoint.Refresh) -> None:
        policy = setup.student_policy(run, now.student, engine, now.step, started.policy_hash)
        refresh.refresh(run, now.student, policy, vocabulary, prompts, teacher, index, started.reason)
        run.log_totals("train")

    evaluate = heldout_divergences(run, vocabulary) if run.config.eval.eval_every else None
    with leaks.old_objects_kept(run.world.device):
        schedule.fit(run, training, refresh_now, evaluate)
    with run.clock.phase("report"):
        step = _export_chosen(run, student, training.step)
    run.log_totals("train")
    return step


def _export_chosen(run: Run, student: Student, newest: int) -> int:
    """Export the student that `export_checkpoint` names; return its step. `newest`: that of its weights."""
    kept = None
    if run.config.train.export_checkpoint == "best":
        kept = checkpoint.load_best(run.folder / "checkpoints", student.trainable)
        if kept is None:
            raise UserError(
                f"export_checkpoint: best, but the run in {run.folder} reached step {newest} with"
                " eval_every 0, so no held-out KL was measured; raise max_steps, or set export_checkpoint:"
                " last."
            )
        run.metrics.say(
            f"exporting the student of step {kept.step}, reverse KL {kept.reverse_kl:.4f} on held-out text"
        )
    step = newest if kept is None else kept.step
    _export(run, student, step)
    return step


def _export(run: Run, student: Student, step: int) -> None:
    """Export the student of `step` with a model card, unless the run has already done so (collective)."""
    run.world.barrier()
    if not run.world.is_main:
        return
    folder, hashed = run.folder / "student", policy_hash(student)
    now = {"step": step, "policy_hash": hashed}
    last: dict[str, Any] = next(
        (r for r in reversed(metrics.read(run.metrics.path)) if r["kind"] == "export"), {}
    )
    if not (now.items() <= last.items() and (folder / "README.md").exists()):
        students.export(student, folder, {"README.md": card_of(run, step, hashed)})
        run.metrics.log("export", **now)


def card_of(run: Run, step: int, policy_hash: str) -> str:
    """README.md of the exported student, from the run's records."""
    return card.model_card(metrics.read(run.metrics.path), run.config, card.Weights(step, policy_hash))


def update_card(run: Run) -> None:
    """Write the exported student's README.md again, with what has been measured since."""
    exported = [record for record in metrics.read(run.metrics.path) if record["kind"] == "export"]
    if exported and (run.folder / "student").is_dir():
        text = card_of(run, exported[-1]["step"], exported[-1]["policy_hash"])
        replace_text(run.folder / "student" / "README.md", text)


def _await_cache(run: Run) -> None:
    """Wait until the follower has created the cache (collective)."""

    def tell() -> None:
        if run.world.is_main:
            run.metrics.keep_config()  # the follower reads it
        run.metrics.say(
            f"waiting for {run.config.cache_root}, which `dualkl rollout --follow {run.folder}` begins"
        )

    with run.clock.phase("wait"):
        wait_for(lambda: run.world.gather(cache.exists(run.config.cache_root))[0] or None, on_wait=tell)


def heldout_divergences(run: Run, vocabulary: Vocabulary) -> steps.Evaluate:
    """A function that evaluates the student on held-out teacher text, which is generated now if missing."""
    evaluation = measure.open_evaluation(run, vocabulary)
    if not run.config.eval.eval_teacher_text:
        measure.measure_teacher(evaluation)
    if not cache.exists(evaluation.teacher_text):
        raise UserError(
            "eval_every needs teacher text on held-out prompts, and there is none: give eval_teacher_text,"
            " or a teacher_model that fits whole on the device."
        )
    return lambda training: measure.without_rows(measure.on_teacher_text(evaluation, training.student))


if __name__ == "__main__":
    command(main)
