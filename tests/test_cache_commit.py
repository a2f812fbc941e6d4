"""A commit is all or nothing: crashes at every step and at random times, and writers that race, lose and double no row.

Writers run in processes forked from `python -m tests.test_cache_commit`, which has imported no more than the cache.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cache
from cache import commit
from cache.store import STALE_SECONDS, open_store
from tests.cache_samples import assert_same, files, fingerprint, record, row_id, write

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("open", "write", "fsync", "rename", "link", "unlink")
DIED = 77
UNITS = [range(start, start + 3) for start in range(0, 30, 3)]


def drive(*arguments: str) -> str:
    """Runs `main` of this file in a process of its own; its output."""
    command = [sys.executable, "-m", "tests.test_cache_commit", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_holds(root: Path, numbers: list[int]) -> None:
    """The cache is sound and holds exactly these rows, as they were appended."""
    snapshot = cache.open(root)
    assert snapshot.row_ids == sorted(row_id(n) for n in numbers)
    for number in numbers:
        assert_same(snapshot[snapshot.position(row_id(number))], record(number))
    assert snapshot.verify() == []


def test_a_crash_at_any_step_leaves_all_of_a_unit_or_nothing_and_a_rerun_gives_every_row_once(tmp_path):
    steps = json.loads(drive("crash", str(tmp_path)))
    assert {step.split("-")[1] for step in steps} == set(STEPS)
    held = []
    for step in steps:
        root = tmp_path / step
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
    report = json.loads(drive("kill", str(tmp_path), str(seed)))
    print(report)
    assert report["kills"] == 20
    assert_holds(tmp_path, [n for unit in UNITS for n in unit])
    assert cache.open(tmp_path).summary()["duplicate_rows"] == 0


def test_writers_that_race_on_the_same_units_commit_each_once(tmp_path):
    results = json.loads(drive("race", str(tmp_path), "same"))
    assert len(results) == 4
    assert sum(rows for rows, _ in results) == 30
    assert all(rows + left_out == 30 for rows, left_out in results)
    assert_holds(tmp_path, list(range(30)))
    assert len(files(tmp_path / "shards")) == len(files(tmp_path / "commits")) == 10, "losers take their shards away"


def test_writers_with_different_plans_still_give_each_row_once(tmp_path):
    results = json.loads(drive("race", str(tmp_path), "different"))
    snapshot = cache.open(tmp_path)
    assert_holds(tmp_path, list(range(30)))
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
    left = [tmp_path / "shards/.tmp-0123", tmp_path / "commits/.tmp-4567", tmp_path / "shards/g9-abc-def.arrow"]
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


def write_missing(root: Path, units: list[range]) -> tuple[int, int]:
    """Commits the units that lack a row; how many rows this writer committed, and how many it left out."""
    rows = left_out = 0
    with cache.Writer(root, fingerprint(), tokenizer_json="{}") as writer:
        for unit in units:
            if all(row_id(n) in writer.committed_ids for n in unit):
                left_out += len(unit)
                continue
            for number in unit:
                writer.append(record(number))
            result = writer.commit(f"g0000-{unit.start:05d}-{len(unit)}")
            rows, left_out = rows + result.rows, left_out + result.rows_left_out
    return rows, left_out


def run_once() -> float:
    """Writes all units to a cache that is thrown away; seconds. Forks made later need no more imports."""
    with tempfile.TemporaryDirectory() as folder:
        write_missing(Path(folder), UNITS[:1])
        start = time.perf_counter()
        write_missing(Path(folder), UNITS)
        return time.perf_counter() - start


def in_a_fork(work: Callable[[], None]) -> int:
    """Process id of a fork that does `work` and exits with 0, or 1 if that raises."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(count: int, when: str) -> list[str]:
    """Makes the process die before or after its `count`-th call of the steps, or in the middle of a write."""
    seen: list[str] = []

    def patch(name: str) -> None:
        original = getattr(os, name)

        def step(*args: object, **kwargs: object) -> object:
            seen.append(name)
            if len(seen) == count and when == "before":
                if name == "write":
                    original(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os._exit(DIED)
            try:
                return original(*args, **kwargs)
            finally:
                if len(seen) == count:
                    os._exit(DIED)

        setattr(os, name, step)

    for name in STEPS:
        patch(name)
    return seen


def drive_crashes(folder: Path) -> list[str]:
    """One cache per step of making a cache and committing two units, each left by a writer that died there."""
    names: list[str] = []
    run_once()

    def note_steps() -> None:
        seen = die_at(10**9, "before")
        write_missing(folder / "whole", [range(3), range(3, 6)])
        (folder / "steps.json").write_text(json.dumps(seen))

    assert code_of(in_a_fork(note_steps)) == 0
    steps = json.loads((folder / "steps.json").read_text())
    for count, step in enumerate(steps, 1):
        for when in ("before", "after"):
            names.append(f"{count:03d}-{step}-{when}")

            def crash(root: Path = folder / names[-1], count: int = count, when: str = when) -> None:
                die_at(count, when)
                write_missing(root, [range(3), range(3, 6)])

            assert code_of(in_a_fork(crash)) == DIED, names[-1]
    return names


def drive_kills(root: Path, seed: int) -> dict[str, object]:
    """Kills a writer again and again at random times; each next one goes on until all units are there."""
    rng, kills, seconds = random.Random(seed), 0, run_once()
    rows: list[int] = []
    while True:
        child = in_a_fork(lambda: write_missing(root, UNITS) and None)
        if kills < 20:
            time.sleep(rng.uniform(0, seconds / 3))
            os.kill(child, signal.SIGKILL)
            kills += 1
            code_of(child)
            rows.append(3 * len(commit.record_names(open_store(root))))
        elif code_of(child) == 0:
            return {"kills": kills, "rows_after_each": rows}


def drive_race(root: Path, plan: str) -> list[list[int]]:
    """Four writers at once, all with the same units in different orders, or each with units of another size."""
    children = []
    run_once()
    for turn in range(4):
        size = 3 if plan == "same" else 3 + turn
        units = [range(start, min(start + size, 30)) for start in range(0, 30, size)]
        random.Random(turn).shuffle(units)

        def work(units: list[range] = units, turn: int = turn) -> None:
            result = write_missing(root, units)
            (root.parent / f"{root.name}-{turn}.json").write_text(json.dumps(result))

        children.append(in_a_fork(work))
    assert [code_of(child) for child in children] == [0] * 4
    return [json.loads((root.parent / f"{root.name}-{turn}.json").read_text()) for turn in range(4)]


def main(command: str, folder: str, *options: str) -> None:
    root = Path(folder)
    drivers = {"crash": lambda: drive_crashes(root), "kill": lambda: drive_kills(root, int(options[0]))}
    drivers["race"] = lambda: drive_race(root, options[0])
    print(json.dumps(drivers[command]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
