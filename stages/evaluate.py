"""Measure the run's student: KLs, and held-out answers solved.

    dualkl evaluate FILE

KLs are measured on teacher text and on fresh text of the student. Writes
eval/before.json before training, eval/after.json after it. The teacher is
needed for its text and for on_student; with --teacher_model "" those are null
unless an earlier evaluation measured them.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "evaluate")

from typing import Any

from stages.engine.opening import open_engine
from stages.loops import measure, preflight, setup
from stages.models.student import Student
from stages.models.teacher import TeacherLoader
from stages.report import collect, table
from stages.runtime import checkpoint
from stages.runtime.errors import UserError, command
from stages.runtime.run import open_run


def main() -> None:
    run = open_run(__doc__ or "")
    run.claim()
    if not run.config.eval.eval_prompts:
        raise UserError("eval_prompts is 0, which turns evaluation off; give the number of held-out prompts.")
    setup.check_weights_kept(run)
    has_teacher = bool(run.config.models.teacher_model)
    read = setup.shared_vocabulary if has_teacher else setup.cached_vocabulary
    ready = preflight.check_early(run, preflight.Work(scores=has_teacher, evaluates=True), read)
    evaluation = measure.open_evaluation(run, ready.vocabulary, ready.heldout)
    student, position = setup.initial_student(run, ready.vocabulary), setup.newest_position(run)
    found = {"teacher": measure.measure_teacher(evaluation)}
    is_compared = position.step > 0 and (evaluation.folder / "before.json").exists()
    if is_compared and not measure.is_kept(evaluation, "before", with_teacher=has_teacher):
        found["before"] = _measured(evaluation, student, "before", 0)
    setup.take_up_weights(run, student)
    if run.config.train.export_checkpoint == "best":  # measure the exported weights
        checkpoint.load_best(run.folder / "checkpoints", student.trainable)
    label = "after" if position.step else "before"
    found[label] = _measured(evaluation, student, label, position.step)
    run.log_totals("evaluate")
    figures = {label: measure.without_rows(result) for label, result in found.items()}
    facts = {k: {n: v for n, v in result.items() if n != "samples"} for k, result in figures.items()}
    measured = collect(run.folder, run.config)
    then = (
        "dualkl rollout with the same configuration" if label == "before" else f"dualkl report {run.folder}"
    )
    run.metrics.conclude(
        "\n".join(
            [
                f"measured the student of step {position.step} on {len(evaluation.prompts)} held-out prompts",
                "",
                *table(measured),
                "",
                f"look:  {evaluation.folder / label}.json",
                f"next:  {then}",
            ]
        ),
        facts,
    )


def _measured(evaluation: measure.Evaluation, student: Student, label: str, step: int) -> dict[str, Any]:
    run = evaluation.run
    policy = setup.student_policy(run, student, open_engine(student.model), step)
    with TeacherLoader(run.config, run.world, run.metrics.say_once) as teacher:
        loader = teacher if run.config.models.teacher_model else None
        return measure.measure(evaluation, student, policy, label, loader)


if __name__ == "__main__":
    command(main)
