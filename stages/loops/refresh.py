"""Stage one as functions: write the rollouts of a refresh, score existing ones, or both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import cache
from stages.data.prompts import Prompt, Split, training_prompts
from stages.loops import setup
from stages.loops.collect import Unit, collect, missing_units, plan, write_rounds
from stages.loops.elsewhere import Inbox
from stages.loops.leaks import memory_after_refresh
from stages.loops.probe import check_generator
from stages.loops.scoring import Scoring, teacher_head
from stages.loops.setup import Vocabulary
from stages.models.offload import Offloader
from stages.models.policy import Policy
from stages.models.student import Student
from stages.models.teacher import Teacher, TeacherLoader
from stages.runtime import cuts
from stages.runtime.config import Config, SignalSection
from stages.runtime.errors import UserError
from stages.runtime.run import Run
from stages.runtime.split import pool_size, rollouts_of, steps_of

TOLERATED_IDLE = 0.2  # share of the processes' time


def write_rollouts(
    run: Run,
    policy: Policy,
    vocabulary: Vocabulary,
    prompts: list[Prompt],
    *,
    refresh_index: int,
    teacher: TeacherLoader | None,
) -> int:
    """Write the missing units of refresh `refresh_index`; return their number (collective).

    Without a teacher they go unscored to `unscored_root`, except those that the run's cache has scored.
    """
    config = run.config
    units = planned_units(run, policy, prompts, refresh_index)
    if teacher is not None:
        refuse_role(config)
        return write_scored(
            run, units, policy, vocabulary, teacher.get, config.cache_root, config.teacher_signal
        )
    scored = set(cache.open(config.cache_root).row_ids) if cache.exists(config.cache_root) else set()
    with _writer(config, vocabulary, config.unscored_root, None) as writer:
        return collect(run, units, policy, None, writer, config.teacher_signal, elsewhere=scored)


def write_scored(
    run: Run,
    units: list[Unit],
    policy: Policy,
    vocabulary: Vocabulary,
    get_teacher: Callable[[], Teacher],
    root: str,
    signal: SignalSection,
) -> int:
    """Write the units missing from the cache at `root`, scored; return their number (collective)."""

    def load() -> Teacher:
        with run.clock.phase("load"):
            offloader = Offloader(run, policy.model, policy.engine)
            loaded = offloader.to_teacher(get_teacher)
            offloader.to_student()
            return loaded

    head = teacher_head(load().head, vocabulary.size) if signal.signal == "hidden" else None
    with _writer(run.config, vocabulary, root, signal, head) as writer:
        is_complete = not missing_units(units, writer.committed_ids)
        if not run.world.gather(is_complete)[0]:  # loading is collective: rank 0 decides
            load()
        return collect(run, units, policy, get_teacher, writer, signal)


def score_rollouts(run: Run, vocabulary: Vocabulary, *, refresh_index: int, teacher: TeacherLoader) -> int:
    """Score units from refresh `refresh_index` on as they appear; return their number (collective)."""
    config, signal = run.config, run.config.teacher_signal
    inbox = Inbox(run, vocabulary, refresh_index)
    num_left = run.world.gather(inbox.look().num_unscored if run.world.is_main else 0)[0]
    if not num_left:
        return 0
    with run.clock.phase("load"):
        loaded = teacher.get()
    head = teacher_head(loaded.head, vocabulary.size) if signal.signal == "hidden" else None
    scoring = Scoring(signal, vocabulary.size, vocabulary.tokenizer.pad_token_id)
    with _writer(config, vocabulary, config.cache_root, signal, head) as writer:
        return write_rounds(run, writer, inbox.rounds, num_left, scoring, lambda: loaded)


def refuse_role(config: Config) -> None:
    """Raise UserError if a command that must both generate and score has the role of only one."""
    if config.rollout.role != "both":
        raise UserError(
            f"role {config.rollout.role} is for `dualkl rollout` without --follow: training, the pipeline and"
            " a follower both generate and score at each refresh. Use role both there, or refresh_mode off"
            " to train on what is there."
        )


def planned_units(run: Run, policy: Policy, prompts: list[Prompt], refresh_index: int) -> list[Unit]:
    """The plan of a refresh. Reports settings that leave processes idle."""
    config, size = run.config, run.world.size
    places = rollouts_of(config, refresh_index)
    units = plan(
        prompts,
        seed=config.run.seed,
        run_id=run.run_id,
        policy_hash=policy.policy_hash,
        refresh_index=refresh_index,
        first_rollout=places.start,
        num_rollouts=len(places),
        group_size=config.rollout.group_size,
        rollouts_per_unit=config.rollout.rollouts_per_unit,
    )
    asked, steps = config.refresh.rollouts_per_refresh, steps_of(config, refresh_index)
    if pool_size(config, refresh_index) < asked:
        run.metrics.say_once(
            f"rollouts_per_refresh {asked} is lowered to {len(places)}: at most {steps} steps of batch_size"
            f" {config.train.batch_size} read them before the next refresh or the end"
        )
    num_rounds = -(-len(units) // size)
    idle = 1 - len(units) / (num_rounds * size)
    if idle > TOLERATED_IDLE:
        even = -(-len(places) // (num_rounds * size))
        run.metrics.say_once(
            f"{len(units)} unit{'s' * (len(units) != 1)} over {size} processes leave {idle:.0%} of them"
            f" idle; rollouts_per_unit {even} would not"
        )
    return units


def _writer(
    config: Config,
    vocabulary: Vocabulary,
    root: str,
    signal: SignalSection | None,
    head: cache.TeacherHead | None = None,
) -> cache.Writer:
    """A writer for rows scored with `signal`, or unscored ones. `head`: the teacher's, for signal hidden."""
    if signal is None:
        fingerprint = setup.unscored_fingerprint(config, vocabulary)
    else:
        fingerprint = setup.fingerprint(config, vocabulary, signal)
    return cache.Writer(root, fingerprint, tokenizer_json=vocabulary.tokenizer_json, head=head)


def prompts_of(run: Run, vocabulary: Vocabulary, split: Split | None = None) -> list[Prompt]:
    found = training_prompts(run.config, vocabulary.tokenizer, split)
    run.metrics.say(found.summary)
    return found.prompts


def refresh(
    run: Run,
    student: Student,
    policy: Policy,
    vocabulary: Vocabulary,
    prompts: list[Prompt],
    teacher: TeacherLoader,
    refresh_index: int,
    reason: str,
) -> None:
    """Refresh between two optimizer steps: write new rows, free the teacher's memory, check the generator."""
    with teacher.used():
        num_units = write_rollouts(
            run, policy, vocabulary, prompts, refresh_index=refresh_index, teacher=teacher
        )
    probe = check_generator(run, student, policy.engine, refresh_index)
    run.metrics.log(
        "refresh",
        step=policy.step,
        refresh_index=refresh_index,
        units=num_units,
        policy_hash=policy.policy_hash,
        reason=reason,
        cut_share=cut_share(run, refresh_index),
        **memory_after_refresh(run, [*teacher.waiting(), *run.saver.tensors()]),
        **probe,
    )


def cut_share(run: Run, refresh_index: int) -> float | None:
    """Share of a refresh's committed rows cut off at max_new_tokens; None without rows."""
    reasons: Counter[str] = Counter()
    for record in cache.open(run.config.cache_root).commit_records():
        if all(
            run_id == run.run_id and refresh == refresh_index for run_id, _, _, refresh in record.policies
        ):
            reasons.update(record.statistics["finish_reasons"])
    return cuts.cut_share(reasons)
