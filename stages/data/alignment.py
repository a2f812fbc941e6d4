"""The one place that knows that the hidden state at row t-1 predicts token y_t.

Sequences are prompt + completion, padded on the right. A scored position is one whose *next* token belongs to the
completion (EOS included): the last prompt token up to the token before the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Aligned:
    """Right-padded sequences and their scored positions, row by row in order."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    scored: Int[Tensor, " N"]  # indices into the flattened [B * T] positions
    targets: Int[Tensor, " N"]  # y_t, the token that each scored position predicts


def align(prompts: list[np.ndarray], completions: list[np.ndarray], pad_id: int, device: torch.device) -> Aligned:
    """Puts B prompts (each of at least one token) and their completions into one batch on `device`."""
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    width = max(lengths)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    scored = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, : lengths[row]] = np.concatenate([prompt, completion])
        mask[row, : lengths[row]] = 1
        first = row * width + len(prompt) - 1
        scored.append(np.arange(first, first + len(completion)))
    targets = np.concatenate(completions)
    arrays = (ids, mask, np.concatenate(scored), targets.astype(np.int64))
    return Aligned(*(torch.from_numpy(array).to(device) for array in arrays))


def at_scored(hidden_BTd: Tensor, aligned: Aligned) -> Tensor:
    """Hidden states [N, d] at the scored positions of a backbone's output [B, T, d]."""
    return hidden_BTd.flatten(0, 1).index_select(0, aligned.scored)
