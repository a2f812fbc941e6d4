"""The teacher's selection: `compress` against its own head's product and against torch.topk.

    python bench/stage_one_scoring.py                              all cells, < 2 minutes on one H100 or H200
    python bench/stage_one_scoring.py --only 'selection/*'         some of them
    python bench/stage_one_scoring.py --tiny --device cpu          the same code at a tiny shape

`selection/K` and `selection/nucleus` time, on the same float32 logits of 8,192 positions x 151,936 ids (in pieces of at
most 2 GiB, as scoring has them): torch.topk alone; everything that `compress` does after the head's product; the same in
plain PyTorch; and on the same hidden states (5,120 wide, bf16) the head's product alone and the whole of `compress`. Each
figure is a median; `floor_ms` is one read of the logits at the rate of a sum over them measured in the same run.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dualkl.heads import as_head, prepare_head  # noqa: E402
from dualkl.targets import Compressed, compress, compress_logits  # noqa: E402

Record = dict[str, Any]
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
        self.hidden_ND = torch.randn(shape.num_rows, shape.width, generator=generator, device=device).to(dtype)
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


def milliseconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            function()
            times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def selection_cell(scoring: Scoring, repeats: int, **options: Any) -> Record:
    """Times in ms of all positions (pieces scaled up), and the ratios that the targets are about."""
    measured = partial(milliseconds, device=scoring.device, repeats=repeats)
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
    record |= {"product_ms": measured(scoring.product), "compress_ms": measured(lambda: scoring.whole(**options))}
    record["selection_over_topk"] = record["selection_ms"] / record["topk_ms"]
    record["selection_over_product"] = record["selection_ms"] / record["product_ms"]
    record["compress_over_product"] = record["compress_ms"] / record["product_ms"]
    return record


Cell = Callable[[Scoring, int], Record]
CELLS: dict[str, Cell] = {f"selection/{k}": partial(selection_cell, k=k) for k in (16, 64, 256)}
CELLS["selection/nucleus"] = partial(selection_cell, k=64, p=0.99, floor=4)
"""Name to measurement; a cell takes the inputs and the number of repeats."""


def main(arguments: list[str] | None = None) -> dict[str, Record]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of cell names")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="24 positions x 503 ids")
    parser.add_argument("--repeats", type=int, default=10)
    chosen = parser.parse_args(arguments)
    names = [name for name in CELLS if any(fnmatch.fnmatch(name, pattern) for pattern in chosen.only)]
    if not names:
        parser.error(f"no cell matches {' '.join(chosen.only)}; there are {', '.join(CELLS)}.")
    scoring = Scoring(TINY if chosen.tiny else Shape(), chosen.device)
    card = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu"
    found = {}
    for name in names:
        found[name] = CELLS[name](scoring, chosen.repeats)
        rounded = {key: round(value, 3) for key, value in found[name].items()}
        print(json.dumps({"cell": name, "device": card, **rounded}), flush=True)
    return found


if __name__ == "__main__":
    main()
