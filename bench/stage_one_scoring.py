"""`bench/stage_one.py`, part selection: `compress` against its own head's product and against torch.topk.

`selection/K` and `selection/nucleus` time, on the same float32 logits of 8,192 positions x 151,936 ids (in
pieces of at most 2 GiB, as scoring has them): torch.topk alone; everything that `compress` does after the
head's product; the same in plain PyTorch; and on the same hidden states (5,120 wide, bf16) the head's product
alone and the whole of `compress`. Each figure is a median; `floor_ms` is one read of the logits at the rate
of a sum over them measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cells import Bench, Cell
from bench.measuring import Record, measure
from dualkl.compress import Compressed, compress, compress_logits
from dualkl.heads import as_head, prepare_head

SOURCES = ("bench/cells.py", "bench/measuring.py", "bench/stage_one_scoring.py", "dualkl/**/*.py")
PIECE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Shape:
    """Positions, ids, and the width of the teacher's hidden states."""

    num_rows: int = 8192
    num_ids: int = 151_936
    width: int = 5120


TINY = Shape(24, 503, 32)


class Scoring:
    """Hidden states, a head and sampled ids of one shape; logits of a piece of the positions at a time."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.shape, self.device = shape, device
        self.hidden_ND = torch.randn(shape.num_rows, shape.width, generator=generator, device=device).to(
            dtype
        )
        weight_VD = torch.randn(shape.num_ids, shape.width, generator=generator, device=device)
        self.weight_VD = weight_VD.mul_(3 * shape.width**-0.5).to(dtype)
        self.sampled_N = torch.arange(shape.num_rows, device=device) % shape.num_ids
        self.piece_rows = max(1, min(shape.num_rows, PIECE_BYTES // (4 * shape.num_ids)))
        head = prepare_head(as_head(self.weight_VD), self.hidden_ND, shape.num_ids)
        self.logits_NV = head.logits(self.hidden_ND[: self.piece_rows])
        self.head = head

    def product(self) -> None:
        """The head's product of all positions, a piece at a time into the same rows."""
        for start in range(0, self.shape.num_rows, self.piece_rows):
            source_ND = self.hidden_ND[start : start + self.piece_rows]
            self.head.products(source_ND, self.logits_NV[: len(source_ND)])

    def whole(self, **options: Any) -> Compressed:
        """`compress` of all positions."""
        return compress(self.hidden_ND, self.weight_VD, self.sampled_N, **options)

    def selection(self, **options: Any) -> Compressed:
        """What follows the product, of one piece."""
        return compress_logits(self.logits_NV, self.sampled_N[: self.piece_rows], **options)


def measure_selection(options: dict[str, Any], shape: Shape, bench: Bench) -> Record:
    """Times in ms of all positions (pieces scaled up), and the ratios that the targets are about."""
    scoring: Scoring = bench.make("selection", lambda: Scoring(shape, bench.device))

    def measured(function: Callable[[], object]) -> float:
        return measure(function, bench.device, bench.seconds).median

    scale = scoring.shape.num_rows / scoring.piece_rows
    logits_NV: Tensor = scoring.logits_NV
    k = min(options["k"], scoring.shape.num_ids)
    scoring.product()
    record: Record = {
        "floor_ms": measured(lambda: logits_NV.sum(1)) * scale,
        "topk_ms": measured(lambda: logits_NV.topk(k, dim=1)) * scale,
        "selection_ms": measured(lambda: scoring.selection(**options)) * scale,
    }
    with mock.patch("dualkl.kernels.selectable", return_value=False):
        record["plain_ms"] = measured(lambda: scoring.selection(**options)) * scale
    record |= {
        "product_ms": measured(scoring.product),
        "compress_ms": measured(lambda: scoring.whole(**options)),
    }
    record["selection_over_topk"] = record["selection_ms"] / record["topk_ms"]
    record["selection_over_product"] = record["selection_ms"] / record["product_ms"]
    record["compress_over_product"] = record["compress_ms"] / record["product_ms"]
    return record


def cells(tiny: bool) -> list[Cell]:
    shape = TINY if tiny else Shape()
    kinds: dict[str, dict[str, Any]] = {str(k): {"k": k} for k in (16, 64, 256)}
    kinds["nucleus"] = {"k": 64, "p": 0.99, "floor": 4}
    return [
        Cell(f"selection/{kind}", partial(measure_selection, options, shape), SOURCES)
        for kind, options in kinds.items()
    ]
