"""Ctrl-C and SIGTERM end a cache command at once; committed data stays intact, as after a crash."""

from __future__ import annotations

import os
import signal
from types import FrameType


def install() -> None:
    """Install the handlers; call before other imports. Ignored signals stay ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted; what is committed is kept\n")
    os._exit(128 + number)
