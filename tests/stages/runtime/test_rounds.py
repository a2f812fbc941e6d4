"""Rounds of stage one from progress records, whose figures are cumulative."""

from typing import Any

from stages.runtime.rounds import rounds_of, summary


def progress(began: float, units: int, **values: Any) -> dict[str, Any]:
    """After `units` units of 10 rollouts, 4 s each."""
    shares = {"share_generate": 0.5, "share_score": 0.25, "share_write": 0.125, "share_rows": 0.0}
    counts = {"rollouts": 10, "generated_tokens": 400, "scored_tokens": 600, "padded_tokens": 800}
    return {
        "kind": "rollout_progress",
        "began": began,
        "evaluation": False,
        "seconds": 4.0 * units,
        "peak_memory_bytes": units,
        **shares,
        **{name: count * units for name, count in counts.items()},
        **values,
    }


def test_a_round_is_what_its_record_adds() -> None:
    """Two sets of rollouts, told apart by when they began."""
    rounds = rounds_of([progress(1.5, 1), progress(1.5, 2), progress(2.5, 1)])
    assert [(r.is_first, r.total, r.peak) for r in rounds] == [(True, 4, 1), (False, 4, 2), (True, 4, 1)]
    for one in rounds:
        assert one.seconds == {"generate": 2.0, "score": 1.0, "write": 0.5, "rows": 0.0, "other": 0.5}
        assert (one.generated_rate, one.scored_rate) == (200.0, 400.0)


def test_evaluations_other_kinds_and_records_of_older_versions_are_left_out() -> None:
    old = progress(1.5, 1)
    del old["evaluation"]
    assert rounds_of([progress(1.5, 1, evaluation=True), {"kind": "step"}, old]) == []


def test_without_rounds_there_is_no_rate() -> None:
    found = summary([])
    assert (found["rounds"], found["seconds"]) == (0, 0)
    for name in (
        "generated_tokens_per_second",
        "scored_tokens_per_second",
        "padding_waste",
        "peak_memory_bytes",
    ):
        assert found[name] is None
