"""The loop that waits for other processes' work to appear on disk: units, rows and versions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.5


def wait_for(
    look: Callable[[], T | None],
    *,
    on_wait: Callable[[], None] | None = None,
    patience: float = math.inf,
) -> T | None:
    """Call `look` until it returns something other than None, and return that; None after `patience` seconds.

    `on_wait` is called once, before the first pause. Collective if `look` is; it must then return the same on
    all ranks.
    """
    began, waits = time.monotonic(), False
    while (found := look()) is None:
        if time.monotonic() - began > patience:
            return None
        if on_wait is not None and not waits:
            on_wait()
        waits = True
        time.sleep(POLL_SECONDS)
    return found
