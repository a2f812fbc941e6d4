"""The one place that knows that the hidden state at row t-1 predicts token y_t.

A sequence is prompt + completion. Sequences lie either one a row, padded on the right, or one after the other in a single
row (packed). A scored position is one whose *next* token belongs to the completion (EOS included): the last prompt token
up to the token before the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where B sequences that share one row begin and end.

    Attributes:
        lengths: tokens of each, known to the host.
        bounds: their cumulative sum from 0, where the kernels read it.
    """

    lengths: tuple[int, ...]
    bounds: Int[Tensor, " B+1"]  # int32

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class Aligned:
    """B sequences as a model takes them, and their scored positions, sequence by sequence in order.

    Padded: `input_ids` and `attention_mask` are [B, T]. Packed: `input_ids` and `position_ids` are [1, T], T the tokens of
    all sequences, and `packing` tells them apart; there is no mask.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"] | None
    scored: Int[Tensor, " N"]  # indices into the flattened [B * T] positions
    targets: Int[Tensor, " N"]  # y_t, the token that each scored position predicts
    position_ids: Int[Tensor, "1 T"] | None = None
    packing: Packing | None = None


def align(
    prompts: list[np.ndarray], completions: list[np.ndarray], pad_id: int, device: torch.device, *, packed: bool = False
) -> Aligned:
    """Puts B prompts (each of at least one token) and their completions into one batch on `device`."""
    sequences = [np.concatenate([p, c]).astype(np.int64) for p, c in zip(prompts, completions, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    starts = np.cumsum([0, *lengths]) if packed else np.arange(len(lengths) + 1) * max(lengths)
    firsts = [int(start) + len(prompt) - 1 for start, prompt in zip(starts[:-1], prompts, strict=True)]
    scored = np.concatenate([np.arange(f, f + len(c)) for f, c in zip(firsts, completions, strict=True)])
    targets = np.concatenate(completions).astype(np.int64)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    if packed:
        positions = np.concatenate([np.arange(length) for length in lengths])
        packing = Packing(tuple(lengths), tensor(starts.astype(np.int32)))
        ids = np.concatenate(sequences)[None]
        return Aligned(tensor(ids), None, tensor(scored), tensor(targets), tensor(positions[None]), packing)
    ids = np.full((len(lengths), max(lengths)), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return Aligned(tensor(ids), tensor(mask), tensor(scored), tensor(targets))


def at_scored(hidden_BTd: Tensor, aligned: Aligned) -> Tensor:
    """Hidden states [N, d] at the scored positions of a backbone's output [B, T, d]."""
    return hidden_BTd.flatten(0, 1).index_select(0, aligned.scored)
