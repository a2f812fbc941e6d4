"""Aligns hidden states with targets; only this module knows that position t-1 predicts token y_t.

A sequence is prompt + completion. A batch is padded (one sequence per row, padding on the right) or packed
(all sequences concatenated in one row). A position is scored if its *next* token belongs to the completion
(EOS included).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

MOST_PADDING = 1.25


@dataclass(frozen=True)
class Groups:
    """Packed sequences rearranged as padded rows, one grid per group.

    Attributes:
        grids: the packed position of each slot; slots past the end of a sequence repeat its last position.
        places: the index of each packed position in the concatenation of the flattened grids.
    """

    grids: list[Int[Tensor, "b t"]]
    places: Int[Tensor, " T"]


@dataclass(frozen=True)
class Packing:
    """Boundaries of B sequences that share one row.

    Attributes:
        lengths: tokens of each sequence, on the host.
        bounds: cumulative sum of `lengths` from 0, on the device.
        longest: max(lengths), stored so that compiled code does not specialise on every length.
    """

    lengths: tuple[int, ...]
    bounds: Int[Tensor, " B+1"]  # int32
    longest: int

    @cached_property
    def groups(self) -> Groups:
        """Groups of similar length, longest first, with at most `MOST_PADDING` slots per token."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        groups: list[list[int]] = []
        tokens = 0
        for i in order:
            if groups and (len(groups[-1]) + 1) * self.lengths[groups[-1][0]] <= MOST_PADDING * (
                tokens + self.lengths[i]
            ):
                groups[-1].append(i)
                tokens += self.lengths[i]
            else:
                groups.append([i])
                tokens = self.lengths[i]
        starts = np.cumsum([0, *self.lengths])
        places = np.empty(starts[-1], dtype=np.int64)
        grids, slot = [], 0
        for group in groups:
            width = self.lengths[group[0]]
            offsets = np.arange(width)
            grids.append(np.stack([starts[i] + np.minimum(offsets, self.lengths[i] - 1) for i in group]))
            for row, i in enumerate(group):
                places[starts[i] : starts[i + 1]] = slot + row * width + np.arange(self.lengths[i])
            slot += len(group) * width
        device = self.bounds.device
        return Groups([queued(grid, device) for grid in grids], queued(places, device))


@dataclass(frozen=True)
class Aligned:
    """Model inputs of B sequences, and their scored positions in order.

    Padded: `input_ids` and `attention_mask` are [B, T]. Packed: `input_ids` and `position_ids` are [1, T], T
    tokens in total; `packing` holds the boundaries and there is no mask.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"] | None
    scored: Int[Tensor, " N"]  # indices into the flattened [B * T] positions
    targets: Int[Tensor, " N"]  # the token y_t predicted at each scored position
    position_ids: Int[Tensor, "1 T"] | None = None
    packing: Packing | None = None


def align(
    prompts: list[np.ndarray],
    completions: list[np.ndarray],
    pad_id: int,
    device: torch.device,
    *,
    packed: bool = False,
) -> Aligned:
    """Align a batch of B prompts (at least one token each) and completions; copies are asynchronous."""
    sequences = [np.concatenate([p, c]).astype(np.int64) for p, c in zip(prompts, completions, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    starts = np.cumsum([0, *lengths]) if packed else np.arange(len(lengths) + 1) * max(lengths)
    firsts = [int(start) + len(prompt) - 1 for start, prompt in zip(starts[:-1], prompts, strict=True)]
    scored = np.concatenate([np.arange(f, f + len(c)) for f, c in zip(firsts, completions, strict=True)])
    targets = np.concatenate(completions).astype(np.int64)

    def tensor(array: np.ndarray) -> Tensor:
        return queued(array, device)

    if packed:
        positions = np.concatenate([np.arange(length) for length in lengths])
        packing = Packing(tuple(lengths), tensor(starts.astype(np.int32)), max(lengths))
        ids = np.concatenate(sequences)[None]
        return Aligned(tensor(ids), None, tensor(scored), tensor(targets), tensor(positions[None]), packing)
    ids = np.full((len(lengths), max(lengths)), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return Aligned(tensor(ids), tensor(mask), tensor(scored), tensor(targets))


def queued(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy the array to `device`, asynchronously on CUDA."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def at_scored(hidden_BTd: Tensor, aligned: Aligned) -> Tensor:
    """Select the hidden states [N, d] at the scored positions of a backbone's output [B, T, d]."""
    return hidden_BTd.flatten(0, 1).index_select(0, aligned.scored)
