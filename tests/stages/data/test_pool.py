"""The live pool: rows by age, run and policy."""

from pathlib import Path

import pytest

import cache
from stages.data.pool import live_pool
from tests.support.training_rows import V, make_record, topk


def snapshot_of(folder: Path, records: list[cache.Record]) -> cache.Snapshot:
    must_match = {"vocab_size": V, "signal": {"kind": "topk", "k": 5, "temperature": 1.0}}
    with cache.Writer(folder, cache.Fingerprint(must_match, {})) as writer:
        for record in records:
            writer.append(record)
        writer.commit("unit")
    return cache.open(folder)


@pytest.fixture
def aged(tmp_path: Path) -> cache.Snapshot:
    """Rows of refreshes 0, 1, 2 at steps 0, 10, 20 of `mine`, and two rows of another run."""

    def row(number: int, run_id: str, refresh: int) -> cache.Record:
        signal = topk(4, 5, number)
        plain = {
            "top1_id": signal.ids[:, 0],
            "top1_logprob": signal.logprobs[:, 0],
            "log_tail_mass": signal.log_tail_mass,
        }
        made = make_record(
            number, signal=signal, run_id=run_id, refresh_index=refresh, policy_step=10 * refresh
        )
        return cache.Record(**{**made.__dict__, **plain})

    rows = [row(9 - i, "mine", i // 2) for i in range(6)] + [row(20, "other", 0), row(21, "other", 7)]
    return snapshot_of(tmp_path / "cache", rows)


def ids(*numbers: int) -> list[str]:
    return [f"{n:032x}" for n in sorted(numbers)]


def test_the_pool_is_sorted_and_holds_rows_no_older_than_max_age(aged: cache.Snapshot) -> None:
    assert live_pool(aged, "mine", 2, 20, max_age=0, policies={}).row_ids == ids(4, 5, 20, 21)
    assert live_pool(aged, "mine", 2, 20, max_age=10, policies={}).row_ids == ids(4, 5, 6, 7, 20, 21)
    assert live_pool(aged, "mine", 2, 20, max_age=20, policies={}).row_ids == ids(4, 5, 6, 7, 8, 9, 20, 21)


def test_rows_of_later_refreshes_are_not_in_the_pool_yet(aged: cache.Snapshot) -> None:
    assert live_pool(aged, "mine", 1, 10, max_age=0, policies={}).row_ids == ids(6, 7, 20, 21)
    assert live_pool(aged, "mine", 0, 0, max_age=100, policies={}).row_ids == ids(8, 9, 20, 21)


def test_ages_count_steps_and_other_runs_have_none(aged: cache.Snapshot) -> None:
    found = live_pool(aged, "mine", 2, 20, max_age=20, policies={})
    assert [found.ages[row_id] for row_id in ids(8, 6, 4)] == [0, 10, 20]
    assert found.ages[ids(20)[0]] == found.ages[ids(21)[0]] == -1
    assert found.num_off_policy == 2


def test_max_age_does_not_touch_rows_of_another_run(aged: cache.Snapshot) -> None:
    found = live_pool(aged, "third", 0, 1000, max_age=0, policies={})
    assert len(found.row_ids) == found.num_off_policy == 8


def test_rows_of_a_trajectory_that_was_given_up_are_left_out(aged: cache.Snapshot) -> None:
    hashes = dict(
        zip(
            aged.index.column("row_id").to_pylist(), aged.index.column("policy_hash").to_pylist(), strict=True
        )
    )
    right = {refresh: hashes[ids(8 - 2 * refresh)[0]] for refresh in range(3)}
    everything = live_pool(aged, "mine", 2, 20, max_age=20, policies=right)
    assert everything.row_ids == ids(4, 5, 6, 7, 8, 9, 20, 21)
    left = live_pool(aged, "mine", 2, 20, max_age=20, policies=right | {1: "f" * 16})
    assert left.row_ids == ids(4, 5, 8, 9, 20, 21)


def test_rows_of_one_prompt_and_refresh_are_groups_of_the_size_asked_for(tmp_path: Path) -> None:
    def row(number: int) -> cache.Record:
        signal = topk(4, 5, number)
        made = make_record(
            number,
            signal=signal,
            prompt_id=f"p{number % 2}",
            refresh_index=number // 6,
            policy_step=number // 6,
        )
        plain = {
            "top1_id": signal.ids[:, 0],
            "top1_logprob": signal.logprobs[:, 0],
            "log_tail_mass": signal.log_tail_mass,
        }
        return cache.Record(**{**made.__dict__, **plain})

    snapshot = snapshot_of(tmp_path / "cache", [row(i) for i in range(12)])
    pool = live_pool(snapshot, "mine", 1, 1, max_age=9, policies={}, group_size=2)
    found = {
        tuple(row_id for row_id in pool.row_ids if pool.leaders[row_id] == leader) for leader in pool.row_ids
    }
    pairs = [(0, 2), (4,), (1, 3), (5,), (6, 8), (10,), (7, 9), (11,)]
    assert found - {()} == {tuple(ids(*pair)) for pair in pairs}
    assert pool.num_shared(*ids(0, 2)) == 3
    assert pool.num_shared(*ids(0, 1)) == pool.num_shared(*ids(2, 4)) == 0
    assert live_pool(snapshot, "mine", 1, 1, max_age=9, policies={}).leaders == {}
    both = pool.with_extra(pool, snapshot, 1.0)
    assert both.leaders[f"0:{ids(2)[0]}"] == f"0:{ids(0)[0]}"
    assert [len(groups.sizes) for groups in both.groups] == [8, 8]
