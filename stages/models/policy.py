"""A policy: a model that generates completions, its engine, and how the cache records it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from stages.engine.protocol import Completion, Engine, Request, Sampling


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
    max_new_tokens: int
    autocast: Callable[[], AbstractContextManager]
    is_teacher: bool = False

    def generate(self, prompts: list[np.ndarray], seeds: list[int], num_slots: int) -> list[Completion]:
        """One completion per prompt; at most `num_slots` are decoded together."""
        rows = zip(prompts, seeds, strict=True)
        requests = [Request(prompt, self.max_new_tokens, seed) for prompt, seed in rows]
        with self.autocast():
            return self.engine.generate(requests, self.sampling, num_slots)
