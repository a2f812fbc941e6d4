"""The loop that waits for other processes."""

import pytest

from stages.loops import waiting
from stages.loops.waiting import wait_for


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes time."""
    made: list[float] = []
    monkeypatch.setattr(waiting.time, "sleep", made.append)
    return made


def test_what_is_there_is_returned_without_a_pause(pauses: list[float]) -> None:
    told: list[str] = []
    assert wait_for(lambda: 7, on_wait=lambda: told.append("waiting")) == 7
    assert (pauses, told) == ([], [])


def test_falsy_answers_end_the_wait_too(pauses: list[float]) -> None:
    assert wait_for(lambda: 0) == 0
    assert pauses == []


def test_waiting_is_told_once(pauses: list[float]) -> None:
    answers, told = iter([None, None, None, "rows"]), list[str]()
    assert wait_for(lambda: next(answers), on_wait=lambda: told.append("waiting")) == "rows"
    assert (pauses, told) == ([waiting.POLL_SECONDS] * 3, ["waiting"])


def test_patience_runs_out(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    times = iter([0.0, 1.0, 2.0, 3.5])
    monkeypatch.setattr(waiting.time, "monotonic", lambda: next(times))
    assert wait_for(lambda: None, patience=3.0) is None
    assert len(pauses) == 2
