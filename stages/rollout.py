"""Stage one: the student writes rollouts, the teacher scores them, shards are committed.

    python -m stages.rollout --config pipeline.yaml            (torchrun / accelerate launch for several processes)

Run it again after anything went wrong: only the missing units are made. With checkpoints in the run's folder it writes the
refresh that is due at the newest one.

    python -m stages.rollout --follow runs/demo                (beside a training with refresh_mode external)

takes the run's configuration and keeps writing rollouts from the newest student that the training has published, until the
run is finished; flags change keys for this command, e.g. its device.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository's root is importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import sys

import cache
from stages.loops import follow, refresh, schedule, setup
from stages.models.teacher import TeacherLoader
from stages.runtime.errors import UserError, command
from stages.runtime.run import Run, open_run


def main() -> None:
    arguments = sys.argv[1:]
    if "--follow" in arguments:
        _follow(arguments)
        return
    run = open_run(__doc__ or "")
    vocabulary = setup.shared_vocabulary(run.config)
    prompts = refresh.prompts_of(run, vocabulary)
    student, position = setup.current_student(run, vocabulary)
    due = 0 if position.step == 0 else position.newest + 1
    if due and not schedule.due(run.config, position):
        run.metrics.say(f"nothing is due at step {position.step}: go on with stages.train, which refreshes on its own")
        return
    with TeacherLoader(run.config, run.world) as teacher:
        num_units = refresh.write_rollouts(
            run, student, vocabulary, prompts, refresh_index=due, step=position.step, teacher=teacher
        )
    tell(run, num_units)


def _follow(arguments: list[str]) -> None:
    place = arguments.index("--follow")
    folder, rest = arguments[place + 1 : place + 2], arguments[:place] + arguments[place + 2 :]
    if not folder or folder[0].startswith("--"):
        raise UserError("--follow needs the folder of the run to follow, e.g. --follow runs/demo.")
    run = open_run(__doc__ or "", follow.arguments_of(folder[0], rest), only_looks=True, notes="metrics-follower.jsonl")
    follow.follow(run)


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
