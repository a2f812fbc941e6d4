"""Signals: at once with a sentence, or at a safe place; a second one at once; children of a process are not
its concern.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from stages.runtime import ending
from tests.support.helpers import ROOT, environment

START = "from stages.runtime import ending; ending.install(); import os, sys, time\n"


def run(body: str, *signals: int, wait: float = 0.2, start: str = START) -> tuple[int, str]:
    """Exit code and stderr of a process that gets these signals once it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", start + body],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        os.kill(process.pid, number)
        time.sleep(wait)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_command_at_once_with_a_sentence(number: signal.Signals) -> None:
    code, err = run("print('ready', flush=True); time.sleep(20)", number)
    assert code == 128 + number
    assert "interrupted" in err
    assert "Traceback" not in err


def test_what_is_finishing_is_left_to_look_for_itself() -> None:
    body = """
with ending.finishing():
    print('ready', flush=True)
    while not ending.asked(): time.sleep(0.01)
    print('safe', file=sys.stderr)
"""
    code, err = run(body, signal.SIGTERM)
    assert code == 143
    assert err.index("stopping after this step") < err.index("safe") < err.index("interrupted")


def test_a_second_signal_does_not_wait_for_it() -> None:
    began = time.monotonic()
    code, _ = run(
        "with ending.finishing():\n    print('ready', flush=True); time.sleep(20)",
        signal.SIGTERM,
        signal.SIGTERM,
    )
    assert code == 143
    assert time.monotonic() - began < 15


def test_a_part_that_may_be_dropped_ends_at_once() -> None:
    body = "with ending.finishing(), ending.at_once():\n    print('ready', flush=True); time.sleep(20)"
    assert run(body, signal.SIGINT)[0] == 130


RAISING = """
from stages.runtime import ending; import os, signal, sys, time
before = signal.getsignal(signal.SIGINT)
try:
    with ending.raising():
        BODY
except BaseException as error:
    print(type(error).__name__, error, file=sys.stderr)
assert signal.getsignal(signal.SIGINT) is before
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert not ending.asked()
"""
WORK = """with ending.finishing():
            print('ready', flush=True)
            while not ending.asked(): time.sleep(0.01)
            raise ending.Stopped('saved', 128 + ending.asked())"""


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGINT, "KeyboardInterrupt saved"), (signal.SIGTERM, "saved\nSystemExit 143")]
)
def test_a_call_from_python_is_ended_by_an_exception(number: signal.Signals, how: str) -> None:
    code, err = run(RAISING.replace("BODY", WORK), number, start="")
    assert code == 0
    assert err.index("stopping after this step") < err.index(how)
    waits = "print('ready', flush=True); time.sleep(20)"
    code, err = run(RAISING.replace("BODY", waits), number, start="")
    assert code == 0
    assert "make the same call again to resume" in err


def test_a_call_from_python_leaves_the_callers_handlers() -> None:
    start = "import signal; signal.signal(15, lambda *_: print('own', file=__import__('sys').stderr))\n"
    body = "from stages.runtime import ending; import time\n"
    body += "with ending.raising(): print('ready', flush=True); time.sleep(0.5)"
    assert run(body, signal.SIGTERM, start=start) == (0, "own\n")


def test_a_signal_to_a_forked_child_is_not_its_parents() -> None:
    body = """
child = os.fork()
if not child: time.sleep(20)
time.sleep(0.1)
os.kill(child, 15)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -15
time.sleep(0.2)
assert not ending.asked()
print('ready', flush=True)
"""
    assert run(body) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cache_command_ends_at_once_from_its_imports_on(number: signal.Signals) -> None:
    """`python -m cache` imports the package while sys.argv begins with -m."""
    body = (
        "import sys; sys.argv = ['-m']; import cache; import time; print('ready', flush=True); time.sleep(20)"
    )
    code, err = run(body, number, start="")
    assert code == 128 + number
    assert "interrupted" in err
    assert "Traceback" not in err


def test_a_line_with_a_path_that_is_not_text_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    ending.tell("a folder \udcff")
    assert capfd.readouterr().err == "a folder \\udcff\n"
