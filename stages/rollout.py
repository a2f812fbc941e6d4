"""Stage one: the student generates rollouts, the teacher scores them.

    dualkl rollout FILE                    both, into the run's cache
    dualkl rollout FILE --role generate    only generate, for --role score
    dualkl rollout FILE --role score       on other GPUs or nodes, then or later
    dualkl rollout --follow RUN            rollouts of each new student, next to
                                           dualkl train --refresh_mode external

Rerun it after any failure: only missing rows are generated. With checkpoints in
the run's folder it writes the refresh that is due at the newest one. --follow
takes the run's configuration; flags override keys for this command.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository root must be importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":  # signals and --help first: the imports below take seconds
    from stages.cli import begin

    begin(__doc__, "rollout")

import sys
from pathlib import Path

import cache
from stages.engine.opening import open_engine
from stages.loops import follow, preflight, progress, refresh, schedule, setup
from stages.models.teacher import TeacherLoader
from stages.runtime.cuts import cut_sentence, cut_share
from stages.runtime.errors import command
from stages.runtime.options import split_follow
from stages.runtime.run import Run, open_run


def main() -> None:
    arguments = sys.argv[1:]
    if "--follow" in arguments:
        _follow(arguments)
        return
    run = open_run(__doc__ or "")
    role = run.config.rollout.role
    if role == "generate" and "://" not in run.config.unscored_root:
        run.claim(Path(run.config.unscored_root))
    elif role != "score":  # several scorers may run next to their generator
        run.claim()
    setup.check_history(run)
    position = setup.newest_position(run)
    due = 0 if position.step == 0 else position.newest + 1
    ready = preflight.check_early(run, preflight.Work(generates=role != "score", scores=role != "generate"))
    if due and not schedule.due(run.config, position) and not schedule.lost(run, position):
        text = f"nothing is due at step {position.step}: go on with training, which refreshes on its own"
        run.metrics.conclude(text, {"units": 0, "cache": run.config.cache_root})
        return
    vocabulary, prompts = ready.vocabulary, ready.prompts
    with TeacherLoader(run.config, run.world, run.metrics.say_once) as teacher:
        if role == "score":
            num_units = refresh.score_rollouts(run, vocabulary, refresh_index=due, teacher=teacher)
        else:
            student, _ = setup.current_student(run, vocabulary)
            policy = setup.student_policy(run, student, open_engine(student.model), position.step)
            num_units = refresh.write_rollouts(
                run,
                policy,
                vocabulary,
                prompts,
                refresh_index=due,
                teacher=None if role == "generate" else teacher,
            )
    tell(run, num_units)


def _follow(arguments: list[str]) -> None:
    folder, rest = split_follow(arguments)
    run = open_run(
        __doc__ or "", follow.arguments_of(folder, rest), read_only=True, notes="metrics-follower.jsonl"
    )
    follow.follow(run)


def tell(run: Run, num_units: int) -> None:
    """Report the result, the content of the cache, and the next command."""
    run.log_totals("rollout")
    if not run.world.is_main:
        return
    generates_only = run.config.rollout.role == "generate"
    root = run.config.unscored_root if generates_only else run.config.cache_root
    summary = cache.open(root).summary()
    how, cut = progress.last_line(run), cut_share(summary["finish_reasons"])
    kept = ("rows", "scored_tokens", "bytes_per_token")
    facts = {"units": num_units, "cache": root, **{key: summary[key] for key in kept}, "cut_share": cut}
    run.metrics.conclude(
        (f"{how}\n" if how else "") + f"{num_units} units written; {root} holds {summary['rows']:,} rollouts,"
        f" {summary['scored_tokens']:,} {'tokens' if generates_only else 'scored tokens'},"
        f" {summary['bytes_per_token']:.1f} bytes a token"
        + (f"; {cut_sentence(cut)}" if cut is not None else "")
        + "\n"
        + f"look:  dualkl cache show {root} --index 0\n"
        + (
            f"next:  dualkl rollout --role score with the same configuration; then {root} may be deleted"
            if generates_only
            else "next:  dualkl train with the same configuration"
        ),
        facts,
    )


if __name__ == "__main__":
    command(main)
