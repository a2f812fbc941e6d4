"""Stage two: trains the student from the shards with the gated KL, and refreshes them on schedule.

    python -m stages.train --config pipeline.yaml              (torchrun / accelerate launch for several processes)

Goes on from the newest checkpoint of the run. The teacher is loaded for refreshes only; with refresh_every 0 never.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository's root is importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import cache
from stages.data.prompts import Prompt
from stages.loops import fit, measure, refresh, setup
from stages.loops.setup import Vocabulary
from stages.models import student as students
from stages.models.student import Student
from stages.runtime import checkpoint
from stages.runtime.config import Config, rows_per_micro_step
from stages.runtime.errors import UserError, command
from stages.runtime.run import Run, open_run


def main() -> None:
    run = open_run(__doc__ or "")
    if not cache.exists(run.config.cache_root):
        raise UserError(
            f"there is no teacher cache at {run.config.cache_root}; run `python -m stages.rollout` with the same"
            " configuration first, or name one with --cache_dir."
        )
    vocabulary = setup.cached_vocabulary(run.config)
    student, _ = setup.current_student(run, vocabulary)
    train(run, student, vocabulary)


def train(run: Run, student: Student, vocabulary: Vocabulary, prompts: list[Prompt] | None = None) -> None:
    """Trains to max_steps and exports the student to `runs/<name>/student`; refreshes read the prompts if not given."""
    rows_per_micro_step(run.config, run.world.size)
    check_loss(run.config, cache.open(run.config.cache_root).fingerprint)
    if run.config.refresh.refresh_every:  # better now than at the first refresh
        refresh.refuse_role(run.config)
        wanted = setup.fingerprint(run.config, vocabulary, run.config.teacher_signal)
        cache.open(run.config.cache_root).fingerprint.compare(wanted, run.config.cache_root)
    training = fit.prepare(run, student)
    if prompts is None:
        prompts = refresh.prompts_of(run, vocabulary) if run.config.refresh.refresh_every else []
    if checkpoint.latest(run.folder / "checkpoints") is None:
        refresh.check_generator(run, student, 0)

    def refresh_now(now: fit.Training, index: int) -> None:
        refresh.refresh(run, now.student, vocabulary, prompts, index, now.step)
        run.log_totals("train")

    fit.fit(run, training, refresh_now, heldout_divergences(run, vocabulary) if run.config.eval.eval_every else None)
    if run.config.train.export_checkpoint == "best":
        kept = checkpoint.load_best(run.folder / "checkpoints", student.trainable)
        assert kept is not None, "the last step is always evaluated"
        run.metrics.say(f"exporting the student of step {kept.step}, reverse KL {kept.reverse_kl:.4f} on held-out text")
    if run.world.is_main:
        students.export(student, run.folder / "student")
    run.world.barrier()
    run.log_totals("train")
    run.metrics.say(f"trained to step {training.step}; the student is in {run.folder / 'student'}")


def heldout_divergences(run: Run, vocabulary: Vocabulary) -> fit.Evaluate:
    """Measures the student on the held-out teacher text, which the plain teacher writes now if it is not there."""
    evaluation = measure.open_evaluation(run, vocabulary)
    if not run.config.eval.eval_teacher_text:
        measure.measure_teacher(evaluation)
    if not cache.exists(evaluation.teacher_text):
        raise UserError(
            "eval_every needs teacher text on held-out prompts, and there is none: give eval_teacher_text, or a"
            " teacher_model that fits whole on the device."
        )
    return lambda training: measure.on_teacher_text(evaluation, training.student)


def check_loss(config: Config, stored: cache.Fingerprint) -> None:
    """Refuses a loss that the rows of this cache, whoever wrote them, cannot support."""
    signal, recorded = stored.must_match["signal"], stored.recorded
    if signal["kind"] in ("topk", "nucleus") and config.loss.temperature != signal["temperature"]:
        raise UserError(
            f"{config.cache_root} holds {signal['kind']} rows at temperature {signal['temperature']}, the loss is at"
            f" {config.loss.temperature}; only hidden and full rows serve other temperatures."
        )
    if config.loss.rkl == "mc" and (recorded.get("sample_top_p", 1) < 1 or recorded.get("sample_top_k", 0) > 0):
        raise UserError(
            f"{config.cache_root} was sampled with top_p {recorded.get('sample_top_p')} and top_k"
            f" {recorded.get('sample_top_k')}: rkl: mc would be biased on these rows; use rkl: exact."
        )


if __name__ == "__main__":
    command(main)
