"""Prefill and decode steps over slots. On CUDA each width's step is captured once, then replayed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from stages.engine.protocol import Request, Sampling
from stages.engine.sampler import Sampler
from stages.engine.slot_attention import check_attended, slot_attention
from stages.engine.slots import SlotCache, SlotState
from stages.models.readout import decoder_of
from stages.runtime.errors import UserError

PREFILL_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Maximum prompt tokens per prefill, by device; a longer prompt is prefilled alone."""


class Decoder:
    """Decodes in `num_slots` slots of `num_places` K/V places; completions have at most `num_tokens` tokens.

    `fill` prefills prompts into slots and samples their first tokens, `run` takes steps, `live` tells which
    rows continue, `narrow` moves them into fewer slots. Callers enter no_grad, autocast and eval mode first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        num_slots: int,
        num_places: int,
        num_tokens: int,
        compute_dtype: torch.dtype | None,
    ) -> None:
        """`compute_dtype`: autocast's dtype, None without autocast."""
        self.model, self.decoder, self.sampling = model, decoder_of(model), sampling
        self.num_slots, self.num_places, self.num_tokens = num_slots, num_places, num_tokens
        self.device = next(model.parameters()).device
        self.state = SlotState.empty(num_slots, num_tokens, self.device)
        self.width = num_slots
        self._compute_dtype = compute_dtype
        self.sampler = Sampler(model, sampling, self.device)
        self._cache: SlotCache | None = None
        self._views: dict[int, tuple[SlotState, SlotCache]] = {}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by width
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def run(self, num_steps: int, longest: int) -> None:
        """Take steps in the first `width` slots; the fullest live row then fills `longest` places."""
        assert self._cache is not None
        for step in range(num_steps):
            if self.device.type == "cuda":
                self._graph(self.width).replay()
            else:
                self._cache.longest = longest - num_steps + step + 1
                self._step(self.width)

    def _step(self, width: int) -> None:
        assert self._cache is not None
        if width not in self._views:
            self._views[width] = self.state.first(width), self._cache.first(width)
        state, slots = self._views[width]
        slots.longest = self._cache.longest
        slots.begin_step(state.length, state.active)
        with slot_attention(self.decoder.config):
            output = self.decoder(
                input_ids=state.token[:, None],
                position_ids=state.length[:, None],
                past_key_values=slots,
                use_cache=True,
                slots=slots,
            )
        check_attended(self.decoder, slots)
        state.length += state.active
        self.sampler.draw(state, output.last_hidden_state[:, -1])

    def _graph(self, width: int) -> torch.cuda.CUDAGraph:
        """The captured step. Warm-up and capture run without live rows and change none."""
        if width in self.graphs:
            return self.graphs[width]
        live = self.state.active.clone()
        self.state.active.zero_()
        stream, graph = _capture_stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(width)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        with (
            _refusals_explained(self.model),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._step(width)
        self.state.active.copy_(live)
        self.graphs[width] = graph
        return graph

    def clear(self, width: int) -> None:
        """Free all slots, including those left by an interrupted call; use the first `width` from now on."""
        self.width = width
        self.state.active.zero_()

    def fill(self, placed: list[tuple[int, Request]]) -> None:
        """Prefill the prompts into their slots, equal prompts once, and sample the first tokens."""
        prompts: dict[bytes, list[tuple[int, Request]]] = {}
        for slot, request in placed:
            prompts.setdefault(request.prompt.tobytes(), []).append((slot, request))
        groups = sorted(prompts.values(), key=lambda group: -len(group[0][1].prompt))
        size = max(1, PREFILL_TOKENS[self.device.type] // len(groups[0][0][1].prompt))
        for start in range(0, len(groups), size):
            self._prefill(groups[start : start + size])

    def _prefill(self, groups: list[list[tuple[int, Request]]]) -> None:
        """One right-padded forward without a mask: causal attention never sees the padding after a prompt."""
        prompts = [group[0][1].prompt for group in groups]
        rows = [(place, slot, request) for place, group in enumerate(groups) for slot, request in group]
        # Host-to-device copies come first: each waits for all earlier launches.
        state = SlotState.starting([request for _, _, request in rows], self.num_tokens).to(self.device)
        ids = pad_sequence(
            [torch.from_numpy(prompt.astype(np.int64)) for prompt in prompts],
            batch_first=True,
            padding_value=0,
        ).to(self.device)
        ends = self._whole([len(prompt) - 1 for prompt in prompts])
        source = self._whole([place for place, _, _ in rows])
        slots = self._whole([slot for _, slot, _ in rows])
        cache = DynamicCache()
        output = self.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        last = output.last_hidden_state[torch.arange(len(prompts), device=self.device), ends]
        layers: list[Any] = cache.layers  # all attention layers: see `check_served`
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self._allocate(keys, values).fill(slots, source, keys, values)
        self.sampler.draw(state, last[source])
        self.state.put(slots, state)

    def _whole(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)

    def _allocate(self, keys: list[Tensor], values: list[Tensor]) -> SlotCache:
        """Slots shaped like a prefill's K and V. Zero-filled: a masked NaN would still turn sums into NaN."""
        if self._cache is None:

            def slots(like: Tensor) -> Tensor:
                shape = (self.num_slots, like.shape[1], self.num_places, like.shape[3])
                return torch.zeros(shape, dtype=self._compute_dtype or like.dtype, device=self.device)

            self._cache = SlotCache([slots(k) for k in keys], [slots(v) for v in values])
        return self._cache

    def live(self) -> np.ndarray:
        """Which of the first `width` slots hold a row that has not ended. Waits for the device."""
        return self.state.active[: self.width].cpu().numpy()

    def narrow(self, width: int, moves: dict[int, int], longest: int) -> None:
        """Continue with `width` slots. `moves`: live rows' slots at or above `width` to free ones below."""
        assert self._cache is not None
        self.width = width
        if moves:
            source, target = self._whole(list(moves)), self._whole(list(moves.values()))
            self._cache.longest = longest
            self._cache.move(source, target)
            self.state.move(source, target)


def plain_steps_logprobs(
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    completions: list[np.ndarray],
    head: Callable[[Tensor], Tensor],
) -> list[np.ndarray]:
    """Logprobs of given completions from uncaptured steps over slots, using the model's layers in float32.

    Callers enter `in_float32` first. `head`: states [B, d] to logits [B, V].
    """
    pairs = zip(prompts, completions, strict=True)
    requests = [Request(prompt, len(forced), forced=forced) for prompt, forced in pairs]
    longest = max(request.limit for request in requests)
    places = longest + max(map(len, prompts))
    vocabulary = model.config.get_text_config().vocab_size
    decoder = Decoder(model, Sampling(vocabulary), len(requests), places, longest, torch.float32)

    def logits(hidden: Tensor) -> Tensor:
        return head(hidden)[:, :vocabulary].contiguous()

    decoder.sampler.logits = logits  # type: ignore[method-assign]
    decoder.clear(len(requests))
    decoder.fill(list(enumerate(requests)))
    for step in range(1, longest):
        decoder._cache.longest = step + max(map(len, prompts))  # type: ignore[union-attr]
        decoder._step(len(requests))
    written = decoder.state.completions(list(range(len(requests))), ())
    return [completion.logprobs for completion in written]


@contextmanager
def _refusals_explained(model: PreTrainedModel) -> Iterator[None]:
    """Raise UserError if CUDA refuses the capture: warm-up succeeded, so the model's forward is the cause."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__ or error  # ending a failed capture raises again
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise UserError(
            f"a decode step of {type(model).__name__} cannot be captured in a CUDA graph ({reason}): its"
            " forward waits for the GPU, or copies from the host. On a CPU steps run without capture: write"
            " its rollouts with `dualkl rollout --role generate --device cpu`, or choose a"
            " student_model of another class."
        ) from error


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The only capture stream of the process: the matrix library keeps a workspace for every stream."""
    return torch.cuda.Stream(device)
