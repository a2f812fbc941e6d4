"""A policy: a model that generates completions, its engine, and how the cache records it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from stages.engine.protocol import Completion, Engine, Sampling


@dataclass(frozen=True)
class Policy:
    """A model with its sampling settings, and the identity recorded with its rows."""

    model: PreTrainedModel | PeftModel
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    run_id: str
    policy_hash: str
    step: int  # optimizer steps of its weights
    sampling: Sampling
    vocab_size: int
    eos_ids: tuple[int, ...]
    autocast: Callable[[], AbstractContextManager]
    is_teacher: bool = False

    def generate(self, prompts: list[np.ndarray], seeds: list[int], num_slots: int) -> list[Completion]:
        """Generate one completion per prompt, at most `num_slots` at a time. See `Engine.generate`."""
        with self.autocast():
            return self.engine.generate(
                prompts,
                seeds,
                self.sampling,
                vocab_size=self.vocab_size,
                eos_ids=self.eos_ids,
                pad_id=self.tokenizer.pad_token_id,
                micro_batch=num_slots,
            )
