"""Ctrl-C and SIGTERM end a cache command at once; as after a crash, committed data stays whole."""

from __future__ import annotations

import os
import signal
from types import FrameType


def install() -> None:
    """Installs the handlers; call before other imports. Signals that are ignored stay ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted; what is committed is kept\n")
    os._exit(128 + number)
