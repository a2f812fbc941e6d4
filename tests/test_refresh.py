"""The probe at a refresh: what generates is what trains, and it has moved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
