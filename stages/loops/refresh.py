"""Stage one as a function: the current student writes the rollouts of a refresh, the teacher scores them."""

from __future__ import annotations

import json

import numpy as np
import torch

import cache
from dualkl.divergences import gather_logprobs
from stages.data.alignment import align, at_scored
from stages.data.prompts import Prompt, training_prompts
from stages.loops import setup
from stages.loops.collect import Author, Unit, collect, missing_units, plan
from stages.loops.scoring import teacher_head
from stages.loops.setup import Vocabulary
from stages.models.generation import Sampling, generate
from stages.models.student import Student, policy_hash
from stages.models.teacher import Teacher, TeacherLoader
from stages.models.turns import Turns
from stages.runtime.config import Config
from stages.runtime.errors import UserError
from stages.runtime.files import replace_text
from stages.runtime.run import Run
from stages.runtime.split import rollouts_of

PROBE_ROWS = 8
PROBE_TOLERANCE = 0.02  # nats, mean |generator - trainer|
TOLERATED_IDLE = 0.2  # of the processes' time


def write_rollouts(
    run: Run, student: Student, vocabulary: Vocabulary, prompts: list[Prompt], *, refresh_index: int, step: int,
    teacher: TeacherLoader,
) -> int:  # fmt: skip
    """Writes what is missing of refresh `refresh_index`; returns the number of units written (collective)."""
    config = run.config
    refuse_role(config)
    author = setup.student_author(run, student, step)
    units = planned_units(run, author, prompts, refresh_index)

    def load() -> Teacher:
        with run.clock.phase("load"):
            turns = Turns(run, student.model)
            loaded = turns.to_teacher(teacher.get)
            turns.to_student(loaded)
            return loaded

    head = teacher_head(load().head, vocabulary.size) if config.teacher_signal.signal == "hidden" else None
    with scored_writer(config, vocabulary, head) as writer:
        if run.world.gather(bool(missing_units(units, writer.committed_ids)))[0]:  # loading is collective: one answer
            load()
        return collect(run, units, author, teacher.get, writer, config.teacher_signal)


def refuse_role(config: Config) -> None:
    """UserError for a command that generates and scores, told to do one of them."""
    if config.rollout.role != "both":
        raise UserError(
            f"role {config.rollout.role} is for stages.rollout without --follow: training, the pipeline and a follower both"
            " generate and score at each refresh. Use role both there, or refresh_mode off to train on what is there."
        )


def planned_units(run: Run, author: Author, prompts: list[Prompt], refresh_index: int) -> list[Unit]:
    """The plan of a refresh; says where it keeps processes idle."""
    config, size = run.config, run.world.size
    places = rollouts_of(config, refresh_index)
    units = plan(
        prompts, seed=config.run.seed, run_id=run.run_id, policy_hash=author.policy_hash, refresh_index=refresh_index,
        first_rollout=places.start, num_rollouts=len(places), group_size=config.rollout.group_size,
        rollouts_per_unit=config.rollout.rollouts_per_unit,
    )  # fmt: skip
    num_rounds = -(-len(units) // size)
    idle = 1 - len(units) / (num_rounds * size)
    if idle > TOLERATED_IDLE:
        even = -(-len(places) // (num_rounds * size))
        run.metrics.say(
            f"{len(units)} units over {size} processes leave {idle:.0%} of them idle; rollouts_per_unit {even} would not"
        )
    return units


def scored_writer(config: Config, vocabulary: Vocabulary, head: cache.TeacherHead | None) -> cache.Writer:
    """A writer of the run's teacher cache; `head` is the teacher's, for signal hidden."""
    print_ = setup.fingerprint(config, vocabulary, config.teacher_signal)
    return cache.Writer(config.cache_root, print_, tokenizer_json=tokenizer_json(vocabulary), head=head)


def tokenizer_json(vocabulary: Vocabulary) -> str:
    return vocabulary.tokenizer.backend_tokenizer.to_str()


def prompts_of(run: Run, vocabulary: Vocabulary) -> list[Prompt]:
    found = training_prompts(run.config, vocabulary.tokenizer)
    skipped = f" ({found.num_skipped} longer than max_prompt_tokens skipped)" if found.num_skipped else ""
    run.metrics.say(f"{len(found.prompts)} prompts from {run.config.data.dataset}{skipped}")
    return found.prompts


def refresh(
    run: Run, student: Student, vocabulary: Vocabulary, prompts: list[Prompt], refresh_index: int, step: int,
    reason: str,
) -> None:  # fmt: skip
    """A refresh between two optimizer steps: new rows, the teacher's memory given back, the generator checked."""
    with TeacherLoader(run.config, run.world) as teacher:
        num_units = write_rollouts(
            run, student, vocabulary, prompts, refresh_index=refresh_index, step=step, teacher=teacher
        )
    probe = check_generator(run, student, refresh_index)
    allocated = torch.cuda.memory_allocated(run.world.device) if run.world.device.type == "cuda" else 0
    run.metrics.log(
        "refresh", step=step, refresh_index=refresh_index, units=num_units, policy_hash=policy_hash(student),
        reason=reason, memory_allocated_bytes=allocated, **probe,
    )  # fmt: skip


def check_generator(run: Run, student: Student, refresh_index: int) -> dict[str, float]:
    """Compares generator and trainer on a fixed probe batch, and both with the version of the refresh before.

    An adapter that never reaches the generator looks like staleness, with a finite loss; here it is an error.
    """
    snapshot = cache.open(run.config.cache_root)
    records = [snapshot[i] for i in range(min(PROBE_ROWS, len(snapshot)))]
    path = run.folder / "probe.json"
    if path.exists():
        wanted = json.loads(path.read_text())["row_ids"]
        records = [snapshot[snapshot.position(row_id)] for row_id in wanted]
    if not records:
        return {}
    trainer = trainer_logprobs(student, records)
    generator = generator_logprobs(run, student, records)
    gap = float(np.abs(trainer - generator).mean())
    if gap > PROBE_TOLERANCE:
        raise UserError(
            f"generator and trainer disagree by {gap:.4f} nats a token on the probe batch (at most {PROBE_TOLERANCE} is"
            f" rounding) at refresh {refresh_index}: the rollouts would not be the student's. Use dtype fp32, or report this."
        )
    moved = _moved(run, trainer, refresh_index, [record.row_id for record in records])
    return {"probe_gap": gap, "probe_moved": moved}


def _moved(run: Run, logprobs: np.ndarray, refresh_index: int, row_ids: list[str]) -> float:
    """Mean |change| of the trainer's probe logprobs since the refresh before; no change is an error."""
    path = run.folder / "probe.json"
    history = json.loads(path.read_text())["logprobs"] if path.exists() else {}
    before = history.get(str(refresh_index - 1))
    moved = float(np.abs(logprobs - np.asarray(before, dtype=np.float32)).mean()) if before else 0.0
    if before and moved == 0.0:
        raise UserError(
            f"the student's logprobs on the probe batch did not change between refresh {refresh_index - 1} and"
            f" {refresh_index}: training does not reach the weights that generate. Is lr 0, or the adapter inactive?"
        )
    run.world.barrier()
    if run.world.is_main:
        kept = {str(refresh_index): logprobs.tolist()} | {
            k: v for k, v in history.items() if int(k) == refresh_index - 1
        }
        replace_text(path, json.dumps({"row_ids": row_ids, "logprobs": kept}))
    run.world.barrier()
    return moved


@torch.no_grad()
def trainer_logprobs(student: Student, records: list[cache.Record]) -> np.ndarray:
    """The student's logprobs [N] of the records' completions, by the training forward."""
    was_training = student.model.training
    student.model.eval()
    aligned = align(
        [r.prompt_ids for r in records],
        [r.completion_ids for r in records],
        student.tokenizer.pad_token_id,
        student.device,
        packed=student.packs,
    )
    hidden_Nd = at_scored(student.hidden(aligned), aligned)
    student.model.train(was_training)
    return gather_logprobs(hidden_Nd, student.head, aligned.targets, vocab_size=student.vocab_size).cpu().numpy()


def generator_logprobs(run: Run, student: Student, records: list[cache.Record]) -> np.ndarray:
    """The same logprobs at temperature 1 by the rollout engine, forced along the completions."""
    sampling = Sampling(run.config.rollout.max_new_tokens)
    with student.autocast():
        completions = generate(
            student.model, [r.prompt_ids for r in records], [0] * len(records), sampling, vocab_size=student.vocab_size,
            eos_ids=student.eos_ids, pad_id=student.tokenizer.pad_token_id, micro_batch=len(records),
            forced=[r.completion_ids for r in records],
        )  # fmt: skip
    lengths = [len(record.completion_ids) for record in records]
    return np.concatenate([c.logprobs[:n] for c, n in zip(completions, lengths, strict=True)])
