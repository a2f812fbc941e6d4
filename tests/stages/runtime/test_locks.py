"""One writer: a second one is told who the first is, and a dead one is in nobody's way."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.runtime import ending, locks
from stages.runtime.errors import UserError
from tests.support.helpers import ROOT

HOLD = """
import sys
from pathlib import Path
from stages.runtime import locks
locks.take(Path(sys.argv[1]), "the run")
print("held", flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = holder(tmp_path / "run/run.lock")
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_with_the_firsts_host_process_and_start(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    with pytest.raises(UserError, match=rf"in use by process {other.pid} on \S+, since \d{{4}}-"):
        locks.take(tmp_path / "run/run.lock", "the run")


def test_the_lock_of_a_killed_process_is_taken_over_and_given_back(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    path = tmp_path / "run/run.lock"
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    locks.take(path, "the run")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    locks.take(path, "the run")  # this process has it
    ending.run_tasks()
    assert not path.exists()


def test_a_folder_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    locks.take(tmp_path / "runs/new/run.lock", "the run")
    ending.run_tasks()
    assert list(tmp_path.iterdir()) == []


def left(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**locks._identity(), **values}))


def test_what_another_machine_left_says_how_to_remove_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    left(path, host="elsewhere", boot="another", pid=7)
    with pytest.raises(UserError, match=rf"process 7 on elsewhere.*delete {re.escape(str(path))}"):
        locks.take(path, "the run")


@pytest.mark.parametrize("start", ["", "of a later process"])
def test_without_locks_of_the_kernel_the_record_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    path = tmp_path / "run.lock"
    left(path, pid=os.getppid(), process_start=start or locks._process_start(os.getppid()))
    if not start:
        with pytest.raises(UserError, match=f"process {os.getppid()}"):
            locks.take(path, "the run")
    else:  # the number belongs to another process now
        locks.take(path, "the run")
        ending.run_tasks()


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"pid": "x"}'])
def test_a_record_that_says_nothing_is_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.lock"
    path.write_text(text)
    if text.startswith("{"):
        left(path, pid="x")
    locks.take(path, "the run")
    ending.run_tasks()
