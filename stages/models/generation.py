"""The rollout engine: completions of prompts with the log-probabilities under which they were drawn.

A fixed number of slots is decoded together; a row that ends makes room for a waiting prompt, so that no batch waits for
its longest row. Completions of one prompt share its prefill. Token t of a row is the inverse CDF of the sampling
distribution at the t-th uniform of the row's own stream: what a row samples depends on its seed and its logits alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, cast

import numpy as np
import torch
from peft import PeftModel
from transformers.modeling_utils import PreTrainedModel

from stages.models.decoding.attention import check_served
from stages.models.decoding.origin import origin_of
from stages.models.decoding.sampling import Sampling
from stages.models.decoding.steps import Decoder, Method, Request
from stages.models.decoding.weights import DecodingWeights
from stages.models.exact import decoder_of
from stages.models.plain_generation import PlainEngine, way_to_write
from stages.models.readout import readout_of
from stages.runtime.errors import UserError

__all__ = ["Completion", "Generate", "Sampling", "generate", "rollout_engine"]

LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between two looks at which rows have ended; on a GPU each look waits for the device."""
REFILL_SHARE = 8
"""A prefill waits until one in so many slots is free: it costs about one step, however few its prompts."""
PLACES = 64
"""Slots hold a multiple of this many K/V places and tokens, so that later calls find them large enough."""


@dataclass(frozen=True)
class Completion:
    """T tokens, EOS included; logprobs and entropies (nats) of the distribution that was really sampled."""

    ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    entropy: np.ndarray  # float32 [T]
    finish_reason: str  # "eos" or "length"


class Generate(Protocol):
    """What an engine is to its callers. See `generate`. `close` gives its memory back; the next call makes it anew."""

    def close(self) -> None: ...

    def __call__(
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
    ) -> list[Completion]: ...


def generate(
    model: PreTrainedModel | PeftModel,
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
    """One completion for each prompt; `seeds` are integers below 2**128, one a row.

    `micro_batch`: most rows decoded together. `forced`: token ids to take instead of drawing, each row's own number, so
    that the engine's own logprobs of a given text can be read. Under autocast products are in its dtype. Errors:
    `UserError` for a model whose attention the engine does not serve.
    """
    with rollout_engine(model) as engine:
        return engine(
            prompts,
            seeds,
            sampling,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            pad_id=pad_id,
            micro_batch=micro_batch,
            forced=forced,
        )


@contextmanager
def rollout_engine(model: PreTrainedModel | PeftModel) -> Iterator[Generate]:
    """`generate` for several calls, between which merged weights, slots and captured steps are kept.

    Outside its calls the model is as it was; its memory is given back at the end. What changes between two calls takes
    effect in the second: weights, however they are written or replaced, their device, and adapters, switched, disabled,
    merged, scaled or loaded. Each call looks for that once, a pass over the weights.
    """
    plain = way_to_write(model)
    if plain is not None and plain.refused:
        raise UserError(plain.refused)
    engine = _Engine(model) if plain is None else _Plain(model, use_cache=plain.use_cache)
    try:
        yield engine
    finally:
        engine.close()


class _Calls:
    """What engines have in common: a call's rows as requests, and rows without a token."""

    def __call__(
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
        limits = [
            sampling.max_new_tokens if forced is None else len(forced[row]) for row in range(len(prompts))
        ]
        requests = [
            Request(row, prompts[row], seeds[row], limits[row], None if forced is None else forced[row])
            for row in range(len(prompts))
        ]
        return self.write(requests, Method(sampling, vocab_size, eos_ids, pad_id), micro_batch)

    def write(self, requests: list[Request], method: Method, num_slots: int) -> list[Completion]:
        """One completion for each request, in the order of their indices, each up to its own limit."""
        nothing = Completion(
            np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32), "length"
        )
        done = {request.index: nothing for request in requests if request.limit == 0}
        requests_left = [request for request in requests if request.limit > 0]
        if requests_left:
            done |= self._written(requests_left, method, num_slots)
        return [done[request.index] for request in requests]

    def _written(self, requests: list[Request], method: Method, num_slots: int) -> dict[int, Completion]:
        raise NotImplementedError


class _Plain(_Calls):
    """transformers' `generate`."""

    def __init__(self, model: PreTrainedModel | PeftModel, use_cache: bool) -> None:
        self._engine = PlainEngine(model, use_cache)

    def close(self) -> None:
        """It keeps nothing."""

    def _written(self, requests: list[Request], method: Method, num_slots: int) -> dict[int, Completion]:
        rows = self._engine.write(requests, method, num_slots)
        return {index: _completion(row, method.eos_ids) for index, row in rows}


class _Engine(_Calls):
    """Keeps between calls what is expensive to make: it is made for the weights and the autocast of the first call."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
        self._weights: DecodingWeights | None = None
        self._decoder: Decoder | None = None
        self._dtype: torch.dtype | None = None
        self._made_for: list[object] = []

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def _written(self, requests: list[Request], method: Method, num_slots: int) -> dict[int, Completion]:
        with self._ready():
            return dict(_write(self._decoder_for(requests, method, num_slots), requests, num_slots))

    def close(self) -> None:
        self._decoder = self._weights = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """No gradients, eval mode, the engine's weights, and autocast without its memory of casts, which graphs outlive."""
        kind, was_training = self.device.type, self.model.training
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        now: list[object] = [dtype, *origin_of(self.base)]
        if self._weights is None or now != self._made_for:
            check_served(self.base, decoder_of(self.base))
            readout_of(self.base)  # measured, where it is not yet, on the model's own layers
            self._weights = self._decoder = None  # their memory first
            self._weights = DecodingWeights(decoder_of(self.base), dtype)
            self._dtype, self._made_for = dtype, now
        self.model.eval()
        try:
            autocast = torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False)
            with torch.no_grad(), autocast, self._weights.swapped():
                yield
        finally:
            self.model.train(was_training)

    def _decoder_for(self, requests: list[Request], method: Method, num_slots: int) -> Decoder:
        """The decoder of the calls before where it is large enough and of the same method, else a new one."""
        places = max(len(request.prompt) + request.limit for request in requests)
        tokens = max(request.limit for request in requests)
        wanted = min(num_slots, len(requests))
        old = self._decoder
        if old is not None and old.method == method:
            if old.num_slots >= wanted and old.num_places >= places and old.num_tokens >= tokens:
                return old
            wanted, places, tokens = (
                max(wanted, old.num_slots),
                max(places, old.num_places),
                max(tokens, old.num_tokens),
            )
        del old
        self._decoder = None  # its memory first
        places, tokens = places + -places % PLACES, tokens + -tokens % PLACES
        self._decoder = Decoder(self.base, method, wanted, places, tokens, self._dtype)
        return self._decoder


def _write(decoder: Decoder, requests: list[Request], num_slots: int) -> Iterator[tuple[int, Completion]]:
    """Fills, steps and empties slots until every request is written: (index, completion) as they end."""
    widest = min(
        num_slots, len(requests)
    )  # by this call alone: what an open engine did before changes no rounding
    decoder.clear(widest)
    rows: dict[int, _Row] = {}  # slot -> its row
    waiting = _groups(requests, widest)
    look_every = LOOK_EVERY[decoder.device.type]
    while waiting or rows:
        free = [slot for slot in range(decoder.width) if slot not in rows]
        placed = _place(waiting, free, rows)
        if placed:
            decoder.fill(placed)
            rows |= {slot: _Row(request) for slot, request in placed}
        num_steps = min(look_every, _steps_to_use(rows, waiting, decoder.width))
        for row in rows.values():
            row.taken = min(row.taken + num_steps, row.request.limit)
        decoder.run(num_steps, max(row.places for row in rows.values()))
        yield from _ended(decoder, rows)
        if rows and not waiting:
            _narrow(decoder, rows, widest)


@dataclass
class _Row:
    """What the host knows of a slot without asking the device: an upper bound of its row's tokens."""

    request: Request
    taken: int = 1

    @property
    def remaining(self) -> int:
        return self.request.limit - self.taken

    @property
    def places(self) -> int:
        return len(self.request.prompt) + self.taken - 1


def _groups(requests: list[Request], num_slots: int) -> deque[list[Request]]:
    """Requests in turn, neighbours of one prompt together, at most `num_slots` in a group."""
    groups: deque[list[Request]] = deque()
    for _, same in groupby(requests, key=lambda request: request.prompt.tobytes()):
        group = list(same)
        groups.extend(group[start : start + num_slots] for start in range(0, len(group), num_slots))
    return groups


def _place(
    waiting: deque[list[Request]], free: list[int], rows: dict[int, _Row]
) -> list[tuple[int, Request]]:
    """Whole groups for the free slots, once they are worth a prefill."""
    if rows and len(free) < _worth_a_prefill(len(free) + len(rows)):
        return []
    placed: list[tuple[int, Request]] = []
    while waiting and len(waiting[0]) <= len(free) - len(placed):
        group = waiting.popleft()
        placed += zip(free[len(placed) :], group, strict=False)
    return placed


def _worth_a_prefill(num_slots: int) -> int:
    return -(-num_slots // REFILL_SHARE)


def _steps_to_use(rows: dict[int, _Row], waiting: deque[list[Request]], width: int) -> int:
    """Steps after which, by their limits alone, enough rows have ended for a refill, or for half as many slots."""
    if waiting:
        wanted = max(len(waiting[0]), _worth_a_prefill(width)) - (width - len(rows))
    else:
        wanted = len(rows) - -(-width // 2)
    remaining = sorted(row.remaining for row in rows.values())
    return remaining[max(1, min(wanted, len(rows))) - 1]


def _ended(decoder: Decoder, rows: dict[int, _Row]) -> Iterator[tuple[int, Completion]]:
    live = decoder.live()
    slots = [slot for slot in rows if not live[slot]]
    if not slots:
        return
    for slot, row in zip(slots, decoder.take(slots), strict=True):
        yield rows.pop(slot).request.index, _completion(row, decoder.method.eos_ids)


def _completion(row: tuple[np.ndarray, np.ndarray, np.ndarray], eos_ids: tuple[int, ...]) -> Completion:
    return Completion(*row, "eos" if row[0][-1] in eos_ids else "length")


def _narrow(decoder: Decoder, rows: dict[int, _Row], widest: int) -> None:
    """The least of widest, widest / 2, / 4 ... slots that holds the live rows."""
    width = widest
    while width > 1 and -(-width // 2) >= len(rows):
        width = -(-width // 2)
    if width >= decoder.width:
        return
    free = [slot for slot in range(width) if slot not in rows]
    moves = dict(zip([slot for slot in rows if slot >= width], free, strict=False))
    decoder.narrow(width, moves, max(row.places for row in rows.values()))
    for source, target in moves.items():
        rows[target] = rows.pop(source)
