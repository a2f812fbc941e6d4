"""Write shards while the next forward runs: asynchronous copies to the host, and a writer thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import Queue
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

import cache

JOBS_AHEAD, BYTES_AHEAD = 2, 512 * 2**20
"""Scored batches that may wait for the thread: so many, or more of them if they take no more bytes."""


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A CPU copy; bfloat16, which numpy lacks, as uint16 bit patterns."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


class HostCopy:
    """Asynchronous copies of tensors to host memory: on CUDA through pinned buffers, with a single event."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._host = {name: _start_copy(tensor.detach()) for name, tensor in tensors.items()}
        self.num_bytes = sum(tensor.nbytes for tensor in self._host.values())
        self._event: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Block until all copies are complete."""
        if self._event is not None:
            self._event.synchronize()

    def arrays(self) -> dict[str, np.ndarray]:
        """The copied tensors, converted by `to_numpy`."""
        self.wait()
        return {name: to_numpy(tensor) for name, tensor in self._host.items()}


def _start_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class UnitWriter:
    """Encodes, appends and commits in its own thread, in call order, a limited number of calls behind.

    A context manager. An error in the thread is raised by the next call or at the end of the block, and
    nothing is written after it. An exception in the block drops jobs not yet started; leaving the block
    always waits for the thread. The `cache.Writer` belongs to the thread until then.
    """

    def __init__(self, writer: cache.Writer) -> None:
        self._writer = writer
        self._jobs: Queue[tuple[Callable[[], object], int] | None] = Queue()
        self._room, self._num_waiting, self._num_bytes = threading.Condition(), 0, 0
        self._error: BaseException | None = None
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="unit-writer", daemon=True)

    def append(self, rows: Iterable[cache.Record], num_bytes: int = BYTES_AHEAD) -> None:
        """Append rows; the thread consumes them one by one. `num_bytes`: the memory that they hold."""

        def job() -> None:
            for row in rows:
                self._writer.append(row)

        self._put(job, num_bytes)

    def commit(self, unit: str) -> None:
        """Commit, under this name, the rows appended since the previous commit."""
        self._put(lambda: self._writer.commit(unit), 0)

    def drain(self) -> None:
        """Wait until all queued work is done."""
        self._jobs.join()
        self._raise()

    def _put(self, job: Callable[[], object], num_bytes: int) -> None:
        self._raise()
        with self._room:
            self._room.wait_for(
                lambda: self._num_waiting < JOBS_AHEAD or self._num_bytes + num_bytes <= BYTES_AHEAD
            )
            self._num_waiting, self._num_bytes = self._num_waiting + 1, self._num_bytes + num_bytes
        self._jobs.put((job, num_bytes))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (found := self._jobs.get()) is not None:
            job, num_bytes = found
            self._give_room(waiting=1)
            try:
                if self._error is None and not self._given_up:
                    job()
            except BaseException as error:  # raised again in the caller
                self._error = error
            finally:
                del job, found  # frees the batch
                self._give_room(num_bytes=num_bytes)
                self._jobs.task_done()

    def _give_room(self, *, waiting: int = 0, num_bytes: int = 0) -> None:
        with self._room:
            self._num_waiting, self._num_bytes = self._num_waiting - waiting, self._num_bytes - num_bytes
            self._room.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up = kind is not None
        self._jobs.put(None)
        self._thread.join()
        if kind is None:
            self._raise()
