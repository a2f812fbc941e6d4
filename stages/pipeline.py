"""The whole of it: evaluate, both stages with refreshes, evaluate, report.

    python -m stages.pipeline --config pipeline.yaml           (torchrun / accelerate launch for several processes)

Each part leaves files behind and is skipped where they exist, so that the same command goes on after a crash.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository's root is importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from stages.loops import measure, refresh, setup
from stages.models.teacher import TeacherLoader
from stages.report import summary, write_report
from stages.runtime.errors import command
from stages.runtime.run import open_run
from stages.runtime.split import rows_per_micro_step
from stages.train import train


def main() -> None:
    run = open_run(__doc__ or "")
    refresh.refuse_role(run.config)
    rows_per_micro_step(run.config, run.world.size)
    vocabulary = setup.shared_vocabulary(run.config)
    evaluation = measure.open_evaluation(run, vocabulary)
    student, position = setup.current_student(run, vocabulary)
    measure.measure_teacher(evaluation)
    prompts = refresh.prompts_of(run, vocabulary)
    if position.step == 0:
        with TeacherLoader(run.config, run.world) as teacher:
            measure.measure(evaluation, student, 0, "before", teacher)
            refresh.write_rollouts(run, student, vocabulary, prompts, refresh_index=0, step=0, teacher=teacher)
    train(run, student, vocabulary, prompts)
    with TeacherLoader(run.config, run.world) as teacher:
        measure.measure(evaluation, student, run.config.train.max_steps, "after", teacher)
    run.log_totals("pipeline")
    if run.world.is_main:
        run.metrics.say(summary(write_report(run.folder, run.config), run.folder, run.config))
    run.metrics.close()


if __name__ == "__main__":
    command(main)
