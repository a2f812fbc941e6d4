"""The engine for models that the built-in one does not support: transformers' `generate`, which is slower.

Our own `Sampler` samples the tokens from the last hidden state and each row's uniforms: as in the built-in
engine, rows depend on their seeds and logits. Prompts of equal length are batched without padding, because
models with a recurrent state cannot skip it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

from stages.engine.protocol import Completion, Request, Sampling
from stages.engine.sampler import Sampler
from stages.engine.slots import SlotState
from stages.models.dropout import evaluating
from stages.models.readout import base_of, decoder_of, last_hidden


class HFGenerateEngine:
    """Generates with `generate`. Without `use_cache`, each token recomputes its whole row."""

    def __init__(self, model: PreTrainedModel | PeftModel, use_cache: bool) -> None:
        self.model, self.use_cache = model, use_cache
        self.base: Any = base_of(model)

    def close(self) -> None:
        """Do nothing: no memory is held between calls."""

    def generate(self, requests: list[Request], sampling: Sampling, num_slots: int) -> list[Completion]:
        """See `Engine.generate`."""
        by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            by_length.setdefault(len(request.prompt), []).append(index)
        written: dict[int, Completion] = {}
        with self._evaluating():
            for same in by_length.values():
                for start in range(0, len(same), num_slots):
                    batch = same[start : start + num_slots]
                    found = self._write_batch([requests[index] for index in batch], sampling)
                    written.update(zip(batch, found, strict=True))
        return [written[index] for index in range(len(requests))]

    def _write_batch(self, batch: list[Request], sampling: Sampling) -> list[Completion]:
        device = next(self.base.parameters()).device
        longest = max(request.limit for request in batch)
        draw = _Draw(Sampler(self.base, sampling, device), SlotState.starting(batch, longest).to(device))
        ids = torch.from_numpy(np.stack([request.prompt for request in batch]).astype(np.int64)).to(device)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=longest, use_cache=self.use_cache, pad_token_id=0
        )
        handle = decoder_of(self.base).register_forward_hook(draw.keep_states)
        try:
            self.base.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([_Ended(draw.state)]),
            )
        finally:
            handle.remove()
        return draw.state.completions(list(range(len(batch))), sampling.eos_ids)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode, no gradients, blank generation config: `generate` takes unset values from the model."""
        own, self.base.generation_config = self.base.generation_config, GenerationConfig()
        try:
            with torch.no_grad(), evaluating(self.model):
                yield
        finally:
            self.base.generation_config = own


class _Draw(LogitsProcessor):
    """Samples each row's next token and leaves greedy `generate` no other choice."""

    def __init__(self, sampler: Sampler, state: SlotState) -> None:
        self.state, self._sampler = state, sampler
        self._states: Tensor | None = None

    def keep_states(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._states = last_hidden(output)[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self._states is not None
        token = self._sampler.draw(self.state, self._states)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, state: SlotState) -> None:
        self._state = state

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return ~self._state.active
