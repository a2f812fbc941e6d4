"""Interface of a rollout engine: completions of prompts, with their tokens' log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. `top_p` 1 and `top_k` 0 are off; `greedy` takes the most likely token."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


@dataclass(frozen=True)
class Completion:
    """T tokens, including EOS. Logprobs and entropy (nats) are of the distribution that was sampled."""

    ids: Int32[np.ndarray, " T"]
    logprobs: Float32[np.ndarray, " T"]
    entropy: Float32[np.ndarray, " T"] | None  # None if the engine does not measure it
    finish_reason: str  # "eos" or "length"


class Engine(Protocol):
    """Generates completions with one model.

    Changes to the model between two calls (weights, device, adapters) take effect in the second.
    """

    def generate(
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
        """One completion per prompt, in order.

        `prompts` are token ids; `seeds` are integers below 2**128, one per row. Only ids below `vocab_size`
        are sampled; `eos_ids` end a completion. `micro_batch` caps the rows decoded together. `forced` gives
        all of each row's tokens instead of sampling them; the result then holds the engine's logprobs of that
        text. Under autocast, products are in its dtype. Raises UserError if the model is not supported.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory. A later call allocates it again."""
        ...


def forced_logprobs(
    engine: Engine,
    prompts: list[np.ndarray],
    completions: list[np.ndarray],
    *,
    vocab_size: int,
    pad_id: int = 0,
) -> list[np.ndarray]:
    """The engine's logprobs, float32 [T], of given completions at temperature 1."""
    written = engine.generate(
        prompts,
        [0] * len(prompts),
        Sampling(max(map(len, completions))),
        vocab_size=vocab_size,
        eos_ids=(),
        pad_id=pad_id,
        micro_batch=len(prompts),
        forced=completions,
    )
    return [completion.logprobs for completion in written]
