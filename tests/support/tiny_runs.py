"""Both stages on a few rows in this process, for the tests of training, resuming and checkpoints."""

from pathlib import Path
from typing import Any

import torch

import cache
from stages import train as stage_two
from stages.data.prompts import Prompt
from stages.engine.opening import open_engine
from stages.loops import feed, refresh, setup, steps
from stages.models.policy import Policy
from stages.models.student import Student
from stages.models.teacher import TeacherLoader
from stages.runtime.run import Run, open_run
from tests.support.helpers import make_run, prompts_of

V = 230
TINY: dict[str, Any] = {
    "teacher_ds_zero3": "false",
    "rollouts_per_refresh": 16,
    "rollouts_per_unit": 8,
    "batch_size": 8,
    "max_steps": 6,
    "refresh_every": 3,
    "checkpoint_every": 2,
    "max_new_tokens": 16,
    "warmup_steps": 2,
    "compile": "false",
}


def student_of(run: Run) -> Student:
    vocabulary = setup.shared_vocabulary(run.config)
    return setup.current_student(run, vocabulary)[0]


def policy_of(run: Run, student: Student, step: int = 0) -> Policy:
    return setup.student_policy(run, student, open_engine(student.model), step)


def write_rollouts(run: Run, student: Student, prompts: list[Prompt] | None = None) -> None:
    vocabulary = setup.shared_vocabulary(run.config)
    with TeacherLoader(run.config, run.world) as teacher:
        refresh.write_rollouts(
            run,
            policy_of(run, student),
            vocabulary,
            prompts or prompts_of(run.config),
            refresh_index=0,
            teacher=teacher,
        )


def train(folder: Path, **values: Any) -> Run:
    """Run or resume both stages in this process; with dropout, whose masks must resume too."""
    run = make_run(folder, **(TINY | {"lora_dropout": 0.1} | values))
    student = student_of(run)
    if not (run.folder / "checkpoints").exists():
        write_rollouts(run, student)
    stage_two.train(run, student, setup.shared_vocabulary(run.config))
    return run


def stir(student: Student, scale: float = 0.02) -> None:
    """Move LoRA's B away from zero, so that every adapter has a gradient."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(student.trainable.items()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * scale)


def step_run(folder: Path, cache_dir: str, **values: Any) -> Run:
    """A run with steps of 16 rows on an existing cache."""
    return make_run(folder, **(TINY | {"cache_dir": cache_dir, "batch_size": 16} | values))


def train_from(folder: Path, cache_dir: str, **values: Any) -> Run:
    """Run stage two alone on an existing cache."""
    run = make_run(folder, **(TINY | {"cache_dir": cache_dir} | values))
    vocabulary = setup.cached_vocabulary(run.config)
    stage_two.train(run, setup.current_student(run, vocabulary)[0], vocabulary)
    return run


def batch(
    run: Run, training: steps.Training, snapshot: cache.Snapshot, pool: steps.Pool, index: int
) -> steps.Batch:
    """The run's batch of step `index`, starting at 0."""
    return next(feed.global_batches(run, training.student, snapshot, pool, [index], training.caps))


def save_weights(folder: Path, flags: list[str]) -> None:
    """In a separate process, run both stages and save this rank's trained weights to folder/RANK.pt."""
    run = open_run("", flags)
    student = student_of(run)
    write_rollouts(run, student)
    stage_two.train(run, student, setup.shared_vocabulary(run.config))
    torch.save({n: p.detach().clone() for n, p in student.trainable.items()}, folder / f"{run.world.rank}.pt")
