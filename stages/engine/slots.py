"""Slots: K/V and state of the rows decoded together, all on the device.

A free slot, or one whose row has ended, takes part in every step with one attended key; its output goes to
a scratch column. Only `SlotState.completions` waits for the device.

Shape suffixes: B slots, H K/V heads, S places of a slot, D width of a head, T longest completion.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from stages.engine.protocol import Completion, Request
from stages.engine.sampling import Chosen


class SlotCache(Cache):
    """K and V of every layer, [B, H, S, D]; each row writes at its own place.

    `attended` is the number of keys each row sees in this step; `longest` is its upper bound on the host, for
    slices on the CPU.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__(layers=[])
        self.keys, self.values = keys, values
        self.places: Int[Tensor, " B"] | None = None
        self.attended: Int[Tensor, " B"] | None = None
        self.longest = keys[0].shape[2]
        self.num_attended_layers = 0
        self.masks: dict[int | None, Tensor] = {}

    def first(self, width: int) -> SlotCache:
        """The first `width` slots, sharing memory."""
        return SlotCache([k[:width] for k in self.keys], [v[:width] for v in self.values])

    def begin_step(self, places: Int[Tensor, " B"], active: Bool[Tensor, " B"]) -> None:
        """Set the place of the step's K and V and the number of keys each row sees: one in a dead slot."""
        self.places = places
        self.attended = torch.where(active, places + 1, 1).to(torch.int32)
        self.num_attended_layers = 0
        self.masks.clear()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store [B, H, 1, D]. Returns all places of all slots, as transformers' attention modules expect."""
        assert self.places is not None
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if keys.is_cuda:
            from stages.engine import kernels

            kernels.store(key_states, value_states, keys, values, self.places)
        else:
            rows = torch.arange(len(keys))
            keys[rows, :, self.places] = key_states.squeeze(2).to(keys.dtype)
            values[rows, :, self.places] = value_states.squeeze(2).to(values.dtype)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.longest

    def fill(
        self, slots: Int[Tensor, " R"], source: Int[Tensor, " R"], keys: list[Tensor], values: list[Tensor]
    ) -> None:
        """Copy rows `source` of a prefill's K and V [U, H, P, D] of each layer to the start of `slots`."""
        for own, new in zip([*self.keys, *self.values], [*keys, *values], strict=True):
            own[:, :, : new.shape[2]].index_copy_(0, slots, new.index_select(0, source).to(own.dtype))

    def move(self, source: Int[Tensor, " R"], target: Int[Tensor, " R"]) -> None:
        for own in (*self.keys, *self.values):
            used = own[:, :, : self.longest]
            used.index_copy_(0, target, used.index_select(0, source))


@dataclass
class SlotState:
    """State of each slot's row. The last column of `ids`, `logprobs` and `entropy` is for dead slots."""

    token: Int[Tensor, " B"]  # last sampled; the next input
    length: Int[Tensor, " B"]  # filled places, and the position of `token`
    taken: Int[Tensor, " B"]  # tokens of the completion so far
    limit: Int[Tensor, " B"]
    active: Bool[Tensor, " B"]
    uniforms: Float[Tensor, "B T"]  # float64
    forced: Int[Tensor, "B T"]  # -1: sample
    ids: Int[Tensor, "B T+1"]
    logprobs: Float[Tensor, "B T+1"]
    entropy: Float[Tensor, "B T+1"]

    @classmethod
    def empty(cls, slots: int, tokens: int, device: torch.device) -> SlotState:
        def zeros(*width: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros((slots, *width), dtype=dtype, device=device)

        return cls(
            token=zeros(),
            length=zeros(),
            taken=zeros(),
            limit=zeros(),
            active=zeros(dtype=torch.bool),
            uniforms=zeros(tokens, dtype=torch.float64),
            forced=zeros(tokens) - 1,
            ids=zeros(tokens + 1),
            logprobs=zeros(tokens + 1, dtype=torch.float32),
            entropy=zeros(tokens + 1, dtype=torch.float32),
        )

    @classmethod
    def starting(cls, requests: list[Request], num_tokens: int) -> SlotState:
        """State of new requests before their first token, on the host, one slot each."""
        state = cls.empty(len(requests), num_tokens, torch.device("cpu"))
        for row, request in enumerate(requests):
            uniforms = np.random.Generator(np.random.Philox(key=request.seed)).random(request.limit)
            state.uniforms[row, : request.limit] = torch.from_numpy(uniforms)
            if request.forced is not None:
                state.forced[row, : request.limit] = torch.from_numpy(request.forced.astype(np.int64))
        state.length = torch.tensor([len(request.prompt) for request in requests])
        state.limit = torch.tensor([request.limit for request in requests])
        state.active.fill_(True)
        return state

    def first(self, width: int) -> SlotState:
        """The first `width` slots, sharing memory."""
        return SlotState(*(tensor[:width] for tensor in self._tensors()))

    def to(self, device: torch.device) -> SlotState:
        return SlotState(*(tensor.to(device) for tensor in self._tensors()))

    def put(self, slots: Int[Tensor, " R"], rows: SlotState) -> None:
        for own, new in zip(self._tensors(), rows._tensors(), strict=True):
            own.index_copy_(0, slots, new)

    def move(self, source: Int[Tensor, " R"], target: Int[Tensor, " R"]) -> None:
        for own in self._tensors():
            own.index_copy_(0, target, own.index_select(0, source))
        self.active[source] = False

    def next_inputs(self) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
        """The uniform and the forced id of each row's next token."""
        column = self.taken.clamp(max=self.forced.shape[1] - 1)[:, None]
        return self.uniforms.gather(1, column).squeeze(1), self.forced.gather(1, column).squeeze(1)

    def record(self, chosen: Chosen, eos_ids: Int[Tensor, " E"]) -> None:
        """Write each live row's token. Rows end at their limit or an EOS, which is kept: it was sampled."""
        column = torch.where(self.active, self.taken, self.ids.shape[1] - 1)[:, None]
        self.ids.scatter_(1, column, chosen.token[:, None])
        self.logprobs.scatter_(1, column, chosen.logprob[:, None])
        self.entropy.scatter_(1, column, chosen.entropy[:, None])
        self.token.copy_(torch.where(self.active, chosen.token, self.token))
        self.taken += self.active
        self.active &= (self.taken < self.limit) & (chosen.token[:, None] != eos_ids).all(1)

    def completions(self, slots: list[int], eos_ids: tuple[int, ...]) -> list[Completion]:
        """The completions in these slots. Waits for the device."""
        index = torch.tensor(slots, device=self.ids.device)
        columns = (self.ids.int(), self.logprobs, self.entropy)
        ids, logprobs, entropy = (column.index_select(0, index).cpu().numpy() for column in columns)
        found = []
        for row, length in enumerate(self.taken.index_select(0, index).tolist()):
            part = row, slice(length)
            end = "eos" if ids[row, length - 1] in eos_ids else "length"
            found.append(Completion(ids[part].copy(), logprobs[part].copy(), entropy[part].copy(), end))
        return found

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]
