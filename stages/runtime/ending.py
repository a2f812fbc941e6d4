"""Process shutdown: signals, lock release and final records. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

NAMES = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGUSR2: "SIGUSR2",
}
AFTER_STEP = "stopping after this step; again to stop at once"
ECHO_SECONDS = 2.0  # under torchrun a terminal signal arrives twice: directly, and forwarded


class Stopped(BaseException):
    """Training ended early, at a step boundary; `code` is the exit code, the message is for the user."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Process:
    """Shutdown state of this process."""

    asked = 0  # the signal that asked it to end
    asked_at = 0.0
    began: float | None = None  # time.perf_counter() at the start of a command
    hurries = False  # a second signal asked it to end at once
    finishes = 0  # > 0: the work in progress ends by itself at a safe point
    ends_hard = False
    raises = False  # a signal raises an exception rather than end the process
    tasks: list[tuple[Callable[[], None], bool]] = []  # noqa: RUF012
    reader = writer = -1


def install() -> None:
    """Install signal handling: end at once with a message, or at the next safe point inside `finishing`.

    A thread waits for signals because the main thread may spend a long time inside a library. A second signal
    ends the process at once. Signals that were already ignored stay ignored. Call before a command's other
    imports.
    """
    _Process.began = time.perf_counter()
    # read when torch is imported; DDP warns about a flag that is intended
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Read then too. OpenMP threads spin for milliseconds by default, which wastes time on a shared CPU.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _Process.reader, _Process.writer = os.pipe()
    os.set_blocking(_Process.writer, False)
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _noted)
    signal.set_wakeup_fd(_Process.writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=uninstall)


@contextmanager
def raising() -> Iterator[None]:
    """Inside, for a call from Python, Ctrl-C raises KeyboardInterrupt and SIGTERM SystemExit(143).

    In `finishing` they do so at the next safe point, a second signal at once. Only in the main thread, and
    only signals that the caller does not handle; how they are handled is restored at the end.
    """
    kept: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                kept[number] = signal.signal(number, _noted_or_raised)
    if not kept:
        yield
        return
    _Process.raises = True
    os.register_at_fork(after_in_child=uninstall)
    try:
        yield
    except Stopped as error:
        _raise(error.code - 128, str(error))
    finally:
        for taken, handler in kept.items():
            signal.signal(taken, handler)
        _Process.raises, _Process.asked, _Process.hurries = False, 0, False


def began() -> float | None:
    """`time.perf_counter()` when this process's command began, before its imports; None in other programs."""
    return _Process.began


def asked() -> int:
    """The signal that asked this process to end; 0 if none did."""
    return _Process.asked


def hurries() -> bool:
    """Whether a second signal asked this process to end at once, whatever is lost."""
    return _Process.hurries


@contextmanager
def finishing() -> Iterator[None]:
    """Defer the first signal: the caller checks `asked` at every safe point."""
    _Process.finishes += 1
    try:
        yield
    finally:
        _Process.finishes -= 1
        if _Process.asked and not _Process.finishes and sys.exc_info()[0] is None:
            _end_now(_Process.asked)


@contextmanager
def at_once() -> Iterator[None]:
    """Inside `finishing`, let a signal end the process at once: the work in progress may be dropped."""
    finishes, _Process.finishes = _Process.finishes, 0
    if _Process.asked:
        _end_now(_Process.asked)
    try:
        yield
    finally:
        _Process.finishes = finishes


def at_end(task: Callable[[], None], quick: bool = False) -> None:
    """Run `task` at shutdown, last registered first; quick tasks run even if a signal ends the process.

    One that may wait looks at `hurries` first.
    """
    _Process.tasks.append((task, quick))


def run_tasks(quick_only: bool = False) -> None:
    while _Process.tasks:
        task, is_quick = _Process.tasks.pop()
        if is_quick or not quick_only:
            task()


def end_if_asked(patience: float = 0.0) -> None:
    """Exit if a signal asked for it, or does within `patience` seconds: it explains the recent failure."""
    time.sleep(patience)
    if _Process.asked:
        _end_now(_Process.asked)


def abandon() -> None:
    """Exit without running library exit handlers, which could take too long."""
    _Process.ends_hard = True


def ends_hard() -> bool:
    return _Process.ends_hard


def _noted(number: int, frame: FrameType | None) -> None:
    """Python-level signal handler; the watching thread does the work."""


def _noted_or_raised(number: int, frame: FrameType | None) -> None:
    if _Process.finishes and not _Process.asked:
        _Process.asked = number
        tell(f"\n{NAMES[signal.Signals(number)]}: {AFTER_STEP}")
    else:
        _Process.hurries = bool(_Process.asked)
        _end_now(number)


def _raise(number: int, message: str) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message) from None
    tell(message)
    raise SystemExit(128 + number) from None


def _watch() -> None:
    while data := os.read(_Process.reader, 64):
        for number in data:
            if number in NAMES:
                _take(number)


def _take(number: int) -> None:
    now = time.monotonic()
    if not _Process.asked:
        _Process.asked, _Process.asked_at = number, now
        if _Process.finishes:
            tell(f"\n{NAMES[signal.Signals(number)]}: {AFTER_STEP}")
        else:
            _end_soon(number)
    elif not ("TORCHELASTIC_RUN_ID" in os.environ and now - _Process.asked_at < ECHO_SECONDS):
        _Process.hurries = True
        _end_now(number)


def _end_soon(number: int) -> None:
    """End in another thread: this one goes on watching, so that a second signal ends tasks that take long."""
    try:
        threading.Thread(target=_end_now, args=(number,), name="ending", daemon=True).start()
    except RuntimeError:  # the interpreter is shutting down
        _end_now(number)


def _end_now(number: int) -> None:
    how = NAMES[signal.Signals(number)]
    if _Process.raises:
        _raise(number, f"interrupted ({how}); make the same call again to resume")
    tell(f"\ninterrupted ({how}); run the same command again to resume")
    try:
        run_tasks(quick_only=True)
    finally:
        os._exit(128 + number)


def tell(line: str) -> None:
    """Print `line` on stderr, also from a thread or a signal handler."""
    with suppress(OSError):  # nobody reads it
        os.write(2, f"{line}\n".encode("utf-8", "backslashreplace"))


def uninstall() -> None:
    """Restore Python's own signal handling: for a forked child without a watching thread, and for a server."""
    if _Process.reader >= 0:
        signal.set_wakeup_fd(-1)
    for number in NAMES:
        if signal.getsignal(number) in (_noted, _noted_or_raised):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _Process.tasks.clear()
    _Process.asked, _Process.finishes, _Process.hurries = 0, 0, False
