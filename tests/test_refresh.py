"""The probe at a refresh: what generates is what trains, and it has moved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache
from stages.data.alignment import align, at_scored
from stages.loops import refresh
from stages.runtime.errors import UserError
from tests.helpers import make_run, records_of
from tests.tiny_runs import TINY, stir, student_of, train, write_rollouts


def test_an_adapter_that_does_not_generate_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    write_rollouts(run, student)
    stir(student, 0.2)
    trainers = refresh.trainer_logprobs

    def without_adapter(*arguments: Any) -> np.ndarray:
        with student.model.disable_adapter():
            return trainers(*arguments)

    monkeypatch.setattr(refresh, "trainer_logprobs", without_adapter)
    with pytest.raises(UserError, match=r"generator and trainer disagree by"):
        refresh.check_generator(run, student, 1)


def test_a_student_that_did_not_move_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    student = student_of(run)
    write_rollouts(run, student)
    refresh.check_generator(run, student, 1)
    with pytest.raises(UserError, match="did not change between refresh 1 and 2"):
        refresh.check_generator(run, student, 2)
    stir(student)
    assert refresh.check_generator(run, student, 2)["probe_moved"] > 0


def test_the_first_refresh_is_compared_with_the_untrained_student(tmp_path: Path) -> None:
    run = train(tmp_path)
    assert records_of(run.folder, "refresh")[0]["probe_moved"] > 0


def test_the_first_steps_in_bfloat16_reach_the_generator(tmp_path: Path) -> None:
    """Their updates are less than half a step of the weights into which the generator merges them."""
    run = make_run(tmp_path, **(TINY | {"dtype": "bf16"}))
    student = student_of(run)
    write_rollouts(run, student)
    rows = cache.open(run.config.cache_root)[:]

    def logprobs() -> tuple[np.ndarray, np.ndarray]:
        return refresh.trainer_logprobs(student, rows), refresh.generator_logprobs(run, student, rows)

    before = logprobs()
    aligned = align([r.prompt_ids for r in rows], [r.completion_ids for r in rows], 0, student.device)
    optimizer = torch.optim.Adam(student.trainable.values(), lr=3e-5)
    for _ in range(2):
        logits = at_scored(student.hidden(aligned), aligned).float() @ student.head.weight.float().t()
        torch.nn.functional.cross_entropy(logits, aligned.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer, generator = (float((b - a).mean()) for a, b in zip(before, logprobs(), strict=True))
    assert trainer > 2e-3
    assert generator == pytest.approx(trainer, rel=0.2)
