"""The built-in engine: a fixed number of slots decoded together.

A row that ends makes room for a waiting prompt: no batch waits for its longest row. Completions of one
prompt share its prefill. Token t of a row is the inverse CDF of the sampling distribution at the t-th
uniform of the row's own stream: a row depends only on its seed and its logits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from peft import PeftModel
from transformers.modeling_utils import PreTrainedModel

from stages.engine.decoder import Decoder
from stages.engine.origin import origin_of
from stages.engine.protocol import Completion, Request, Sampling
from stages.engine.slot_attention import check_served
from stages.engine.weights import DecodingWeights
from stages.models.dropout import evaluating
from stages.models.readout import base_of, decoder_of, readout_of

LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between checks for ended rows, by device; on a GPU each check waits for the device."""
REFILL_SHARE = 8
"""Prefill waits until one slot in this many is free: even with few prompts it costs about one step."""
PLACES = 64
"""K/V places and tokens of a slot are rounded up to a multiple of this; later calls may then fit too."""


class BuiltInEngine:
    """Generates with the model's own modules.

    Keeps merged weights, slots and captured steps between calls. Each call reads the weights once to detect
    changes to them, their device or the adapters, and rebuilds if needed. Between calls the model is
    untouched. Raises UserError if it does not support the model's attention.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.base = base_of(model)
        self._weights: DecodingWeights | None = None
        self._decoder: Decoder | None = None
        self._dtype: torch.dtype | None = None
        self._made_for: list[object] = []

    def close(self) -> None:
        """See `Engine.close`."""
        self._decoder = self._weights = None
        if next(self.base.parameters()).is_cuda:
            torch.cuda.empty_cache()

    def generate(self, requests: list[Request], sampling: Sampling, num_slots: int) -> list[Completion]:
        """See `Engine.generate`."""
        if not requests:
            return []
        num_slots = min(num_slots, len(requests))
        with self._ready():
            return _decode(self._decoder_for(requests, sampling, num_slots), requests, num_slots)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Eval mode, no gradients, the engine's weights, no autocast cast cache (graphs would outlive it)."""
        kind = next(self.base.parameters()).device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        now: list[object] = [dtype, *origin_of(self.base)]
        if self._weights is None or now != self._made_for:
            check_served(self.base, decoder_of(self.base))
            readout_of(self.base)  # if still unknown, measured on the model's own layers
            self._weights = self._decoder = None  # frees their memory first
            self._weights = DecodingWeights(decoder_of(self.base), dtype)
            self._dtype, self._made_for = dtype, now
        autocast = torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False)
        with evaluating(self.model), torch.no_grad(), autocast, self._weights.swapped():
            yield

    def _decoder_for(self, requests: list[Request], sampling: Sampling, num_slots: int) -> Decoder:
        """The last call's decoder if it samples alike and is large enough, else a new one."""
        places = max(len(request.prompt) + request.limit for request in requests)
        wanted = num_slots, places, max(request.limit for request in requests)
        old = self._decoder
        if old is not None and old.sampling == sampling:
            sizes = old.num_slots, old.num_places, old.num_tokens
            if all(size >= least for size, least in zip(sizes, wanted, strict=True)):
                return old
            wanted = max(wanted[0], sizes[0]), max(wanted[1], sizes[1]), max(wanted[2], sizes[2])
        del old
        self._decoder = None  # frees its memory first
        num_slots, places, tokens = wanted
        places, tokens = places + -places % PLACES, tokens + -tokens % PLACES
        self._decoder = Decoder(self.base, sampling, num_slots, places, tokens, self._dtype)
        return self._decoder


@dataclass
class _Live:
    """Host-side state of a slot, kept without device syncs. `taken`: an upper bound on the row's tokens."""

    index: int  # of the request
    request: Request
    taken: int = 1

    @property
    def remaining(self) -> int:
        return self.request.limit - self.taken

    @property
    def places(self) -> int:
        return len(self.request.prompt) + self.taken - 1


def _decode(decoder: Decoder, requests: list[Request], widest: int) -> list[Completion]:
    """Fill, step and empty at most `widest` slots until every request is done."""
    decoder.clear(widest)  # independent of earlier calls, which must not change the rounding
    rows: dict[int, _Live] = {}  # by slot
    waiting, written = _groups(requests, widest), dict[int, Completion]()
    while waiting or rows:
        if placed := _place(waiting, [slot for slot in range(decoder.width) if slot not in rows], rows):
            decoder.fill([(slot, row.request) for slot, row in placed])
            rows |= dict(placed)
        num_steps = min(LOOK_EVERY[decoder.device.type], _useful_steps(rows, waiting, decoder.width))
        for row in rows.values():
            row.taken = min(row.taken + num_steps, row.request.limit)
        decoder.run(num_steps, max(row.places for row in rows.values()))
        live = decoder.live()
        if ended := [slot for slot in rows if not live[slot]]:
            found = decoder.state.completions(ended, decoder.sampling.eos_ids)
            written |= {rows.pop(slot).index: row for slot, row in zip(ended, found, strict=True)}
        if rows and not waiting:
            _narrow(decoder, rows, widest)
    return [written[index] for index in range(len(requests))]


def _groups(requests: list[Request], num_slots: int) -> deque[list[_Live]]:
    """The requests in order, with consecutive equal prompts grouped, at most `num_slots` per group."""
    groups: deque[list[_Live]] = deque()
    rows = [_Live(index, request) for index, request in enumerate(requests)]
    for _, same in groupby(rows, key=lambda row: row.request.prompt.tobytes()):
        group = list(same)
        groups.extend(group[start : start + num_slots] for start in range(0, len(group), num_slots))
    return groups


def _place(waiting: deque[list[_Live]], free: list[int], rows: dict[int, _Live]) -> list[tuple[int, _Live]]:
    """Whole groups for the free slots, once enough are free for a prefill."""
    if rows and len(free) < _worth_a_prefill(len(free) + len(rows)):
        return []
    placed: list[tuple[int, _Live]] = []
    while waiting and len(waiting[0]) <= len(free) - len(placed):
        placed += zip(free[len(placed) :], waiting.popleft(), strict=False)
    return placed


def _worth_a_prefill(num_slots: int) -> int:
    return -(-num_slots // REFILL_SHARE)


def _useful_steps(rows: dict[int, _Live], waiting: deque[list[_Live]], width: int) -> int:
    """Steps until enough rows reach their limits for a refill or to halve the slots."""
    if waiting:
        wanted = max(len(waiting[0]), _worth_a_prefill(width)) - (width - len(rows))
    else:
        wanted = len(rows) - -(-width // 2)
    remaining = sorted(row.remaining for row in rows.values())
    return remaining[max(1, min(wanted, len(rows))) - 1]


def _narrow(decoder: Decoder, rows: dict[int, _Live], widest: int) -> None:
    """Shrink to the fewest of widest, widest / 2, / 4 ... slots that hold the live rows."""
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
