"""Stage one: the student writes rollouts, the teacher scores them, shards are committed.

    python -m stages.rollout --config pipeline.yaml            (torchrun / accelerate launch for several processes)
    python -m stages.rollout --config pipeline.yaml --role generate      only that, for the processes of --role score
    python -m stages.rollout --config pipeline.yaml --role score         on other GPUs or nodes, at the same time or later

Run it again after anything went wrong: only the missing units are made. With checkpoints in the run's folder it writes the
refresh that is due at the newest one.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository's root is importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import cache
from stages.loops import progress, refresh, roles, setup
from stages.loops.fit import due_refresh
from stages.models.teacher import TeacherLoader
from stages.runtime.errors import command
from stages.runtime.run import Run, open_run


def main() -> None:
    run = open_run(__doc__ or "")
    vocabulary = setup.shared_vocabulary(run.config)
    role = run.config.rollout.role
    position = setup.newest_position(run)
    due = due_refresh(run.config, position.step)
    if position.step > 0 and due == position.refresh_index:
        run.metrics.say(f"nothing is due at step {position.step}: go on with stages.train, which refreshes on its own")
        return
    with TeacherLoader(run.config, run.world) as teacher:
        if role == "score":
            num_units = roles.score_rollouts(run, vocabulary, refresh_index=due, teacher=teacher)
        else:
            prompts = refresh.prompts_of(run, vocabulary)
            student, _ = setup.current_student(run, vocabulary)
            if role == "generate":
                num_units = roles.generate_rollouts(
                    run, student, vocabulary, prompts, refresh_index=due, step=position.step
                )
            else:
                num_units = refresh.write_rollouts(
                    run, student, vocabulary, prompts, refresh_index=due, step=position.step, teacher=teacher
                )
    tell(run, num_units)


def tell(run: Run, num_units: int) -> None:
    """How it went, what the cache holds now, and what to do with it."""
    run.log_totals("rollout")
    if not run.world.is_main:
        return
    generates_only = run.config.rollout.role == "generate"
    root = run.config.unscored_root if generates_only else run.config.cache_root
    summary = cache.open(root).summary()
    how = progress.last_line(run)
    run.metrics.say(
        (f"{how}\n" if how else "")
        + f"{num_units} units written; {root} holds {summary['rows']} rollouts, {summary['scored_tokens']}"
        f" {'tokens' if generates_only else 'scored tokens'}, {summary['bytes_per_token']:.1f} bytes a token\n"
        f"look:  python -m cache show {root} --index 0\n"
        + (
            f"next:  python -m stages.rollout --role score with the same configuration; then {root} may be deleted"
            if generates_only
            else "next:  python -m stages.train with the same configuration"
        )
    )


if __name__ == "__main__":
    command(main)
