"""Writers that crash or race, for the commit tests: forks of a process that has imported only the cache.

python -m tests.support.cache_writers crash ROOT [before] [after]      prints the outcome as JSON
python -m tests.support.cache_writers kill ROOT SEED KILLS
python -m tests.support.cache_writers race ROOT same|different
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cache
from cache.store import ObjectStore
from tests.support.cache_samples import assert_same, fingerprint, record, row_id

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = [(os, name) for name in ("open", "write", "fsync", "rename", "link", "unlink")]
DIED = 77
UNITS = [range(start, start + 3) for start in range(0, 30, 3)]


def drive(*arguments: str) -> str:
    """Run this file's `main` in its own process; returns the output."""
    command = [sys.executable, "-m", "tests.support.cache_writers", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_holds(root: str | Path, numbers: list[int]) -> None:
    """Assert that the cache is sound and holds exactly these rows, as they were appended."""
    snapshot = cache.open(root)
    assert snapshot.row_ids == sorted(row_id(n) for n in numbers)
    for number in numbers:
        assert_same(snapshot[snapshot.position(row_id(number))], record(number))
    assert snapshot.verify() == []


def write_missing(root: str | Path, units: list[range]) -> tuple[int, int]:
    """Commit the units that lack a row; returns the numbers of rows committed and skipped by this writer."""
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


def seconds_of(root: str) -> float:
    """Seconds to write all units, next to `root`."""
    start = time.perf_counter()
    assert code_of(in_a_fork(lambda: write_missing(f"{root}-timed", UNITS) and None)) == 0
    return time.perf_counter() - start


def in_a_fork(work: Callable[[], None]) -> int:
    """Fork a process that does `work` and exits with 0, or 1 if it raises; returns the process id."""
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


def die_at(count: int, when: str, steps: list[tuple[object, str]]) -> list[str]:
    """Die before or after the `count`-th call of the steps, or halfway through a local write."""
    seen: list[str] = []

    def patch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def step(*args: object, **kwargs: object) -> object:
            seen.append(name)
            if len(seen) == count and when == "before":
                if owner is os and name == "write":
                    original(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os._exit(DIED)
            try:
                return original(*args, **kwargs)
            finally:
                if len(seen) == count:
                    os._exit(DIED)

        setattr(owner, name, step)

    for owner, name in steps:
        patch(owner, name)
    return seen


def drive_crashes(root: str, moments: Sequence[str]) -> list[str]:
    """One cache per step of creating it and committing two units, left by a writer that died at that step.

    `moments`: whether it dies `before` the step, `after` it, or one writer each.
    """
    names: list[str] = []
    steps = steps_of(root)
    units = [range(3), range(3, 6)]
    seconds_of(root)
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "steps.json"

        def note_steps() -> None:
            seen = die_at(10**9, "before", steps)
            write_missing(f"{root}/whole", units)
            noted.write_text(json.dumps(seen))

        assert code_of(in_a_fork(note_steps)) == 0
        seen = json.loads(noted.read_text())
    for count, step in enumerate(seen, 1):
        for when in moments:
            names.append(f"{count:03d}-{step}-{when}")

            def crash(place: str = f"{root}/{names[-1]}", count: int = count, when: str = when) -> None:
                die_at(count, when, steps)
                write_missing(place, units)

            assert code_of(in_a_fork(crash)) == DIED, names[-1]
    return names


def steps_of(root: str) -> Sequence[tuple[object, str]]:
    """Functions that change files at `root`."""
    if "://" not in root:
        return STEPS
    return [(ObjectStore, name) for name in ("_upload", "create", "remove")]


def drive_kills(root: str, seed: int, num_kills: int) -> dict[str, object]:
    """Kill a writer repeatedly at random times; the next one continues until all units are there."""
    rng, kills = random.Random(seed), 0
    seconds_of(root)
    seconds = seconds_of(root + "-again")
    while True:
        child = in_a_fork(lambda: write_missing(root, UNITS) and None)
        if kills < num_kills:
            time.sleep(rng.uniform(0, seconds / 3))
            os.kill(child, signal.SIGKILL)
            kills += 1
            code_of(child)
        elif code_of(child) == 0:
            return {"kills": kills}


def drive_race(root: str, plan: str) -> list[list[int]]:
    """Run four concurrent writers: the same units in different orders, or units of different sizes.

    A fifth process reads meanwhile (`read_until`).
    """
    children = []
    seconds_of(root)
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(4):
            size = 3 if plan == "same" else 3 + turn
            units = [range(start, min(start + size, 30)) for start in range(0, 30, size)]
            random.Random(turn).shuffle(units)

            def work(units: list[range] = units, turn: int = turn) -> None:
                (Path(folder) / f"{turn}.json").write_text(json.dumps(write_missing(root, units)))

            children.append(in_a_fork(work))
        reader = in_a_fork(lambda: read_until(root, 30, 3 if plan == "same" else 1))
        assert [code_of(child) for child in [*children, reader]] == [0] * 5
        return [json.loads((Path(folder) / f"{turn}.json").read_text()) for turn in range(4)]


def read_until(root: str, num_rows: int, unit_rows: int) -> None:
    """Read the cache during writes until it has all rows; they must arrive in whole units, and stay."""
    while not cache.exists(root):
        time.sleep(0.01)
    snapshot = cache.open(root)
    seen: set[str] = set()
    while len(seen) < num_rows:
        snapshot = snapshot.refresh()
        assert seen <= set(snapshot.row_ids)
        assert len(snapshot) % unit_rows == 0
        for number in range(num_rows):
            if row_id(number) in set(snapshot.row_ids) - seen:
                assert_same(snapshot[snapshot.position(row_id(number))], record(number))
        seen = set(snapshot.row_ids)


def main(command: str, root: str, *options: str) -> None:
    if "://" in root:
        import s3fs  # noqa: F401  # once, not in every fork

    drivers: dict[str, Callable[[], object]] = {
        "crash": lambda: drive_crashes(root, options),
        "kill": lambda: drive_kills(root, int(options[0]), int(options[1])),
        "race": lambda: drive_race(root, options[0]),
    }
    print(json.dumps(drivers[command]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
