"""Measure the run's current student: KLs on teacher text and on its own fresh text, and answers solved.

    python -m stages.evaluate --config pipeline.yaml

Writes eval/before.json before training, eval/after.json after it. The teacher is needed for its text and for
on_student; with `--teacher_model ""` those are null unless an earlier evaluation measured them.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signal handling first: the imports below take seconds
    from stages.runtime import ending

    ending.install()

import json

from stages.engine.opening import open_engine
from stages.loops import measure, preflight, setup
from stages.models.teacher import TeacherLoader
from stages.runtime import checkpoint
from stages.runtime.errors import command
from stages.runtime.run import open_run


def main() -> None:
    run = open_run(__doc__ or "")
    run.claim()
    has_teacher = bool(run.config.models.teacher_model)
    read = setup.shared_vocabulary if has_teacher else setup.cached_vocabulary
    ready = preflight.check_early(run, preflight.Work(scores=has_teacher, evaluates=True), read)
    evaluation = measure.open_evaluation(run, ready.vocabulary, ready.heldout)
    student, position = setup.current_student(run, ready.vocabulary)
    if run.config.train.export_checkpoint == "best":  # measure the exported weights
        checkpoint.load_best(run.folder / "checkpoints", student.trainable)
    label = "after" if position.step else "before"
    policy = setup.student_policy(run, student, open_engine(student.model), position.step)
    with TeacherLoader(run.config, run.world) as teacher:
        found = {
            "teacher": measure.measure_teacher(evaluation),
            label: measure.measure(evaluation, student, policy, label, teacher if has_teacher else None),
        }
    run.log_totals("evaluate")
    run.metrics.say(
        json.dumps({k: {n: v for n, v in r.items() if n != "samples"} for k, r in found.items()}, indent=1)
    )


if __name__ == "__main__":
    command(main)
