"""A policy: a model that writes completions, the engine it writes with, and what the cache records of it."""

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
    """How one model samples, and what its rows are recorded under."""

    model: PreTrainedModel | PeftModel
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    run_id: str
    policy_hash: str
    step: int  # optimizer steps behind its weights
    sampling: Sampling
    vocab_size: int
    eos_ids: tuple[int, ...]
    autocast: Callable[[], AbstractContextManager]
    is_teacher: bool = False

    def generate(self, prompts: list[np.ndarray], seeds: list[int], num_slots: int) -> list[Completion]:
        """One completion for each prompt, at most `num_slots` decoded together. See `Engine.generate`."""
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
