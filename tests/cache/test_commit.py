"""A commit is all or nothing: crashes at every step and at random times, and writers that race, lose and
double no row.

Writers run in processes forked from `python -m tests.support.cache_writers`, which has imported no more than
the cache.
"""

import json
import os
import random
import time
from pathlib import Path

import pytest

import cache
from cache import commit
from cache.store import STALE_SECONDS, Store, StoreError
from cache.verify import withdraw
from tests.support.cache_samples import assert_same, files, fingerprint, record, row_id, write
from tests.support.cache_writers import STEPS, UNITS, assert_holds, drive, write_missing
from tests.support.thinning import leading


@pytest.mark.parametrize("moment", leading(1, ["after", "before"]))
def test_a_crash_at_any_step_leaves_all_of_a_unit_or_nothing_and_a_rerun_gives_every_row_once(
    tmp_path, moment
):
    steps = json.loads(drive("crash", str(tmp_path / "caches"), moment))
    assert {step.split("-")[1] for step in steps} == {name for _, name in STEPS}
    held = []
    for step in steps:
        root = tmp_path / "caches" / step
        if (root / "fingerprint.json").exists():
            held.append(len(cache.open(root)))
            assert_holds(root, list(range(held[-1])))
        else:  # died before there was a cache
            assert files(root / "commits") == []
        write_missing(root, [range(3), range(3, 6)])
        assert_holds(root, list(range(6)))
    assert set(held) == {0, 3, 6}, "crashes before, between and after the two commits"
    assert held == sorted(held), "once committed, rows stay"


def test_kills_at_random_times_lose_and_double_nothing(tmp_path):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    report = json.loads(drive("kill", str(tmp_path / "cache"), str(seed), "20"))
    assert report["kills"] == 20
    assert_holds(tmp_path / "cache", [n for unit in UNITS for n in unit])
    assert cache.open(tmp_path / "cache").summary()["duplicate_rows"] == 0


def test_writers_that_race_on_the_same_units_commit_each_once(tmp_path):
    results = json.loads(drive("race", str(tmp_path / "cache"), "same"))
    assert len(results) == 4
    assert sum(rows for rows, _ in results) == 30
    assert all(rows + left_out == 30 for rows, left_out in results)
    assert_holds(tmp_path / "cache", list(range(30)))
    assert len(files(tmp_path / "cache" / "shards")) == len(files(tmp_path / "cache" / "commits")) == 10, (
        "losers take their shards away"
    )


def test_writers_with_different_plans_still_give_each_row_once(tmp_path):
    results = json.loads(drive("race", str(tmp_path / "cache"), "different"))
    snapshot = cache.open(tmp_path / "cache")
    assert_holds(tmp_path / "cache", list(range(30)))
    summary = snapshot.summary()
    assert summary["rows"] == 30
    assert summary["duplicate_rows"] == sum(rows for rows, _ in results) - 30
    assert summary["leftover_files"] == 0


def commit_at_the_same_moment(
    root: Path, monkeypatch: pytest.MonkeyPatch, rows: range, unit: str
) -> cache.CommitResult:
    """Another writer commits `rows` after this one has looked and just before its record is written."""
    write_record = commit.write_record

    def beaten(*arguments: object) -> bool:
        monkeypatch.setattr(commit, "write_record", write_record)
        write(root, rows, unit=unit)
        return write_record(*arguments)

    with cache.Writer(root, fingerprint()) as writer:
        for number in range(4):
            writer.append(record(number))
        monkeypatch.setattr(commit, "write_record", beaten)
        return writer.commit("g0")


def test_the_second_committer_of_a_unit_withdraws_its_shard_and_says_so(tmp_path, monkeypatch):
    result = commit_at_the_same_moment(tmp_path, monkeypatch, range(4), "g0")
    assert (result.rows, result.rows_left_out) == (0, 4)
    assert len(files(tmp_path / "shards")) == len(files(tmp_path / "commits")) == 1
    assert_holds(tmp_path, list(range(4)))


def test_rows_in_two_units_at_once_are_read_from_the_record_that_sorts_first(tmp_path, monkeypatch):
    commit_at_the_same_moment(tmp_path, monkeypatch, range(2, 6), "f9")
    snapshot = cache.open(tmp_path)
    assert_holds(tmp_path, list(range(6)))
    units = dict(zip(snapshot.row_ids, snapshot.index["unit"].to_pylist(), strict=True))
    assert {units[row_id(n)] for n in range(2)} == {"g0"}
    assert {units[row_id(n)] for n in range(2, 6)} == {"f9"}
    assert snapshot.summary()["duplicate_rows"] == 2


def test_a_record_that_was_written_keeps_its_shard_though_the_disk_fails_then(tmp_path, monkeypatch):
    sync, count = os.fsync, [0]

    def fail_after_the_link(fd: int) -> None:
        count[0] += 1
        if files(tmp_path / "commits") and not any(n.startswith(".") for n in files(tmp_path / "commits")):
            raise OSError(5, "Input/output error")
        sync(fd)

    with cache.Writer(tmp_path, fingerprint()) as writer:
        writer.append(record(0))
        monkeypatch.setattr(os, "fsync", fail_after_the_link)
        with pytest.raises(cache.CacheError, match="Input/output error while writing to"):
            writer.commit("g0")
        monkeypatch.undo()
    assert_holds(tmp_path, [0])


def test_leftovers_are_ignored_reported_and_removed_after_a_day(tmp_path):
    write(tmp_path, range(3))
    shard = tmp_path / "shards" / files(tmp_path / "shards")[0]
    names = (
        "shards/.tmp-0123456789abcdef",
        "commits/.tmp-0123456789abcdef",
        "shards/g9-0123456789ab-01234567.arrow",
    )
    left = [tmp_path / name for name in names]
    for path in left:
        path.write_bytes(shard.read_bytes()[:100])
    assert_holds(tmp_path, list(range(3)))
    assert cache.open(tmp_path).summary()["leftover_files"] == 3
    assert cache.open(tmp_path).summary()["leftover_bytes"] == 300
    cache.Writer(tmp_path, fingerprint())
    assert all(path.exists() for path in left), "they may belong to a writer at work"
    for path in [*left, shard]:
        os.utime(path, (0, time.time() - STALE_SECONDS - 60))
    cache.Writer(tmp_path, fingerprint())
    assert not any(path.exists() for path in left)
    assert_holds(tmp_path, list(range(3)))


def test_a_sealed_file_notices_every_change_of_a_byte():
    sealed = commit.seal({"rows": [1, 2], "name": "é"})
    assert commit.unseal("x.json", sealed, "Do this.") == {"rows": [1, 2], "name": "é"}
    for position in range(len(sealed)):
        flipped = sealed[:position] + bytes([sealed[position] ^ 4]) + sealed[position + 1 :]
        with pytest.raises(cache.CacheError, match=r"x\.json.* Do this\."):
            commit.unseal("x.json", flipped, "Do this.")
    with pytest.raises(cache.CacheError, match=r"Do this\."):
        commit.unseal("x.json", sealed[:-1] + b" \n", "Do this.")
    with pytest.raises(cache.CacheError, match=r"x\.json is not a sealed JSON file .* Do this\."):
        commit.unseal("x.json", b'{"a":NaN,"sha256":"00"}\n', "Do this.")


def test_rows_that_were_withdrawn_and_written_again_are_read_after_a_refresh(tmp_path):
    write(tmp_path, range(4), unit="a")
    write(tmp_path, range(4, 8), unit="b")
    before = cache.open(tmp_path)
    damaged = before.commit_records()[0]
    (tmp_path / damaged.shard).write_bytes(b"")
    assert withdraw(tmp_path, cache.verify(tmp_path)) == [f"commits/{damaged.name}", damaged.shard]
    write(tmp_path, range(4), unit="a")
    after = before.refresh()
    assert after.commit_records()[0].name == damaged.name
    for number in range(8):
        assert_same(after[after.position(row_id(number))], record(number))


def test_a_record_that_is_withdrawn_while_records_are_read_is_none_of_the_snapshot(tmp_path, monkeypatch):
    write(tmp_path, range(4), unit="a")
    write(tmp_path, range(4, 8), unit="b")
    names = commit.record_names

    def list_and_withdraw(store: Store) -> list[str]:
        found = names(store)
        store.remove(commit.record_path(found[0]))
        return found

    monkeypatch.setattr(commit, "record_names", list_and_withdraw)
    assert cache.open(tmp_path).row_ids == sorted(row_id(n) for n in range(4, 8))


def test_a_shard_stays_while_its_record_may_still_arrive(tmp_path, monkeypatch):
    """A put to an object store whose answer did not come: removing the shard could leave a record without
    one.
    """

    def lose_the_answer(*_: object) -> bool:
        raise StoreError("no answer")

    with cache.Writer(tmp_path, fingerprint()) as writer:
        writer.append(record(0))
        monkeypatch.setattr(commit, "write_record", lose_the_answer)
        with pytest.raises(StoreError, match="no answer"):
            writer.commit("g0")
    assert len(files(tmp_path / "shards")) == 1
    assert (len(cache.open(tmp_path)), cache.open(tmp_path).summary()["leftover_files"]) == (0, 1)


def test_a_shard_whose_record_a_directory_refused_is_removed(tmp_path, monkeypatch):
    def refuse(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    with cache.Writer(tmp_path, fingerprint()) as writer:
        writer.append(record(0))
        monkeypatch.setattr(commit, "write_record", refuse)
        with pytest.raises(cache.CacheError, match="No space left on"):
            writer.commit("g0")
    assert files(tmp_path / "shards") == []
