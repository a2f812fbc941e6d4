"""Compress a teacher's distribution to its most likely ids and the mass of the rest.

Shape suffixes: N positions, V vocabulary after the cut, K kept ids, D width of the teacher's hidden states.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualkl import kernels
from dualkl.checks import check_ids, check_integers, check_shape, cut_vocabulary
from dualkl.config import check_temperature
from dualkl.heads import Head, PreparedHead, as_head, prepare_head, row_chunks, statistics_dtype
from dualkl.logprobs import LEAST_LOGPROB, entropy, log_normalise_


@dataclass(frozen=True, eq=False)
class Compressed:
    """A teacher's most likely ids and tail mass. Logprobs and entropies are float32, in nats.

    Attributes:
        ids: kept ids in descending probability; empty slots hold -1 and come last.
        logprobs: log-probabilities of the kept ids under the full distribution; -inf in empty slots.
        log_tail_mass: ln of the mass outside the kept ids; -inf if there is none.
        entropy: entropy of the full distribution.
        sampled_logprobs: log-probabilities of the sampled tokens under the full distribution.
    """

    ids: Int[Tensor, "N K"]
    logprobs: Float[Tensor, "N K"]
    log_tail_mass: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    sampled_logprobs: Float[Tensor, " N"]


@torch.no_grad()
def compress(
    hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"] | Head,
    sampled_ids: Int[Tensor, " N"],
    *,
    k: int,
    p: float = 1.0,
    floor: int = 1,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Compressed:
    """Return each position's k most likely ids, tail mass, entropy and sampled token's logprob.

    Logits are float32 and computed in chunks, never for all positions at once. The tail mass is the
    log-sum-exp over the dropped ids, not 1 - sum, and therefore accurate however small. K = min(k,
    vocabulary).

    Args:
        hidden: the teacher's last hidden states.
        head: the teacher's output head.
        sampled_ids: the sampled token at each position.
        k: maximum number of ids kept per position.
        p: keep the smallest set of ids with mass >= p (the nucleus), at most k of them; 1 keeps k.
        floor: minimum number of ids in a nucleus.
        vocab_size: cut the vocabulary to this many ids before the softmax.
        temperature: divides the logits.
        chunk_rows: positions per chunk; by default as many as fit a memory budget.

    Raises:
        ValueError: k, p, floor, temperature or vocab_size out of range, mismatched shapes, or (on CPU) a
            sampled id outside the vocabulary.
    """
    head = as_head(head)
    _check_compress(hidden, head, sampled_ids, k, p, floor, temperature)
    num_ids = cut_vocabulary(vocab_size, {"teacher's head": head.weight.shape[0]})
    if not sampled_ids.is_cuda:
        check_ids("sampled_ids", sampled_ids, num_ids)
    prepared = prepare_head(head, hidden, num_ids)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in row_chunks(hidden.shape[0], chunk_rows, num_ids, 3, hidden):
            source_ND = hidden[rows].to(prepared.weight_Vd.dtype)
            parts.append(
                _compress_rows(source_ND, prepared, temperature, sampled_ids[rows], min(k, num_ids), p, floor)
            )
    if not parts:
        return _nothing_compressed(min(k, num_ids), hidden)
    return Compressed(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@torch.no_grad()
def compress_logits(
    logits: Float[Tensor, "N V"], sampled_ids: Int[Tensor, " N"], *, k: int, p: float = 1.0, floor: int = 1
) -> Compressed:
    """Apply `compress` to existing logits, already cut to the vocabulary. The input is not modified.

    Raises:
        ValueError: k, p or floor out of range, or mismatched shapes.
    """
    check_shape("logits", logits, (sampled_ids.shape[0], None))
    _check_kept(k, p, floor)
    k = min(k, logits.shape[1])
    if kernels.selectable(logits, k):
        return Compressed(*_compress_on_cuda(logits, logits.shape[1], None, 1.0, sampled_ids, k, p, floor))
    copied_NV = logits.to(statistics_dtype(logits), copy=True)
    return Compressed(*_compress_chunk(copied_NV, sampled_ids, k, p, floor))


def _compress_rows(
    source_ND: Tensor, head: PreparedHead, temperature: float, sampled_N: Tensor, k: int, p: float, floor: int
) -> tuple[Tensor, ...]:
    """The fields of `Compressed` for a chunk; hidden states are in the head's product dtype."""
    if not kernels.selectable(source_ND, k):
        return _compress_chunk(head.logits(source_ND).div_(temperature), sampled_N, k, p, floor)
    from dualkl.kernels.fused import padded  # import triton only where the kernels run

    num_ids = len(head.weight_Vd)
    products_NW = torch.empty(len(source_ND), padded(num_ids), dtype=head.dtype, device=source_ND.device)
    head.products(source_ND, products_NW[:, :num_ids])
    return _compress_on_cuda(products_NW, num_ids, head, temperature, sampled_N, k, p, floor)


def _compress_on_cuda(
    logits_NW: Tensor,
    num_ids: int,
    head: PreparedHead | None,
    temperature: float,
    sampled_N: Tensor,
    k: int,
    p: float,
    floor: int,
) -> tuple[Tensor, ...]:
    """Kernel version of `_compress_chunk` on raw products (logits if `head` is None); the input is kept."""
    from dualkl.kernels.selection import largest

    ids_NK, logprobs_NK, log_tail_N, entropy_N, sampled_N = largest(
        logits_NW, num_ids, head, temperature, sampled_N, k
    )
    kept_NK = logprobs_NK > LEAST_LOGPROB
    if p < 1.0:
        inside_NK = _in_nucleus(logprobs_NK, p, floor)
        dropped_NK = logprobs_NK.masked_fill(~kept_NK | inside_NK, -torch.inf)
        log_tail_N, kept_NK = torch.logaddexp(log_tail_N, dropped_NK.logsumexp(1)), kept_NK & inside_NK
    ids_NK = ids_NK.masked_fill(~kept_NK, -1).int()
    return ids_NK, logprobs_NK.masked_fill(~kept_NK, -torch.inf), log_tail_N, entropy_N, sampled_N


def _in_nucleus(logprobs_NK: Tensor, p: float, floor: int) -> Tensor:
    """Mask of the smallest set with mass >= p, at least `floor` ids. Ids are in descending probability."""
    mass_NK = logprobs_NK.double().exp()
    before_NK = mass_NK.cumsum(1) - mass_NK
    return (before_NK < p) | (torch.arange(mass_NK.shape[1], device=mass_NK.device) < floor)


def _compress_chunk(logits_NV: Tensor, sampled_N: Tensor, k: int, p: float, floor: int) -> tuple[Tensor, ...]:
    """The fields of `Compressed` for a chunk. Overwrites the logits."""
    logprobs_NV = log_normalise_(logits_NV)
    sampled_logprobs_N = logprobs_NV.gather(1, sampled_N.long()[:, None])[:, 0]
    entropy_N = entropy(logprobs_NV)
    logprobs_NK, ids_NK = logprobs_NV.topk(k, dim=1)
    kept_NK = logprobs_NK > LEAST_LOGPROB
    if p < 1.0:
        kept_NK &= _in_nucleus(logprobs_NK, p, floor)
    # Empty slots scatter to slot 0's id, so nothing else is removed from the tail.
    logprobs_NV.scatter_(1, torch.where(kept_NK, ids_NK, ids_NK[:, :1]), -torch.inf)
    log_tail_N = logprobs_NV.masked_fill_(logprobs_NV <= LEAST_LOGPROB, -torch.inf).logsumexp(1)
    ids_NK = ids_NK.masked_fill(~kept_NK, -1).int()
    logprobs_NK = logprobs_NK.masked_fill(~kept_NK, -torch.inf)
    return ids_NK, logprobs_NK.float(), log_tail_N.float(), entropy_N.float(), sampled_logprobs_N.float()


def _nothing_compressed(k: int, like: Tensor) -> Compressed:
    none = torch.empty(0, device=like.device)
    ids = torch.empty(0, k, dtype=torch.int32, device=like.device)
    return Compressed(ids, torch.empty(0, k, device=like.device), none, none.clone(), none.clone())


def _check_kept(k: int, p: float, floor: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; expected a number of ids >= 1.")
    if not 0 < p <= 1:
        raise ValueError(f"p is {p}; expected a mass in (0, 1].")
    if not 1 <= floor <= k:
        raise ValueError(f"floor is {floor}; expected a number of ids from 1 to k = {k}.")


def _check_compress(
    hidden: Tensor, head: Head, sampled_ids: Tensor, k: int, p: float, floor: int, temperature: float
) -> None:
    check_temperature(temperature)
    _check_kept(k, p, floor)
    check_shape("hidden", hidden, (None, head.weight.shape[1]))
    check_shape("sampled_ids", sampled_ids, (hidden.shape[0],))
    check_integers("sampled_ids", sampled_ids)
