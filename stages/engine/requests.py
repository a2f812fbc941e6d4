"""An engine call split into requests, one per completion; used by the engines of this package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from stages.engine.protocol import Completion, Sampling

Row = tuple[np.ndarray, np.ndarray, np.ndarray]
"""A finished completion: token ids (int32, including EOS), logprobs and entropies (float32)."""


@dataclass(frozen=True, eq=False)
class Request:
    """One completion of 1 to `limit` tokens. `index`: its place in the call. `forced`: ids to take."""

    index: int
    prompt: np.ndarray
    seed: int
    limit: int
    forced: np.ndarray | None = None


@dataclass(frozen=True)
class Method:
    """Settings shared by all requests of a call; a captured step is specific to them."""

    sampling: Sampling
    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int


class RequestEngine(ABC):
    """Implements `Engine.generate` for engines that implement `_write`."""

    def generate(
        self,
        prompts: list[np.ndarray],
        seeds: list[int],
        sampling: Sampling,
        *,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        pad_id: int,
        micro_batch: int,
        forced: list[np.ndarray] | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`."""
        texts: list[np.ndarray | None] = [*forced] if forced else [None] * len(prompts)
        limits = [sampling.max_new_tokens if text is None else len(text) for text in texts]
        rows = zip(range(len(prompts)), prompts, seeds, limits, texts, strict=True)
        requests = [request for row in rows if (request := Request(*row)).limit]
        empty = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)
        written: dict[int, Row] = {}
        if requests:
            method = Method(sampling, vocab_size, eos_ids, pad_id)
            written = self._write(requests, method, min(micro_batch, len(requests)))
        found = [written.get(index, empty) for index in range(len(prompts))]
        return [Completion(*row, _finish_reason(row[0], eos_ids)) for row in found]

    @abstractmethod
    def _write(self, requests: list[Request], method: Method, num_rows: int) -> dict[int, Row]:
        """Each request's row by its index; at most `num_rows` are decoded together."""


def _finish_reason(ids: np.ndarray, eos_ids: tuple[int, ...]) -> str:
    return "eos" if len(ids) and ids[-1] in eos_ids else "length"
