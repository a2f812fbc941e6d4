"""Run the whole pipeline: both stages, refreshes, evaluation, report.

    dualkl run FILE            FILE: a configuration, or demo
    torchrun --nproc_per_node N -m stages.pipeline FILE     on N GPUs

Evaluates before and after training. Each part is skipped if its output files
exist, so the same command resumes after a crash.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "run")

from stages.engine.opening import open_engine
from stages.engine.protocol import Engine
from stages.loops import leaks, measure, preflight, refresh, setup
from stages.models.student import Student
from stages.models.teacher import TeacherLoader
from stages.report import own_config, summary, write_report
from stages.runtime.errors import command
from stages.runtime.run import Run, open_run
from stages.train import train, update_card


def main() -> None:
    pipeline(open_run(__doc__ or ""))


def pipeline(run: Run) -> None:
    """All parts of the run, as far as they are missing (collective)."""
    with run.clock.phase("prepare"):
        ready = _prepare(run)
    vocabulary = ready.vocabulary
    evaluation = measure.open_evaluation(run, vocabulary, ready.heldout) if ready.heldout else None
    student = setup.initial_student(run, vocabulary)
    engine = open_engine(student.model)
    if evaluation is not None:
        measure.measure_teacher(evaluation)
    with TeacherLoader(run.config, run.world, run.metrics.say_once) as teacher:
        _both_stages(run, ready, student, engine, evaluation, teacher)
    run.log_totals("pipeline")
    with run.clock.phase("report"):
        if run.world.is_main:
            _conclude(run)
        run.metrics.close()


def _both_stages(
    run: Run,
    ready: preflight.Ready,
    student: Student,
    engine: Engine,
    evaluation: measure.Evaluation | None,
    teacher: TeacherLoader,
) -> None:
    """All that needs the teacher: evaluate, both stages, evaluate, as far as they are missing (collective)."""
    vocabulary, prompts = ready.vocabulary, ready.prompts
    is_begun = setup.newest_position(run).step > 0
    is_measured = evaluation is None or measure.is_kept(evaluation, "before", with_teacher=True)
    if not (is_begun and is_measured):
        with run.clock.phase("refresh"), leaks.old_objects_kept(run.world.device), teacher.used():
            policy = setup.student_policy(run, student, engine, 0)
            if evaluation is not None:
                measure.measure(evaluation, student, policy, "before", teacher)
            if not is_begun:
                refresh.write_rollouts(run, policy, vocabulary, prompts, refresh_index=0, teacher=teacher)
    setup.take_up_weights(run, student)
    train(run, student, vocabulary, prompts, teacher)
    if evaluation is not None:
        with run.clock.phase("evaluate"):
            policy = setup.student_policy(run, student, engine, run.config.train.max_steps)
            measure.measure(evaluation, student, policy, "after", teacher)
    with run.clock.phase("load"):
        teacher.close()


def _prepare(run: Run) -> preflight.Ready:
    """All checks that need no weights, and the prompts."""
    run.claim()
    setup.check_history(run)
    refresh.refuse_role(run.config)
    everything = preflight.Work(
        generates=True, scores=True, trains=True, evaluates=bool(run.config.eval.eval_prompts)
    )
    return preflight.check_early(run, everything)


def _conclude(run: Run) -> None:
    """Write the model card and the report, and print what came of the run (main process)."""
    update_card(run)
    config = own_config(run.folder, run.config)
    report = write_report(run.folder, config, run.metrics.say)
    facts = report | {"student": str(run.folder / "student")}
    run.metrics.conclude(summary(report, run.folder, config), facts)


if __name__ == "__main__":
    command(main)
