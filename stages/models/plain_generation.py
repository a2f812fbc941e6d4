"""The engine for models whose attention the built-in one does not serve: transformers' `generate`, slower.

Tokens are drawn by our own `choose` from logits of the last hidden state, with each row's own uniforms, so that a row is
what its seed and its logits make it, as in the built-in engine. Prompts of one length are batched, without padding, which
models that keep a state along the row need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_utils import PreTrainedModel

from dualkl.heads import PreparedHead, prepare_head
from stages.models import checkpoints
from stages.models.decoding.sampling import Sampling, choose
from stages.models.decoding.slots import Progress
from stages.models.decoding.steps import Method, Request, newcomers
from stages.models.exact import decoder_of
from stages.models.readout import last_hidden

Row = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Token ids (int32, EOS included), their logprobs and entropies (float32)."""


@dataclass(frozen=True)
class Plain:
    """That a model writes by `generate`. `use_cache` False: every row is computed anew for each token.

    `refused`: the sentence for a model that neither engine writes right with.
    """

    use_cache: bool
    refused: str = ""


def way_to_write(model: PreTrainedModel | PeftModel) -> Plain | None:
    """What the check at loading has noted; None: the built-in engine."""
    return getattr(_base(model), "_writes", None)


def note_plain(model: PreTrainedModel | PeftModel, plain: Plain) -> None:
    _base(model)._writes = plain


def _base(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


class PlainEngine:
    """Writes requests by `generate`."""

    def __init__(self, model: PreTrainedModel | PeftModel, use_cache: bool) -> None:
        self.model, self._use_cache = model, use_cache
        self.base: PreTrainedModel = _base(model)

    def write(self, requests: list[Request], method: Method, num_rows: int) -> Iterator[tuple[int, Row]]:
        """The index of each request and its row, at most `num_rows` written together."""
        lengths: dict[int, list[Request]] = {}
        for request in requests:
            lengths.setdefault(len(request.prompt), []).append(request)
        with self._evaluating():
            for alike in lengths.values():
                for start in range(0, len(alike), num_rows):
                    batch = alike[start : start + num_rows]
                    rows = self._write(batch, method)
                    yield from zip((request.index for request in batch), rows, strict=True)

    def _write(self, batch: list[Request], method: Method) -> list[Row]:
        device = next(self.base.parameters()).device
        longest = max(request.limit for request in batch)
        draw = _Draw(self.base, newcomers(batch, longest).to(device), method)
        ids = torch.from_numpy(np.stack([request.prompt for request in batch]).astype(np.int64)).to(device)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=longest, use_cache=self._use_cache, pad_token_id=method.pad_id
        )
        handle = decoder_of(self.base).register_forward_hook(draw.keep_states)
        try:
            self.base.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([_Ended(draw)]),
            )
        finally:
            handle.remove()
        return draw.rows()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        own, was_training = self.base.generation_config, self.model.training
        self.base.generation_config = (
            GenerationConfig()
        )  # `generate` would fill what is not set from the model's
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.base.generation_config = own
            self.model.train(was_training)


class _Draw(LogitsProcessor):
    """Draws each row's next token and leaves it the only one that greedy `generate` can take."""

    def __init__(self, model: PreTrainedModel, progress: Progress, method: Method) -> None:
        self.progress, self._model, self._method = progress, model, method
        self._eos = torch.tensor(method.eos_ids, dtype=torch.long, device=progress.token.device)
        self._states: Tensor | None = None
        self._head: PreparedHead | None = None

    def keep_states(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._states = last_hidden(output)[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms, forced = self.progress.next_inputs()
        chosen = choose(self._logits(), uniforms, forced, self._method.sampling)
        self.progress.record(chosen, self._eos)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.token[:, None], 0.0)

    def _logits(self) -> Tensor:
        """Of the hidden states, in float32: the model's own are rounded to its dtype."""
        hidden = self._states
        assert hidden is not None
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            if self._head is None:
                head = checkpoints.head_of(self._model)
                self._head = prepare_head(head, hidden, len(head.weight))
            return self._head.logits(hidden.to(self._head.weight_Vd.dtype))[:, : self._method.vocab_size]

    def rows(self) -> list[Row]:
        columns = (self.progress.ids.int(), self.progress.logprobs, self.progress.entropy)
        ids, logprobs, entropy = (column.cpu().numpy() for column in columns)
        lengths = self.progress.taken.tolist()
        return [
            (ids[i, :n].copy(), logprobs[i, :n].copy(), entropy[i, :n].copy()) for i, n in enumerate(lengths)
        ]


class _Ended(StoppingCriteria):
    def __init__(self, draw: _Draw) -> None:
        self._draw = draw

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return ~self._draw.progress.active


def forced_logprobs(
    model: PreTrainedModel | PeftModel,
    prompts: list[np.ndarray],
    completions: list[np.ndarray],
    use_cache: bool,
) -> list[np.ndarray]:
    """What `generate` gives the tokens of given completions."""
    vocabulary = model.config.get_text_config().vocab_size
    method = Method(Sampling(max(map(len, completions))), vocabulary, (), 0)
    pairs = zip(prompts, completions, strict=True)
    requests = [Request(i, prompt, 0, len(forced), forced) for i, (prompt, forced) in enumerate(pairs)]
    written = dict(PlainEngine(model, use_cache).write(requests, method, len(requests)))
    return [written[i][1] for i in range(len(requests))]
