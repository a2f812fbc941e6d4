"""The output head: hidden states to logits and back, in chunks of positions small enough for a memory budget.

Shape suffixes: N positions, V vocabulary after the cut, d width of the hidden states.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

_CPU_BUDGET = 192 * 2**20
_ACCELERATOR_BUDGET = 4 * 2**30


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: logits = cap(scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap).

    Attributes:
        weight: one row per token id.
        bias: one number per token id, or None.
        scale: factor on the logits, applied before the cap.
        softcap: bound of the logits' magnitude, or None for no bound.
    """

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(
                f"The head's weight has shape {list(self.weight.shape)}; expected [vocabulary, width]."
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"The head's bias has shape {list(self.bias.shape)}; expected [{self.weight.shape[0]}], one"
                " number per row of its weight."
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(
                f"The head's softcap is {self.softcap}; expected a number > 0, or None for no cap."
            )


def as_head(lm_head: Tensor | Head) -> Head:
    """Wrap a bare weight as a head without bias, scale or cap."""
    return lm_head if isinstance(lm_head, Head) else Head(lm_head)


def statistics_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of logits and statistics: float32, or float64 for float64 hidden states."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class PreparedHead:
    """A detached head, cut to the vocabulary and cast to the dtype of its matrix products.

    On CUDA, bfloat16 hidden states use bfloat16 products with float32 accumulation and results. Otherwise
    products run in the statistics dtype.
    """

    weight_Vd: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype

    def logits(self, hidden_Nd: Tensor) -> Tensor:
        """Return logits [N, V] in the statistics dtype, newly allocated, from states in the product dtype."""
        logits_NV = self.products(hidden_Nd)
        if self.bias_V is not None:
            logits_NV += self.bias_V
        if self.scale != 1.0:
            logits_NV *= self.scale
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def products(self, hidden_Nd: Tensor, out: Tensor | None = None) -> Tensor:
        """Return hidden @ weight.T [N, V] (no bias, scale, cap) in the statistics dtype; written to `out`."""
        return _matmul(hidden_Nd, self.weight_Vd.T, self.dtype, out)

    def slope(self, logits_NV: Tensor) -> Tensor | None:
        """d logits / d (scaled raw logits) = 1 - (logits / softcap)², or None if it is 1 everywhere."""
        if self.softcap is None:
            return None
        return logits_NV.div(self.softcap).square_().neg_().add_(1.0)


def prepare_head(lm_head: Tensor | Head, hidden: Tensor, num_ids: int) -> PreparedHead:
    """Detach `lm_head`, keep its first `num_ids` rows and cast it for products with `hidden`."""
    head = as_head(lm_head)
    dtype = statistics_dtype(hidden)
    product = torch.bfloat16 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else dtype
    bias_V = None if head.bias is None else head.bias.detach()[:num_ids].to(dtype)
    return PreparedHead(head.weight.detach()[:num_ids].to(product), bias_V, head.scale, head.softcap, dtype)


class HeadGradient:
    """Accumulates the gradients of hidden states, head weight and head bias, chunk by chunk.

    Weight and bias gradients are accumulated in the statistics dtype. Inputs that need no gradient cost no
    memory and no matmul.
    """

    def __init__(
        self, head: PreparedHead, hidden: Tensor, lm_head: Head, needs: tuple[bool, bool, bool]
    ) -> None:
        self.head = head
        self.hidden_Nd = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight_Vd = torch.empty_like(lm_head.weight, dtype=head.dtype) if needs[1] else None
        bias = lm_head.bias
        self.bias_V = torch.zeros_like(bias, dtype=head.dtype) if needs[2] and bias is not None else None
        self._weight_dtype = lm_head.weight.dtype
        self._bias_dtype = None if bias is None else bias.dtype
        self._num_summed = 0
        """Number of initialised rows of the weight gradient; the rest is uninitialised memory."""

    def add(self, rows: slice, hidden_Nd: Tensor, gradient_NV: Tensor) -> None:
        """Add one chunk, given the gradient with respect to hidden @ weight.T + bias (before scale and cap).

        Each position must belong to exactly one chunk. The gradient is in the statistics dtype or the product
        dtype.
        """
        num_ids = gradient_NV.shape[1]
        if self.bias_V is not None:
            self.bias_V[:num_ids] += gradient_NV.sum(0, dtype=self.bias_V.dtype)
        product_NV = gradient_NV.to(self.head.weight_Vd.dtype)
        if self.hidden_Nd is not None and self.hidden_Nd.dtype == product_NV.dtype:
            torch.mm(product_NV, self.head.weight_Vd, out=self.hidden_Nd[rows])
        elif self.hidden_Nd is not None:
            self.hidden_Nd[rows] = torch.mm(product_NV, self.head.weight_Vd).to(self.hidden_Nd.dtype)
        if self.weight_Vd is not None and self._num_summed:
            _add_matmul_(self.weight_Vd[:num_ids], product_NV.T, hidden_Nd)
        elif self.weight_Vd is not None:
            _matmul(product_NV.T, hidden_Nd, self.head.dtype, self.weight_Vd[:num_ids])
            self._num_summed = num_ids

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of (hidden, weight, bias) in the inputs' dtypes, None where not needed."""
        weight_Vd = None
        if self.weight_Vd is not None:
            self.weight_Vd[self._num_summed :] = 0
            weight_Vd = self.weight_Vd.to(self._weight_dtype)
        bias_V = None if self.bias_V is None else self.bias_V.to(self._bias_dtype)
        return self.hidden_Nd, weight_Vd, bias_V


def row_chunks(
    num_rows: int, chunk_rows: int | None, num_ids: int, num_buffers: int, like: Tensor
) -> Iterator[slice]:
    """Return slices of at most `chunk_rows` positions, as equal as possible.

    By default, chunks are sized so that `num_buffers` arrays [rows, num_ids] of the statistics dtype fit 192
    MiB on CPU, or 4 GiB (at most 1/16 of the memory) on a GPU.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; expected a number of positions >= 1, or None.")
    if chunk_rows is None:
        row_bytes = num_ids * num_buffers * statistics_dtype(like).itemsize
        chunk_rows = max(1, _memory_budget(like.device) // max(1, row_bytes))
    num_chunks = -(-num_rows // chunk_rows)
    edges = [num_rows * i // num_chunks for i in range(num_chunks + 1)] if num_chunks else [0]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _memory_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_BUDGET
    return min(_ACCELERATOR_BUDGET, torch.cuda.get_device_properties(device).total_memory // 16)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and returned in `dtype`. Rounding logits to bfloat16 adds up to 1e-3 nats of KL."""
    return torch.mm(a, b, out=out) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype, out=out)


def _add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
