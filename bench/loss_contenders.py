"""Who is measured by `bench/loss.py`: DualKL, plain PyTorch, and the fused losses of other projects.

A contender builds, for a problem, a kind of teacher and one of its settings, a function of the student's
hidden states and head weight that returns the loss. Packages that are missing raise `NotInstalled`, which is
no failure.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dualkl
from bench.loss_problems import (
    CONFIG,
    ENTROPY_GATE_MIDDLE,
    ENTROPY_GATE_WIDTH,
    Problem,
    objective,
)
from dualkl import HiddenTeacher, LogitsTeacher, TopKTeacher

Settings = dict[str, Any]
Columns = dict[str, Tensor]
LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, Columns]]
"""(hidden [N, d], weight [V, d]) -> the mean loss, and rkl, fkl and gate per position where they are known.
"""

ALL_KINDS = ("hidden", "full", "topk")
JOBS = {
    "gated": "F, R and gate on R",
    "forward": "forward KL",
    "reverse": "reverse KL",
    "jsd": "JSD 0.5",
    "entropy": "F, R and gate on H(q)",
}


class NotInstalled(ModuleNotFoundError):
    """The contender's package, or the option that it needs, is missing."""


@dataclass(frozen=True)
class Contender:
    """One row of the tables. Of several `settings` the fastest is reported; the first is the one of a quick
    run.
    """

    name: str
    job: str
    kinds: tuple[str, ...]
    build: Callable[[Problem, str, Settings], LossFunction]
    settings: tuple[Settings, ...] = ({},)
    package: str | None = None
    devices: tuple[str, ...] = ("cuda", "cpu")

    def version(self) -> str | None:
        """Of the peer's package; None for ours and plain PyTorch, and where it is not installed."""
        if self.package is None:
            return None
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalled(f"{name}: {error}") from error


def build_dual_kl(problem: Problem, kind: str, settings: Settings) -> LossFunction:
    """`dualkl.dual_kl` by its public call; `plain` as if there were no kernels."""
    teacher = problem.teacher(kind)
    chunk_rows = settings.get("chunk_rows")

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Columns]:
        without = mock.patch("dualkl.kernels.usable", return_value=False)
        with without if settings.get("plain") else contextlib.nullcontext():
            out = dualkl.dual_kl(hidden, weight, teacher, CONFIG, chunk_rows=chunk_rows)
        return out.loss, {"rkl": out.rkl, "fkl": out.fkl, "gate": out.gate}

    return loss


def _eager(
    hidden: Tensor, weight: Tensor, teacher: HiddenTeacher | LogitsTeacher | TopKTeacher
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definitions over all logits at once, rounded to bfloat16 by the products and float32 from there."""
    logits_NV = (hidden @ weight.T).float()
    if isinstance(teacher, TopKTeacher):
        columns = objective("gated", logits_NV, teacher)
    elif isinstance(teacher, LogitsTeacher):
        columns = objective("gated", logits_NV, teacher.logits.float())
    else:
        assert isinstance(teacher.lm_head, Tensor)
        with torch.no_grad():
            teacher_NV = (teacher.hidden @ teacher.lm_head.T).float()
        columns = objective("gated", logits_NV, teacher_NV)
    loss_N, *rest = columns
    return loss_N.mean(), *rest  # type: ignore[return-value]


def build_eager(problem: Problem, kind: str, settings: Settings) -> LossFunction:
    teacher, function = problem.teacher(kind), _eager
    if settings.get("compiled"):
        torch._dynamo.reset()
        function = torch.compile(_eager, dynamic=False)

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Columns]:
        total, rkl, fkl, gate = function(hidden, weight, teacher)
        return total, {"rkl": rkl, "fkl": fkl, "gate": gate}

    return loss


def build_liger_chunked(problem: Problem, kind: str, settings: Settings) -> LossFunction:
    """LigerFusedLinearJSDLoss without its cross-entropy. It computes dW for a frozen head too."""
    module = _module("liger_kernel.chunked_loss")
    if settings["compiled"]:
        torch._dynamo.reset()  # another chunk size would otherwise be compiled for dynamic shapes
    function = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **settings)
    labels = torch.zeros(problem.shape.num_rows, dtype=torch.long, device=problem.hidden_Nd.device)

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Columns]:
        return function(hidden, weight, problem.teacher_hidden_ND, problem.teacher_weight_VD, labels), {}

    return loss


def build_liger_fused(problem: Problem, kind: str, settings: Settings) -> LossFunction:
    """Liger's fused_linear_jsd, which chooses its own chunks; `accum` is the dtype that dW is summed in."""
    function = _module("liger_kernel.ops").LigerFusedLinearJSDFunction
    accumulate = torch.float32 if settings["accum"] == "fp32" else None
    teacher = problem.teacher_hidden_ND, problem.teacher_weight_VD

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Columns]:
        labels, ignore_index, temperature = None, -100, 1.0
        return function.apply(
            hidden,
            weight,
            *teacher,
            labels,
            settings["beta"],
            ignore_index,
            temperature,
            accumulate,
            None,
            None,
        ), {}

    return loss


def build_trl(problem: Problem, kind: str, settings: Settings) -> LossFunction:
    """TRL's ChunkedDivergenceFunction; its tile sizes are constants of the module."""
    module = _trl_divergence()
    module.TOKEN_CHUNK_SIZE, module.VOCAB_CHUNK_SIZE = settings["tokens"], settings["ids"]
    teacher = problem.teacher_hidden_ND, problem.teacher_weight_VD, None

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Columns]:
        divergence_N, _ = module.ChunkedDivergenceFunction.apply(
            hidden, weight, None, *teacher, settings["beta"], 1.0, 1.0, None, 1.0, None
        )
        return divergence_N.mean(), {}

    return loss


def _trl_divergence() -> Any:
    """trl.kernels.chunked_divergence; where the trainers' own needs are missing, with a stand-in for
    trl.trainer.

    All it takes from there gathers heads that ZeRO-3 has split, which never happens here.
    """
    name = "trl.kernels.chunked_divergence"
    _module("trl")
    try:
        return importlib.import_module(name)
    except ImportError:
        trainer, utils = types.ModuleType("trl.trainer"), types.ModuleType("trl.trainer.utils")
        utils.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
        trainer.utils = utils
        trainer.__path__ = []
        sys.modules |= {"trl.trainer": trainer, "trl.trainer.utils": utils}
        return _module(name)


def build_orda(problem: Problem, kind: str, settings: Settings) -> LossFunction:
    """orda-kernel's KL mixed by a gate on the teacher's entropy, without its cross-entropies."""
    orda = _module("orda_kernel")
    gate = orda.EntropyGate(tau=ENTROPY_GATE_MIDDLE, scale=ENTROPY_GATE_WIDTH)
    rows = settings["rows"]
    chunks = {"dynamic": orda.ChunkSize.dynamic, "fast": orda.ChunkSize.fast}
    chunk_size = chunks[rows]() if isinstance(rows, str) else orda.ChunkSize.nrows(rows)
    options = {
        "student_ce_weight": 0.0,
        "kl_weight": 1.0,
        "kl_divergence": "entropy_adaptive",
        "entropy_gate": gate,
        "config": orda.KernelConfig(
            chunk_size=chunk_size, assume_valid_labels=True, grad_weight_accumulation=settings["accum"]
        ),
    }
    labels = torch.zeros(problem.shape.num_rows, dtype=torch.long, device=problem.hidden_Nd.device)
    given = problem.teacher(kind)
    if isinstance(given, LogitsTeacher):
        teacher = orda.PrecomputedTeacher(logits=given.logits, trust_cache_immutability=True)
    else:
        teacher = orda.SeparateTeacher(hidden=problem.teacher_hidden_ND, weight=problem.teacher_weight_VD)

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Columns]:
        return orda.distillation_loss(hidden, weight, labels, teacher, **options).loss, {}

    return loss


def _liger(name: str, job: str, beta: float, compiled: bool) -> Contender:
    chunks = tuple({"beta": beta, "compiled": compiled, "chunk_size": rows} for rows in (2048, 1024, 4096))
    return Contender(name, job, ("hidden",), build_liger_chunked, chunks, "liger-kernel")


def _trl(name: str, job: str, beta: float) -> Contender:
    tiles = ((4096, 32768), (8192, 32768), (2048, 65536))
    settings = tuple({"beta": beta, "tokens": tokens, "ids": ids} for tokens, ids in tiles)
    return Contender(name, job, ("hidden",), build_trl, settings, "trl")


CONTENDERS = (
    Contender("dual_kl", "gated", ALL_KINDS, build_dual_kl),
    Contender("dual_kl_plain", "gated", ALL_KINDS, build_dual_kl, ({"plain": True},)),
    Contender("eager", "gated", ALL_KINDS, build_eager),
    Contender("eager_compiled", "gated", ALL_KINDS, build_eager, ({"compiled": True},), devices=("cuda",)),
    _liger("liger_chunked_jsd", "jsd", 0.5, compiled=False),
    _liger("liger_chunked_jsd_compiled", "jsd", 0.5, compiled=True),
    _liger("liger_chunked_reverse_compiled", "reverse", 1.0, compiled=True),
    Contender(
        "liger_fused_linear_jsd",
        "jsd",
        ("hidden",),
        build_liger_fused,
        ({"beta": 0.5, "accum": "none"}, {"beta": 0.5, "accum": "fp32"}),
        "liger-kernel",
        ("cuda",),
    ),
    _trl("trl_reverse", "reverse", 1.0),
    _trl("trl_forward", "forward", 0.0),
    _trl("trl_jsd", "jsd", 0.5),
    Contender(
        "orda_entropy_gate",
        "entropy",
        ("hidden", "full"),
        build_orda,
        tuple({"rows": rows, "accum": "auto"} for rows in ("dynamic", "fast", 2048)),
        "orda-kernel",
    ),
)
