"""Aligns hidden states with targets; only this module knows that position t-1 predicts token y_t.

A sequence is prompt + completion. A batch is padded (one sequence per row, padding on the right) or packed
(all sequences concatenated in one row). In a packed row, sequences with one prompt may share it: the prompt
is there once, and the completions follow it. A position is scored if its *next* token belongs to the
completion (EOS included).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

MOST_PADDING = 1.25


# Not frozen: the compiler checks every field of a frozen dataclass, here the length of every sequence, and
# compiles a layer anew for each batch.
@dataclass(eq=False)
class Groups:
    """Packed sequences rearranged as padded rows, one grid per group.

    Attributes:
        grids: the packed position of each slot; slots past the end of a sequence repeat its last position.
        places: the index of each packed position in the concatenation of the flattened grids.
    """

    grids: list[Int[Tensor, "b t"]]
    places: Int[Tensor, " T"]


@dataclass(eq=False)
class Shared:
    """The keys of B packed sequences, S tokens in total, if some of them share a prompt.

    Attributes:
        bounds: cumulative sum from 0 of the tokens of each whole sequence, on the device.
        longest: tokens of the longest sequence.
        places: the packed position of each key.
        copies: the keys made of each packed position, one position after the other.
        firsts: where in `copies` those of each packed position begin.
    """

    bounds: Int[Tensor, " B+1"]  # int32
    longest: int
    places: Int[Tensor, " S"]
    copies: Int[Tensor, " S"]
    firsts: Int[Tensor, " T"]


@dataclass(eq=False)
class Packing:
    """B sequences in one row. Each has its own tokens there, which follow a prompt of an earlier one or none.

    Attributes:
        lengths: own tokens of each sequence, on the host.
        bounds: cumulative sum of `lengths` from 0, on the device.
        longest: max(lengths), stored so that compiled code does not depend on every length.
        prompts: the packed positions before each sequence's own; empty if no sequence has any.
        shared: None if no sequence has any.
    """

    lengths: tuple[int, ...]
    bounds: Int[Tensor, " B+1"]  # int32
    longest: int
    prompts: tuple[range, ...] = ()
    shared: Shared | None = None

    def places(self) -> list[np.ndarray]:
        """The packed positions of each whole sequence, in order."""
        starts = np.cumsum([0, *self.lengths])
        own = [np.arange(first, end) for first, end in pairwise(starts)]
        prompts = self.prompts or [range(0)] * len(own)
        return [np.concatenate([np.array(p, np.int64), o]) for p, o in zip(prompts, own, strict=True)]

    @cached_property
    def groups(self) -> Groups:
        """Groups of similar length, longest first, with at most `MOST_PADDING` slots per token.

        A shared prompt is in the grids once for each of its sequences, as if it were their own.
        """
        sequences = self.places()
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        groups: list[list[int]] = []
        tokens = 0
        for i in order:
            length = len(sequences[i])
            if groups and (len(groups[-1]) + 1) * len(sequences[groups[-1][0]]) <= MOST_PADDING * (
                tokens + length
            ):
                groups[-1].append(i)
                tokens += length
            else:
                groups.append([i])
                tokens = length
        places = np.empty(sum(self.lengths), dtype=np.int64)
        grids, slot = [], 0
        for group in groups:
            width = len(sequences[group[0]])
            offsets = np.arange(width)
            grids.append(np.stack([sequences[i][np.minimum(offsets, len(sequences[i]) - 1)] for i in group]))
            for row, i in enumerate(group):
                own = np.arange(len(sequences[i]) - self.lengths[i], len(sequences[i]))
                places[sequences[i][own]] = slot + row * width + own
            slot += len(group) * width
        device = self.bounds.device
        return Groups([queued(grid, device) for grid in grids], queued(places, device))


@dataclass(frozen=True)
class Aligned:
    """Model inputs of B sequences, and their scored positions in order.

    Padded: `input_ids` and `attention_mask` are [B, T]. Packed: `input_ids` and `position_ids` are [1, T], T
    tokens in total; `packing` holds the boundaries and there is no mask. The last position of a shared prompt
    is scored once for each of its completions.
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
    shared: bool = False,
) -> Aligned:
    """Align a batch of B prompts (at least one token each) and completions; copies are asynchronous.

    `shared`, for packed batches: successive sequences with equal prompts share it.
    """
    sequences = [np.concatenate([p, c]).astype(np.int64) for p, c in zip(prompts, completions, strict=True)]
    targets = np.concatenate(completions).astype(np.int64)

    def tensor(array: np.ndarray) -> Tensor:
        return queued(array, device)

    if packed:
        packing = pack(prompts, completions, device, shared=shared)
        places = packing.places()
        scored = [own[-len(c) - 1 : -1] for own, c in zip(places, completions, strict=True)]
        ids, positions = np.empty((2, 1, sum(packing.lengths)), dtype=np.int64)
        for own, sequence in zip(places, sequences, strict=True):
            ids[0, own], positions[0, own] = sequence, np.arange(len(sequence))
        at = tensor(np.concatenate(scored))
        return Aligned(tensor(ids), None, at, tensor(targets), tensor(positions), packing)
    lengths = [len(sequence) for sequence in sequences]
    firsts = [row * max(lengths) + len(prompt) - 1 for row, prompt in enumerate(prompts)]
    scored = [np.arange(f, f + len(c)) for f, c in zip(firsts, completions, strict=True)]
    ids = np.full((len(lengths), max(lengths)), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return Aligned(tensor(ids), tensor(mask), tensor(np.concatenate(scored)), tensor(targets))


def pack(
    prompts: list[np.ndarray], completions: list[np.ndarray], device: torch.device, *, shared: bool
) -> Packing:
    """The layout of one row of all sequences; with `shared`, a prompt equal to the one before is left out."""
    lengths: list[int] = []
    before: list[range] = []
    prompt_at = range(0)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        is_there = shared and i > 0 and np.array_equal(prompt, prompts[i - 1])
        if not is_there:
            prompt_at = range(sum(lengths), sum(lengths) + len(prompt))
        before.append(prompt_at if is_there else range(0))
        lengths.append(len(completion) + (0 if is_there else len(prompt)))
    bounds = queued(np.cumsum([0, *lengths]).astype(np.int32), device)
    packing = Packing(tuple(lengths), bounds, max(lengths))
    if not any(before):
        return packing
    packing = replace(packing, prompts=tuple(before))
    return replace(packing, shared=_shared(packing.places(), device))


def _shared(sequences: list[np.ndarray], device: torch.device) -> Shared:
    lengths, places = [len(own) for own in sequences], np.concatenate(sequences)
    copies = np.argsort(places, kind="stable")
    firsts = np.searchsorted(places[copies], np.arange(places.max() + 1))
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    on_device = [queued(array, device) for array in (bounds, places, copies, firsts)]
    return Shared(on_device[0], max(lengths), *on_device[1:])


def queued(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy the array to `device`, asynchronously on CUDA."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def at_scored(hidden_BTd: Tensor, aligned: Aligned) -> Tensor:
    """Select the hidden states [N, d] at the scored positions of a backbone's output [B, T, d]."""
    return hidden_BTd.flatten(0, 1).index_select(0, aligned.scored)
