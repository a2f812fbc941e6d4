"""Warnings of a training that goes wrong slowly carry figures, come once, and stay away from a usual one."""

from typing import Any

import pytest

from stages.runtime.watch import Watch

USUAL = {
    "loss": 0.5,
    "grad_norm": 1.0,
    "student_logprob": -1.0,
    "teacher_entropy": 0.5,
    "mean_completion_tokens": 50.0,
    "teacher_support_mass": 0.99,
}


def warnings(changed: dict[str, Any], steps: int = 40, change_at: int = 20) -> list[str]:
    watch = Watch()
    found = []
    for step in range(1, steps + 1):
        found += watch.look({"kind": "step", "step": step, **USUAL, **(changed if step >= change_at else {})})
    return found


def test_a_usual_training_gives_no_warning() -> None:
    assert warnings({"loss": 0.2, "grad_norm": 3.0, "student_logprob": -0.5}) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loss": 5.0}, "loss 5 at step 20 is 10.0 times"),
        ({"grad_norm": 50.0}, "grad_norm 50 at step 20 is 50.0 times"),
        ({"student_logprob": -0.01}, "while the teacher's entropy there is 0.5: the student became"),
        ({"mean_completion_tokens": 200.0}, "completions grew from 50 to"),
        ({"teacher_support_mass": 0.8}, "fell from 0.990 to"),
        ({"cut_share": 0.75}, "75% of the completions were cut"),
    ],
)
def test_what_goes_wrong_is_told_once_with_its_figures(changed: dict[str, Any], words: str) -> None:
    (text,) = warnings(changed)
    assert words in text


def test_a_student_that_becomes_as_certain_as_its_teacher_is_no_warning() -> None:
    assert warnings({"student_logprob": -0.01, "teacher_entropy": 0.015}) == []


def test_records_without_the_teachers_entropy_are_not_compared_with_it() -> None:
    records: list[dict[str, Any]] = [
        {"kind": "step", "step": step, "student_logprob": -1.0 if step < 20 else -0.01} for step in range(40)
    ]
    watch = Watch()
    assert [text for record in records for text in watch.look(record)] == []


def test_a_resumed_run_does_not_repeat_what_was_told() -> None:
    records = [{"kind": "step", "step": step, **USUAL, "cut_share": 0.75} for step in range(1, 5)]
    assert Watch(records).look({"kind": "refresh", "cut_share": 0.75}) == []


def test_records_of_other_types_are_passed_over() -> None:
    assert (
        Watch().look(
            {"kind": "step", "step": 1, "loss": None, "cut_share": "most", "grad_norm": float("nan")}
        )
        == []
    )
