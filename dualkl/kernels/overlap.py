"""Chunks in turn over several sets of buffers, the kernel of one beside the matrix products of the next.

A product writes a set's logits on the current stream. The kernel that reads them follows on a second one, while the
current stream goes on with the next set's products. The second stream has priority: a product's blocks would otherwise
all be placed before the kernel's first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Turns:
    """Which of `num_sets` sets of buffers a chunk uses. With one set, and on a CPU, all happens in order.

    Buffers belong to the current stream and must outlive `joined`, which waits for the second one.
    """

    def __init__(self, num_sets: int, device: torch.device) -> None:
        overlapped = num_sets > 1 and device.type == "cuda"
        self._side = torch.cuda.Stream(device, priority=-1) if overlapped else None
        self._read: list[torch.cuda.Event | None] = [None] * num_sets
        """When the kernel that last read each set is done."""

    def take(self, chunk: int) -> int:
        """The set of the chunk with this index, free for the products that the current stream gets next."""
        turn = chunk % len(self._read)
        event = self._read[turn]
        if event is not None:
            event.wait()
        return turn

    @contextmanager
    def beside(self, turn: int) -> Iterator[None]:
        """What is launched inside runs after, but no longer in, the current stream, and reads this set."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            yield
        self._read[turn] = self._side.record_event()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """At its end the current stream waits for all that was launched beside it."""
        try:
            yield
        finally:
            if self._side is not None:
                torch.cuda.current_stream(self._side.device).wait_stream(self._side)
