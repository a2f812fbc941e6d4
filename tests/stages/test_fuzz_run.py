"""A short campaign of the fuzzer of a run's files; `python -m tests.fuzz_run` goes on for longer."""

import pytest

from tests import fuzz_run


@pytest.mark.thorough
def test_some_dozen_hostile_runs_end_with_success_or_one_sentence() -> None:
    count, problems = fuzz_run.campaign(iter(range(60)), seconds=20)
    assert problems == []
    assert count > 5
