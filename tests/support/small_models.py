"""Small models for the rollout engine's tests, and references for its completions."""

import copy
from contextlib import closing
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from stages.data.prompts import encode
from stages.engine.opening import open_engine
from stages.engine.protocol import Completion, Engine, Request, Sampling

QUESTIONS = [
    "Eva has 23 pens. A friend has 2 times as many. How many pens do they have together?",
    "Sam had 9 cups but lost 4 of them. How many cups are left?",
    "Leo buys 3 bags of 4 eggs and 5 bags of 6 eggs. How many eggs does Leo buy?",
    "Mia has 4 pens and buys 7 more. How many pens does Mia have now?",
    "How many?",
]
V, EOS = 230, 1


def question_prompts(tokenizer: Any) -> list[np.ndarray]:
    return [encode([{"role": "user", "content": question}], {}, tokenizer, {}).ids for question in QUESTIONS]


def sampling_of(**values: Any) -> Sampling:
    """Over the toy vocabulary, with its EOS."""
    return Sampling(**({"vocab_size": V, "eos_ids": (EOS,)} | values))


def write(
    engine: Engine,
    prompts: list[np.ndarray],
    limit: int,
    *,
    seeds: list[int] | None = None,
    forced: list[np.ndarray] | None = None,
    num_slots: int | None = None,
    **sampling: Any,
) -> list[Completion]:
    """Call the engine once; by default all prompts are decoded together. `sampling`: see `sampling_of`."""
    texts: list[Any] = list(forced) if forced else [None] * len(prompts)
    requests = [
        Request(prompt, limit if text is None else len(text), seed, text)
        for prompt, seed, text in zip(prompts, seeds or range(1, len(prompts) + 1), texts, strict=True)
    ]
    return engine.generate(requests, sampling_of(**sampling), num_slots or len(prompts))


def run(model: Any, prompts: list[np.ndarray], limit: int, **values: Any) -> list[Completion]:
    """Open the model's engine and call it once; `values` as in `write`."""
    with closing(open_engine(model)) as engine:
        return write(engine, prompts, limit, **values)


@torch.no_grad()
def forced_logits(model: Any, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """Logits [T, V] that predict a completion, from one forward over prompt + completion without padding."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()


SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "vocab_size": V,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
}
WINDOW = 12
"""Positions that a sliding layer attends to: fewer than the prompts have."""
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma2": Gemma2Config(
        **SHAPE,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        query_pre_attn_scalar=24,
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=24,
    ),
}


def random_model(name: str) -> Any:
    torch.manual_seed(3)
    attention = "eager" if name == "gemma2" else "sdpa"  # PyTorch's attention does not support its softcap
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[name]), attn_implementation=attention
    ).eval()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    return model


def theirs(model: Any, prompt: np.ndarray, num_tokens: int) -> list[int]:
    """Greedy completion by transformers' `generate`, one prompt at a time and so without padding."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": EOS, "pad_token_id": 0}
    return model.generate(input_ids=ids, **settings)[0, len(prompt) :].tolist()


def check_logprobs(
    model: Any, prompt: np.ndarray, completion: Completion, temperature: float, atol: float
) -> None:
    """Compare a completion's logprobs with those of a teacher-forced forward."""
    logprobs = (forced_logits(model, prompt, completion.ids) / temperature).log_softmax(-1)
    picked = logprobs.gather(1, torch.from_numpy(completion.ids.astype(np.int64))[:, None])[:, 0]
    np.testing.assert_allclose(completion.logprobs, picked.numpy(), atol=atol)
    np.testing.assert_allclose(completion.entropy, -(logprobs.exp() * logprobs).sum(-1).numpy(), atol=atol)


def same(left: Completion, right: Completion) -> bool:
    return np.array_equal(left.ids, right.ids) and left.finish_reason == right.finish_reason
