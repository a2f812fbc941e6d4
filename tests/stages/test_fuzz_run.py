"""A short campaign of the fuzzer of a run's files; `python -m tests.fuzz_run` goes on for longer."""

from tests import fuzz_run


def test_some_dozen_hostile_runs_end_with_success_or_one_sentence() -> None:
    count, problems = fuzz_run.campaign(iter(range(60)), seconds=20)
    assert problems == []
    assert count > 5
