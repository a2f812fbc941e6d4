"""Stage two: trains the student from the shards with the gated KL, and refreshes them on schedule.

    python -m stages.train --config pipeline.yaml              (torchrun / accelerate launch for several processes)

Goes on from the newest checkpoint of the run. The teacher is loaded for refreshes only: with refresh_mode off never, and
with refresh_mode external by `python -m stages.rollout --follow RUN_FOLDER` elsewhere.
"""

from __future__ import annotations

if not __package__:  # run as a file: the repository's root is importable, not stages/
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import time

import cache
from stages.data.prompts import Prompt
from stages.loops import fit, measure, refresh, schedule, setup, versions
from stages.loops.setup import Vocabulary
from stages.models import student as students
from stages.models.student import Student
from stages.runtime import checkpoint
from stages.runtime.config import Config
from stages.runtime.errors import UserError, command
from stages.runtime.run import Run, open_run
from stages.runtime.split import rows_per_micro_step


def main() -> None:
    run = open_run(__doc__ or "")
    if run.config.refresh.refresh_mode == "external":
        _await_cache(run)
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
    check_caches(run.config)
    inline = run.config.refreshes and run.config.refresh.refresh_mode == "inline"
    if inline:  # better now than at the first refresh
        refresh.refuse_role(run.config)
        wanted = setup.fingerprint(run.config, vocabulary, run.config.teacher_signal)
        cache.open(run.config.cache_root).fingerprint.compare(wanted, run.config.cache_root)
    training = fit.prepare(run, student)
    if prompts is None:
        prompts = refresh.prompts_of(run, vocabulary) if inline else []
    external = run.config.refresh.refresh_mode == "external"  # its follower compares what generates with what trains
    if not external and checkpoint.latest(run.folder / "checkpoints") is None:
        refresh.check_generator(run, student, 0)

    def refresh_now(now: fit.Training, index: int, reason: str) -> None:
        refresh.refresh(run, now.student, vocabulary, prompts, index, now.step, reason)
        run.log_totals("train")

    evaluate = heldout_divergences(run, vocabulary) if run.config.eval.eval_every else None
    schedule.fit(run, training, refresh_now, evaluate)
    if run.config.train.export_checkpoint == "best":
        kept = checkpoint.load_best(run.folder / "checkpoints", student.trainable)
        if kept is None:
            raise UserError(
                f"export_checkpoint: best, but the run in {run.folder} reached step {training.step} with eval_every 0, so no"
                " held-out KL was measured; raise max_steps, or set export_checkpoint: last."
            )
        run.metrics.say(f"exporting the student of step {kept.step}, reverse KL {kept.reverse_kl:.4f} on held-out text")
    if run.world.is_main:
        students.export(student, run.folder / "student")
    run.world.barrier()
    run.log_totals("train")
    run.metrics.say(f"trained to step {training.step}; the student is in {run.folder / 'student'}")


def _await_cache(run: Run) -> None:
    """Until the follower has begun the cache (collective)."""
    told = False
    while not run.world.gather(cache.exists(run.config.cache_root))[0]:
        if not told:
            run.metrics.say(
                f"waiting for {run.config.cache_root}, which `python -m stages.rollout --follow {run.folder}` begins"
            )
        told = True
        time.sleep(versions.POLL_SECONDS)


def check_caches(config: Config) -> None:
    """Refuses caches that are not there, or that cannot be trained on together or with this loss."""
    own = cache.open(config.cache_root).fingerprint
    check_loss(config, config.cache_root, own)
    for root in config.run.extra_caches:
        if not cache.exists(root):
            raise UserError(f"extra_caches: there is no teacher cache at {root}.")
        other = cache.open(root).fingerprint
        for name in ("tokenizer", "vocab_size"):
            if other.must_match[name] != own.must_match[name]:
                raise UserError(
                    f"extra_caches: the {name} of {root} is {other.must_match[name]}, that of {config.cache_root} is"
                    f" {own.must_match[name]}; only caches of one tokenizer and vocabulary cut can be mixed."
                )
        check_loss(config, root, other)


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


def check_loss(config: Config, root: str, stored: cache.Fingerprint) -> None:
    """Refuses a loss that the rows of the cache at `root`, whoever wrote them, cannot support."""
    signal, recorded = stored.must_match["signal"], stored.recorded
    if signal["kind"] in ("topk", "nucleus") and config.loss.temperature != signal["temperature"]:
        raise UserError(
            f"{root} holds {signal['kind']} rows at temperature {signal['temperature']}, the loss is at"
            f" {config.loss.temperature}; only hidden and full rows serve other temperatures."
        )
    if config.loss.rkl == "mc" and (recorded.get("sample_top_p", 1) < 1 or recorded.get("sample_top_k", 0) > 0):
        raise UserError(
            f"{root} was sampled with top_p {recorded.get('sample_top_p')} and top_k"
            f" {recorded.get('sample_top_k')}: rkl: mc would be biased on these rows; use rkl: exact."
        )
    names = "sample_temperature", "sample_top_p", "sample_top_k"
    sampled = tuple(recorded.get(name, whole) for name, whole in zip(names, (1, 1, 0), strict=True))
    if config.refresh.drift_to_forward and sampled != (config.loss.temperature, 1, 0):
        raise UserError(
            f"{root} was sampled with temperature {sampled[0]}, top_p {sampled[1]} and top_k {sampled[2]}: drift_to_forward"
            f" would take that for drift; use rows drawn at the loss's temperature ({config.loss.temperature}) from the whole"
            " distribution, or drift_to_forward 0."
        )


if __name__ == "__main__":
    command(main)
