"""The product's own run, both stages as `dualkl run` has them, with its weights copied at points of time.

    python -m bench.bakeoff.own_run SPEC.json

SPEC: `arguments` of the run, `every` (seconds), `folder` for what was found. Time begins before the first
rollout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.bakeoff.snapshots import Snapshots, end_with_parent
from stages.engine.opening import open_engine
from stages.loops import preflight, refresh, setup
from stages.models.teacher import TeacherLoader
from stages.runtime.run import open_run
from stages.train import train


def main() -> None:
    end_with_parent()
    spec = json.loads(Path(sys.argv[1]).read_text())
    run = open_run("", spec["arguments"])
    snapshots = Snapshots(spec["every"], run.config.run.device)
    run.claim()
    work = preflight.Work(generates=True, scores=True, trains=True, evaluates=False)
    ready = preflight.check_early(run, work)
    student = setup.initial_student(run, ready.vocabulary)
    engine = open_engine(student.model)
    steps: list[dict[str, Any]] = []

    def look(record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            steps.append(record)
            is_last = record["step"] == run.config.train.max_steps
            snapshots.look(record["step"], is_last, tokens=sum(step["tokens"] for step in steps))

    before = dict(run.clock.totals(run.world))
    snapshots.begin(student.trainable)
    policy = setup.student_policy(run, student, engine, 0)
    with TeacherLoader(run.config, run.world, run.metrics.say_once) as teacher:
        refresh.write_rollouts(run, policy, ready.vocabulary, ready.prompts, refresh_index=0, teacher=teacher)
    run.metrics.listeners.append(look)
    train(run, student, ready.vocabulary, ready.prompts)
    after = run.clock.totals(run.world)
    phases = {name: seconds - before[name] for name, seconds in after.items()}
    tokens = sum(step["tokens"] for step in steps)
    snapshots.save(Path(spec["folder"]), phases=phases, trained_tokens=tokens, rows_per_step=_rows(run))


def _rows(run: Any) -> int:
    return int(run.config.train.batch_size)


if __name__ == "__main__":
    main()
