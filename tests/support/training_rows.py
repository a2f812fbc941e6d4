"""Rows with and without signals, for the tests of training batches."""

from typing import Any

import numpy as np
import torch

import cache

V = 50


def make_record(
    number: int, *, prompt: int = 3, completion: int = 4, signal: Any = None, **values: Any
) -> cache.Record:
    random = np.random.default_rng(number)
    logprobs = [np.log(random.uniform(0.1, 0.9, completion)).astype(np.float32) for _ in range(2)]
    scored = {
        "teacher_logprobs": logprobs[1],
        "teacher_entropy": np.ones(completion, np.float32),
        "log_tail_mass": np.full(completion, -np.inf, np.float32),
        "top1_id": np.zeros(completion, np.int32),
        "top1_logprob": np.full(completion, -0.5, np.float32),
        "signal": signal,
    }
    identity = {
        "row_id": f"{number:032x}",
        "prompt_id": f"p{number}",
        "occurrence": 0,
        "sample_index": 0,
        "refresh_index": 0,
        "run_id": "mine",
        "policy_step": 0,
        "policy_hash": "h",
        "finish_reason": "eos",
        "prompt_text": "",
        "completion_text": "",
    }
    return cache.Record(
        **(identity | values),
        prompt_ids=random.integers(0, V, prompt),
        completion_ids=random.integers(0, V, completion),
        behaviour_logprobs=logprobs[0],
        behaviour_entropy=np.ones(completion, np.float32),
        **scored,
    )


def topk(num_tokens: int, k: int, seed: int = 0) -> cache.TopK:
    """A distribution over k ids and a tail at each position."""
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(V)[:k] for _ in range(num_tokens)])
    masses = -np.sort(-random.dirichlet(np.ones(k + 1), num_tokens)[:, :k], axis=1)
    return cache.TopK(ids, np.log(masses), np.log1p(-masses.sum(1)), 1.0)


def bf16_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.bfloat16).view(torch.uint16).numpy()
