"""Prefill and decode steps over slots. On CUDA a step is captured once for each width and replayed without the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from dualkl.heads import PreparedHead, prepare_head
from stages.models import checkpoints
from stages.models.decoding.attention import check_attended, slot_attention
from stages.models.decoding.sampling import Sampling, choose
from stages.models.decoding.slots import Progress, SlotCache
from stages.models.exact import decoder_of
from stages.runtime.errors import UserError

PREFILL_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Of the prompts that are read at once; a longer one alone."""


@dataclass(frozen=True, eq=False)
class Request:
    """One completion to write: where it goes, what it continues, how long it may get. `forced`: ids to take, not draw."""

    index: int
    prompt: np.ndarray
    seed: int
    limit: int
    forced: np.ndarray | None = None


@dataclass(frozen=True)
class Method:
    """What a captured step has fixed: the sampling, the vocabulary cut, where completions end."""

    sampling: Sampling
    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int


class Decoder:
    """A model over `num_slots` slots of `num_places` K/V places, for completions of at most `num_tokens` tokens.

    `fill` prefills prompts into slots and draws their first tokens, `run` takes steps, `live` and `take` read what
    is done, `narrow` moves the live rows together. The caller has entered no_grad, autocast and eval mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        num_slots: int,
        num_places: int,
        num_tokens: int,
        compute_dtype: torch.dtype | None,
    ) -> None:
        """`compute_dtype`: what autocast multiplies in, None without autocast."""
        self.model, self.decoder, self.method = model, decoder_of(model), method
        self.num_slots, self.num_places, self.num_tokens = num_slots, num_places, num_tokens
        self.device = next(model.parameters()).device
        self.progress = Progress.empty(num_slots, num_tokens, self.device)
        self.width = num_slots
        self._compute_dtype = compute_dtype
        self._eos = torch.tensor(method.eos_ids, dtype=torch.long, device=self.device)
        self._head: PreparedHead | None = None
        self._cache: SlotCache | None = None
        self._views: dict[int, tuple[Progress, SlotCache]] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    # --- steps

    def run(self, num_steps: int, longest: int) -> None:
        """Takes steps in the first `width` slots. `longest`: places filled in the fullest live row after them."""
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
            self._views[width] = self.progress.first(width), self._cache.first(width)
        progress, slots = self._views[width]
        slots.longest = self._cache.longest
        slots.begin_step(progress.length, progress.active)
        with slot_attention(self.decoder.config):
            output = self.decoder(
                input_ids=progress.token[:, None],
                position_ids=progress.length[:, None],
                past_key_values=slots,
                use_cache=True,
                slots=slots,
            )
        check_attended(self.decoder, slots)
        progress.length += progress.active
        self._draw(progress, output.last_hidden_state[:, -1])

    def _graph(self, width: int) -> torch.cuda.CUDAGraph:
        """The captured step. Warm-up and capture run with no live row, so that they change nothing that counts."""
        if width in self._graphs:
            return self._graphs[width]
        live = self.progress.active.clone()
        self.progress.active.zero_()
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
        self.progress.active.copy_(live)
        self._graphs[width] = graph
        return graph

    def _draw(self, progress: Progress, hidden: Float[Tensor, "B d"]) -> None:
        uniforms, forced = progress.next_inputs()
        progress.record(choose(self._logits(hidden), uniforms, forced, self.method.sampling), self._eos)

    def _logits(self, hidden: Float[Tensor, "B d"]) -> Float[Tensor, "B V"]:
        """float32 and unrounded, as in the loss: rounded to bfloat16, logits near 25 move by up to 1/16 nat."""
        hidden = hidden.to(self._compute_dtype or hidden.dtype)
        with torch.autocast(self.device.type, enabled=False):
            if self._head is None:  # the dtype of its products is that of the hidden states
                head = checkpoints.head_of(self.model)
                self._head = prepare_head(head, hidden, len(head.weight))
            return self._head.logits(hidden.to(self._head.weight_Vd.dtype))[:, : self.method.vocab_size]

    # --- rows in and out

    def clear(self, width: int) -> None:
        """All slots free, the first `width` in use: whatever an interrupted call has left."""
        self.width = width
        self.progress.active.zero_()

    def fill(self, placed: list[tuple[int, Request]]) -> None:
        """Prefills the requests' prompts, equal ones once, into their slots and draws the first tokens."""
        prompts: dict[bytes, list[tuple[int, Request]]] = {}
        for slot, request in placed:
            prompts.setdefault(request.prompt.tobytes(), []).append((slot, request))
        groups = sorted(prompts.values(), key=lambda group: -len(group[0][1].prompt))
        size = max(1, PREFILL_TOKENS[self.device.type] // len(groups[0][0][1].prompt))
        for start in range(0, len(groups), size):
            self._prefill(groups[start : start + size])

    def _prefill(self, groups: list[list[tuple[int, Request]]]) -> None:
        """One right-padded forward: causal attention never looks at padding behind it, so that no mask is needed."""
        prompts = [group[0][1].prompt for group in groups]
        rows = [(place, slot, request) for place, group in enumerate(groups) for slot, request in group]
        # First all that the device must be handed: such a copy waits for what was launched before it.
        progress = newcomers([request for _, _, request in rows], self.num_tokens).to(self.device)
        ids = _right_padded(prompts, max(map(len, prompts)), self.method.pad_id).to(self.device)
        ends = self._whole([len(prompt) - 1 for prompt in prompts])
        source, slots = (
            self._whole([place for place, _, _ in rows]),
            self._whole([slot for _, slot, _ in rows]),
        )
        cache = DynamicCache()
        output = self.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        last = output.last_hidden_state[torch.arange(len(prompts), device=self.device), ends]
        layers: list[Any] = cache.layers  # of attention, which `check_served` has seen to
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        self._allocate(keys, values).fill(slots, source, keys, values)
        self._draw(progress, last[source])
        self.progress.put(slots, progress)

    def _whole(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)

    def _allocate(self, keys: list[Tensor], values: list[Tensor]) -> SlotCache:
        """The slots' K and V, shaped like a prefill's; zeros, since a masked NaN would still spoil a sum."""
        if self._cache is None:

            def slots(like: Tensor) -> Tensor:
                shape = (self.num_slots, like.shape[1], self.num_places, like.shape[3])
                return torch.zeros(shape, dtype=self._compute_dtype or like.dtype, device=self.device)

            self._cache = SlotCache([slots(k) for k in keys], [slots(v) for v in values])
        return self._cache

    def live(self) -> np.ndarray:
        """Which of the first `width` slots hold a row that has not ended. Waits for the device."""
        return self.progress.active[: self.width].cpu().numpy()

    def take(self, slots: list[int]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids int32, logprobs, entropy) of the rows in these slots. Waits for the device."""
        index = self._whole(slots)
        columns = (self.progress.ids.int(), self.progress.logprobs, self.progress.entropy)
        ids, logprobs, entropy = (column.index_select(0, index).cpu().numpy() for column in columns)
        lengths = self.progress.taken.index_select(0, index).tolist()
        return [
            (ids[i, :n].copy(), logprobs[i, :n].copy(), entropy[i, :n].copy()) for i, n in enumerate(lengths)
        ]

    def narrow(self, width: int, moves: dict[int, int], longest: int) -> None:
        """Goes on with fewer slots, after moving rows: slot -> free slot below `width`."""
        assert self._cache is not None
        self.width = width
        if moves:
            source, target = self._whole(list(moves)), self._whole(list(moves.values()))
            self._cache.longest = longest
            self._cache.move(source, target)
            self.progress.move(source, target)


def newcomers(requests: list[Request], num_tokens: int) -> Progress:
    """Rows before their first token, as slots of their own, on the host."""
    progress = Progress.empty(len(requests), num_tokens, torch.device("cpu"))
    for row, request in enumerate(requests):
        uniforms = np.random.Generator(np.random.Philox(key=request.seed)).random(request.limit)
        progress.uniforms[row, : request.limit] = torch.from_numpy(uniforms)
        if request.forced is not None:
            progress.forced[row, : request.limit] = torch.from_numpy(request.forced.astype(np.int64))
    progress.length = torch.tensor([len(request.prompt) for request in requests])
    progress.limit = torch.tensor([request.limit for request in requests])
    progress.active.fill_(True)
    return progress


def forced_logprobs(
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    completions: list[np.ndarray],
    head: Callable[[Tensor], Tensor],
) -> list[np.ndarray]:
    """What a decoder over slots gives the tokens of given completions, in float32, by the model's own layers.

    Steps are not captured; the caller has entered `exact.in_float32`. `head`: states [B, d] to logits [B, V].
    """
    longest = max(map(len, completions))
    places = longest + max(map(len, prompts))
    vocabulary = model.config.get_text_config().vocab_size
    decoder = Decoder(
        model, Method(Sampling(longest), vocabulary, (), 0), len(prompts), places, longest, torch.float32
    )
    decoder._logits = lambda hidden: head(hidden)[:, :vocabulary].contiguous()  # type: ignore[method-assign]
    pairs = zip(prompts, completions, strict=True)
    requests = [Request(i, prompt, 0, len(forced), forced) for i, (prompt, forced) in enumerate(pairs)]
    decoder.clear(len(requests))
    decoder.fill(list(enumerate(requests)))
    for step in range(1, longest):
        decoder._cache.longest = step + max(map(len, prompts))  # type: ignore[union-attr]
        decoder._step(len(requests))
    return [logprobs for _, logprobs, _ in decoder.take(list(range(len(requests))))]


@contextmanager
def _refusals_explained(model: PreTrainedModel) -> Iterator[None]:
    """A capture that CUDA refuses, after warm-up steps that went well, is the model's doing: `UserError`."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__ or error  # ending a capture that failed raises once more
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        reason = (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
        raise UserError(
            f"a decode step of {type(model).__name__} cannot be captured in a CUDA graph ({reason}): its forward waits for the"
            " GPU, or copies from the host. On a CPU steps run without capture: write its rollouts with `python -m"
            " stages.rollout --role generate --device cpu`, or choose a student_model of another class."
        ) from error


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process: the matrix library keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def _right_padded(rows: list[np.ndarray], width: int, pad_id: int) -> Tensor:
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return ids
