"""Engines from outside: the loops write with whatever engine they are handed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import cache
from stages.engine.opening import choose_engine, open_engine
from stages.engine.protocol import Completion, Request
from stages.loops import refresh, setup
from stages.models.teacher import TeacherLoader
from tests.support.helpers import make_run, prompts_of
from tests.support.tiny_runs import TINY, policy_of, student_of

TEXT = np.array([20, 21, 22, 1], np.int32)


class FixedText:
    """An engine that writes the same text for every prompt."""

    def __init__(self) -> None:
        self.num_closed = 0

    def generate(self, requests: list[Request], *_: Any) -> list[Completion]:
        zeros = np.zeros(len(TEXT), np.float32)
        return [Completion(TEXT, zeros - 2, zeros + 3, "eos") for _ in requests]

    def close(self) -> None:
        self.num_closed += 1


def test_rollouts_are_those_of_the_engine_that_is_handed_in(tmp_path: Path) -> None:
    run = make_run(tmp_path, **TINY)
    vocabulary, engine = setup.shared_vocabulary(run.config), FixedText()
    policy = replace(policy_of(run, student_of(run)), engine=engine)
    with TeacherLoader(run.config, run.world) as teacher:
        refresh.write_rollouts(
            run, policy, vocabulary, prompts_of(run.config), refresh_index=0, teacher=teacher
        )
    rows = cache.open(run.config.cache_root)[:]
    assert len(rows) == 16
    for row in rows:
        assert row.completion_ids.tolist() == TEXT.tolist()
        assert set(row.behaviour_logprobs) == {-2.0}
        assert row.policy_hash == policy.policy_hash
    assert engine.num_closed == 1


def test_a_chosen_engine_is_opened_with_the_model_and_for_its_adapters(tmp_path: Path) -> None:
    student = student_of(make_run(tmp_path, **TINY))
    assert student.model is not student.base
    choose_engine(student.base, lambda _: FixedText())
    assert isinstance(open_engine(student.model), FixedText)
    assert isinstance(open_engine(student.base), FixedText)
