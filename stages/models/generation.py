"""The rollout engine: completions of a batch of prompts with the log-probabilities under which they were drawn.

transformers' `generate` runs the model; a logits processor draws the token, so that each row has a random stream of its
own. Token t of a row is the inverse CDF of the sampling distribution at the t-th uniform of that stream: what a row
samples depends on its seed and its logits, not on the batch around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_utils import PreTrainedModel

from dualkl import Head
from dualkl.heads import prepare_head


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: top_p 1 and top_k 0 are off; `greedy` takes the most likely token."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False


@dataclass(frozen=True)
class Completion:
    """T tokens, EOS included; logprobs and entropies (nats) of the distribution that was really sampled."""

    ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T]
    entropy: np.ndarray  # float32 [T]
    finish_reason: str  # "eos" or "length"


@torch.no_grad()
def generate(
    model: PreTrainedModel,
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
    """One completion for each prompt; `seeds` are integers below 2**128, one a row.

    `forced`: token ids to take instead of drawing, so that the engine's own logprobs of a given text can be read.
    """
    was_training = model.training
    model.eval()
    done: list[Completion] = []
    with _float32_logits(model):
        for start in range(0, len(prompts), micro_batch):
            part = slice(start, start + micro_batch)
            given = forced[part] if forced is not None else None
            done += _generate_batch(model, prompts[part], seeds[part], sampling, vocab_size, eos_ids, pad_id, given)
    model.train(was_training)
    return done


@contextmanager
def _float32_logits(model: PreTrainedModel) -> Iterator[None]:
    """The lm_head with float32 results, as in the loss: rounded to bfloat16, logits near 25 move by up to 1/16 nat."""
    output = model.get_output_embeddings()
    head = Head(output.weight.detach(), bias=getattr(output, "bias", None))
    prepared = None

    def logits(hidden: Tensor) -> Tensor:
        nonlocal prepared
        with torch.autocast(hidden.device.type, enabled=False):
            if prepared is None:  # the dtype of its products is that of the hidden states
                prepared = prepare_head(head, hidden, len(head.weight))
            flat = hidden.reshape(-1, hidden.shape[-1]).to(prepared.weight_Vd.dtype)
            return prepared.logits(flat).unflatten(0, hidden.shape[:-1])

    output.forward = logits
    try:
        yield
    finally:
        del output.forward


def sampling_logprobs(logits: Float[Tensor, "B V"], sampling: Sampling, vocab_size: int) -> Float[Tensor, "B V"]:
    """Log of the sampling distribution: vocabulary cut, temperature, top-k, then top-p; -inf outside, fp32."""
    logits = logits[:, :vocab_size].float() / sampling.temperature
    if sampling.top_k > 0:
        kth = logits.topk(min(sampling.top_k, vocab_size)).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill(
            torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= sampling.top_p), -torch.inf
        )
    return logits.log_softmax(-1)


def draw(logprobs: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Inverse CDF in float64: the first token whose cumulative probability exceeds the uniform."""
    cumulative = logprobs.double().exp().cumsum(-1)
    token = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return token.squeeze(1).clamp(max=logprobs.shape[1] - 1)


class _Draw(LogitsProcessor):
    """Draws each row's token, notes its logprob and the entropy, and leaves `generate` no other choice."""

    def __init__(
        self, sampling: Sampling, prompt_tokens: int, vocab_size: int, uniforms: Tensor, forced: Tensor | None
    ):
        self.sampling, self.prompt_tokens, self.vocab_size = sampling, prompt_tokens, vocab_size
        self.uniforms, self.forced = uniforms, forced
        self.logprobs = torch.zeros_like(uniforms, dtype=torch.float32)
        self.entropy = torch.zeros_like(uniforms, dtype=torch.float32)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = input_ids.shape[1] - self.prompt_tokens
        logprobs = sampling_logprobs(scores, self.sampling, self.vocab_size)
        if self.forced is not None:
            token = self.forced[:, t]
        elif self.sampling.greedy:
            token = logprobs.argmax(-1)
        else:
            token = draw(logprobs, self.uniforms[:, t])
        self.logprobs[:, t] = logprobs.gather(1, token[:, None]).squeeze(1)
        self.entropy[:, t] = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    seeds: list[int],
    sampling: Sampling,
    vocab_size: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    forced: list[np.ndarray] | None,
) -> list[Completion]:
    device = next(model.parameters()).device
    input_ids, mask = _left_padded(prompts, pad_id, device)
    steps = sampling.max_new_tokens if forced is None else max(len(ids) for ids in forced)
    uniforms = np.stack([np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds])
    processor = _Draw(
        sampling, input_ids.shape[1], vocab_size, torch.from_numpy(uniforms).to(device),
        None if forced is None else _right_padded(forced, steps, pad_id, device),
    )  # fmt: skip
    sequences = model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, use_cache=True,
        eos_token_id=list(eos_ids), pad_token_id=pad_id, logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    drawn = sequences[:, input_ids.shape[1] :].cpu().numpy()
    logprobs, entropy = processor.logprobs.cpu().numpy(), processor.entropy.cpu().numpy()
    return [_cut(drawn[row], logprobs[row], entropy[row], eos_ids) for row in range(len(prompts))]


def _cut(ids: np.ndarray, logprobs: np.ndarray, entropy: np.ndarray, eos_ids: tuple[int, ...]) -> Completion:
    """Ends a row at its first EOS (kept: it was sampled)."""
    ends = np.flatnonzero(np.isin(ids, eos_ids))
    length = int(ends[0]) + 1 if len(ends) else len(ids)
    reason = "eos" if len(ends) else "length"
    return Completion(ids[:length].astype(np.int32), logprobs[:length].copy(), entropy[:length].copy(), reason)


def _left_padded(rows: list[np.ndarray], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.from_numpy(row.astype(np.int64))
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _right_padded(rows: list[np.ndarray], width: int, pad_id: int, device: torch.device) -> Tensor:
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return ids.to(device)
