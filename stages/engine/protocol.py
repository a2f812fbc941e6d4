"""Interface of a rollout engine: requests in, completions with their tokens' log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32, Integer


@dataclass(frozen=True, eq=False)
class Request:
    """A completion to write: at least one token and at most `limit`, after `prompt`.

    `seed` (< 2**128) seeds the completion's RNG. `forced` gives its `limit` ids, which are then taken instead
    of sampled ones.
    """

    prompt: Integer[np.ndarray, " P"]
    limit: int
    seed: int = 0
    forced: Integer[np.ndarray, " T"] | None = None


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a call are sampled: ids below `vocab_size`, until one of `eos_ids`.

    Temperature, top-k and top-p apply in this order; `top_k` 0 and `top_p` 1 are off. `greedy` takes the most
    likely token.
    """

    vocab_size: int
    eos_ids: tuple[int, ...] = ()
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

    def generate(self, requests: list[Request], sampling: Sampling, num_slots: int) -> list[Completion]:
        """The completions, in the order of their requests; at most `num_slots` are decoded together.

        Under autocast, products are in its dtype. Raises UserError if the model is not supported.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory. A later call allocates it again."""
        ...


def forced_logprobs(
    engine: Engine, prompts: list[np.ndarray], completions: list[np.ndarray], vocab_size: int
) -> list[np.ndarray]:
    """The engine's logprobs, float32 [T], of given completions at temperature 1."""
    pairs = zip(prompts, completions, strict=True)
    requests = [Request(prompt, len(forced), forced=forced) for prompt, forced in pairs]
    written = engine.generate(requests, Sampling(vocab_size), len(requests))
    return [completion.logprobs for completion in written]
