"""Stage one: the student writes rollouts, the teacher scores them, shards are committed.

    python -m stages.rollout --config pipeline.yaml            (torchrun / accelerate launch for several processes)

Run it again after anything went wrong: only the missing units are made. With checkpoints in the run's folder it writes the
refresh that is due at the newest one.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository's root is importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import cache
from stages.loops import refresh, setup
from stages.loops.fit import due_refresh
from stages.models.teacher import TeacherLoader
from stages.runtime.errors import command
from stages.runtime.run import Run, open_run


def main() -> None:
    run = open_run(__doc__ or "")
    vocabulary = setup.shared_vocabulary(run.config)
    prompts = refresh.prompts_of(run, vocabulary)
    student, position = setup.current_student(run, vocabulary)
    due = due_refresh(run.config, position.step)
    if position.step > 0 and due == position.refresh_index:
        run.metrics.say(f"nothing is due at step {position.step}: go on with stages.train, which refreshes on its own")
        return
    with TeacherLoader(run.config, run.world) as teacher:
        num_units = refresh.write_rollouts(
            run, student, vocabulary, prompts, refresh_index=due, step=position.step, teacher=teacher
        )
    tell(run, num_units)


def tell(run: Run, num_units: int) -> None:
    """What the cache holds now, and what to do with it."""
    run.log_totals("rollout")
    if run.world.is_main:
        summary = cache.open(run.config.cache_root).summary()
        run.metrics.say(
            f"{num_units} units written; {run.config.cache_root} holds {summary['rows']} rollouts,"
            f" {summary['scored_tokens']} scored tokens, {summary['bytes_per_token']:.1f} bytes a token\n"
            f"look:  python -m cache show {run.config.cache_root} --index 0\n"
            "next:  python -m stages.train with the same configuration"
        )


if __name__ == "__main__":
    command(main)
