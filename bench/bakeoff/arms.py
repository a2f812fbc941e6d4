"""The arms: objectives to compare, as keys of the configuration and, where the library has no such objective,
a patched loss.

A patched loss first runs the library's without gradient for its statistics. An arm that sets λ by another
rule then runs it again with a threshold per position, which makes the soft gate give exactly that λ; the
others replace the loss by a few lines of autograd over chunks of positions.

Shape suffixes: N positions, V vocabulary, K kept ids, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dualkl import DualKLConfig, DualKLOutput, Head, TopKTeacher, dual_kl
from stages.data.alignment import at_scored
from stages.data.batches import MicroBatch
from stages.models.student import Student

START_SHARE = 0.02
"""1 - λ of a soft gate at D = 0; with α τ = -logit(START_SHARE), λ(τ) = 1/2 and λ(2τ) = START_SHARE."""
ADAPTIVE_SHARE = 0.5
SUPPRESSED_SHARE, NEGATIVE_ADVANTAGE = 0.2, -0.5
CHUNK = 1024  # positions
LARGEST_LOGIT = 30.0  # of λ; sigmoid(30) is 1 in float32


@dataclass(frozen=True)
class Arm:
    """One objective.

    Attributes:
        keys: configuration keys besides those of the gate's threshold.
        gate_on: the divergence whose start decides τ and α; "" without a threshold.
        patch: name of a patched loss (`PATCHES`); "" for the library's own.
        mean_of: the arm whose mean λ over training is this one's constant λ.
        source: where the objective comes from.
    """

    what: str
    keys: dict[str, Any]
    gate_on: str = ""
    patch: str = ""
    mean_of: str = ""
    source: str = ""


ARMS = {
    "reverse": Arm("reverse KL", {"gating": 1.0}, source="arXiv 2306.08543"),
    "soft": Arm("gate on R, soft", {"gating": "soft"}, "rkl", source="this project"),
    "forward": Arm("forward KL", {"gating": 0.0}, source="arXiv 2306.13649"),
    "mix-mean": Arm("constant λ = mean λ of soft", {}, mean_of="soft", source="control"),
    "shuffled": Arm(
        "λ of soft, shuffled over tokens", {"gating": "soft"}, "rkl", "shuffled", source="control"
    ),
    "mix-0.5": Arm("constant λ = 0.5", {"gating": 0.5}, source="control"),
    "hard": Arm("gate on R, hard", {"gating": "hard"}, "rkl", source="arXiv 2606.01249 (TrOPD), simplified"),
    "adaptive": Arm(
        "gate on R, τ adapts to mean λ 0.5",
        {"gating": "soft", "tau_share": ADAPTIVE_SHARE},
        "rkl",
        source="this project",
    ),
    "entropy": Arm(
        "gate on the teacher's entropy",
        {"gating": "soft", "gate_on": "teacher_entropy"},
        "teacher_entropy",
        source="arXiv 2603.07079 (EOPD), as a mixture",
    ),
    "on-forward": Arm("gate on F", {"gating": "soft", "gate_on": "fkl"}, "fkl", source="this project"),
    "log-ratio": Arm(
        "λ = σ(ln q(y) - ln p(y))",
        {"gating": "soft", "tau": 1.0, "alpha": 1.0},
        patch="log_ratio",
        source="arXiv 2605.15155 (SDAR), as a mixture",
    ),
    "sdar": Arm(
        "reverse KL, weighted by σ(ln q(y) - ln p(y))",
        {"gating": 1.0},
        patch="weighted",
        source="arXiv 2605.15155 (SDAR), distillation term",
    ),
    "jsd": Arm("Jensen-Shannon, β = 0.5", {"objective": "jsd", "gating": 0.5}, source="arXiv 2306.13649"),
    "mc": Arm(
        "reverse KL, sampled token", {"gating": 1.0, "rkl": "mc"}, source="arXiv 2306.08543, 2605.07865"
    ),
    "argmax": Arm(
        "cross-entropy on the teacher's top token", {"gating": 0.0, "fkl": "argmax"}, source="control"
    ),
    "negative": Arm(
        "advantage -0.5 on the least likely 20 % of sampled tokens, no teacher",
        {"gating": 1.0},
        patch="negative",
        source="arXiv 2608.31046",
    ),
    "reverse-renormalised": Arm(
        "reverse KL over the kept ids, renormalised", {"gating": 1.0}, patch="renormalised", source="control"
    ),
    "forward-renormalised": Arm(
        "forward KL over the kept ids, renormalised", {"gating": 0.0}, patch="renormalised", source="control"
    ),
    "soft-renormalised": Arm(
        "gate on R; both KLs over the kept ids, renormalised",
        {"gating": "soft"},
        "rkl",
        "renormalised",
        source="control",
    ),
}
OBJECTIVES = [name for name in ARMS if not name.endswith("renormalised")]


@dataclass(frozen=True)
class Threshold:
    """τ in nats and α per nat of a gate on one divergence, and the mean λ that they give at the start."""

    tau: float
    alpha: float
    mean_gate: float


def threshold_of(divergence_N: Tensor, least: float = 1e-3) -> Threshold:
    """τ is the median of D over the tokens with D above `least` nats; α makes λ(0) = 1 - START_SHARE."""
    positive_M = divergence_N[divergence_N > least]
    if not len(positive_M):
        raise ValueError(f"none of {len(divergence_N)} tokens has a divergence above {least} nats.")
    tau = float(positive_M.double().median())
    alpha = float(torch.logit(torch.tensor(1 - START_SHARE, dtype=torch.float64))) / tau
    mean = float(torch.sigmoid(alpha * (tau - divergence_N.double())).mean())
    return Threshold(tau, alpha, mean)


# --- patched losses ---


@dataclass(frozen=True, eq=False)
class Positions:
    """Inputs of one forward's loss: as `dual_kl` takes them, all on one device."""

    hidden_Nd: Tensor
    head: Head
    batch: MicroBatch
    config: DualKLConfig

    def loss(self, tau: Any = None, weights_N: Tensor | None = None) -> DualKLOutput:
        """The library's loss. `tau`, `weights_N`: in place of the batch's."""
        batch = self.batch
        return dual_kl(
            self.hidden_Nd,
            self.head,
            batch.teacher,
            self.config,
            batch.sampled,
            batch.weights if weights_N is None else weights_N,
            tau=batch.tau if tau is None else tau,
            teacher_entropy=batch.teacher_entropy if self.config.gate_on == "teacher_entropy" else None,
        )


def with_gate(at: Positions, seen: DualKLOutput, logit_N: Tensor) -> DualKLOutput:
    """The library's loss with λ = sigmoid(logit_N), by a threshold of D + logit / α at each position."""
    return at.loss(tau=seen.rkl + logit_N.clamp(-LARGEST_LOGIT, LARGEST_LOGIT) / at.config.alpha)


def log_ratio_N(at: Positions, seen: DualKLOutput) -> Tensor:
    """ln q(y) - ln p(y) of the sampled tokens, nats."""
    assert seen.student_logprobs is not None
    return at.batch.sampled.teacher_logprobs - seen.student_logprobs


def shuffled(at: Positions, seen: DualKLOutput) -> DualKLOutput:
    """The gate's own λ, each at another token of the forward."""
    order_N = torch.randperm(len(seen.gate), device=seen.gate.device)
    return with_gate(at, seen, torch.logit(seen.gate)[order_N])


def log_ratio(at: Positions, seen: DualKLOutput) -> DualKLOutput:
    """λ = σ(ln q(y) - ln p(y)): forward KL where the teacher thinks less of the sampled token."""
    return with_gate(at, seen, log_ratio_N(at, seen))


def weighted(at: Positions, seen: DualKLOutput) -> DualKLOutput:
    """Each token's loss times σ(ln q(y) - ln p(y)), detached."""
    return at.loss(weights_N=at.batch.weights * torch.sigmoid(log_ratio_N(at, seen)))


def negative(at: Positions, seen: DualKLOutput) -> DualKLOutput:
    """-A ln p(y) with a constant A < 0, on the sampled tokens of lowest probability, without the teacher."""
    assert seen.student_logprobs is not None
    count = max(1, round(SUPPRESSED_SHARE * len(seen.student_logprobs)))
    chosen_M = seen.student_logprobs.topk(count, largest=False).indices
    ids_M = at.batch.sampled.ids.long()[chosen_M]

    def nll(logits_MV: Tensor, rows: slice) -> Tensor:
        return functional.cross_entropy(logits_MV, ids_M[rows], reduction="none")

    nll_M = over_chunks(at, at.hidden_Nd[chosen_M], nll)
    loss = NEGATIVE_ADVANTAGE * (at.batch.weights[chosen_M] * nll_M).sum()
    return replace(seen, loss=loss)


def renormalised(at: Positions, seen: DualKLOutput) -> DualKLOutput:
    """Both KLs over the kept ids alone, student and teacher normalised over them; λ is the library's."""
    teacher = at.batch.teacher
    if not isinstance(teacher, TopKTeacher):
        raise ValueError(
            f"the teacher is a {type(teacher).__name__}; renormalised needs kept ids (topk, nucleus)."
        )
    kept_NK = teacher.ids >= 0
    ids_NK = teacher.ids.clamp(min=0).long()
    logq_NK = teacher.logprobs.float().masked_fill(~kept_NK, -torch.inf).log_softmax(1)

    def mix(logits_MV: Tensor, rows: slice) -> Tensor:
        kept_MK, logq_MK, gate_M = kept_NK[rows], logq_NK[rows], seen.gate[rows]
        logp_MK = logits_MV.gather(1, ids_NK[rows]).masked_fill(~kept_MK, -torch.inf).log_softmax(1)
        ratio_MK = torch.where(kept_MK, logp_MK - logq_MK, 0)
        reverse_M = (logp_MK.exp() * ratio_MK).sum(1)
        forward_M = -(logq_MK.exp() * ratio_MK).sum(1)
        return gate_M * reverse_M + (1 - gate_M) * forward_M

    return replace(seen, loss=(at.batch.weights * over_chunks(at, at.hidden_Nd, mix)).sum())


def over_chunks(at: Positions, hidden_Nd: Tensor, of: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """`of(logits_MV, rows)` of all positions, with logits in float32 for one chunk at a time."""
    head = at.head
    if head.scale != 1.0 or head.softcap is not None:
        raise ValueError(
            "the patched losses apply the head as one product; this one scales or caps its logits."
        )
    weight_Vd = head.weight[: at.config.vocab_size]
    bias_V = None if head.bias is None else head.bias[: at.config.vocab_size]

    def part(hidden_Md: Tensor, start: int) -> Tensor:
        with torch.autocast(hidden_Md.device.type, enabled=False):
            logits_MV = functional.linear(hidden_Md, weight_Vd.to(hidden_Md.dtype), bias_V).float()
        return of(logits_MV, slice(start, start + len(hidden_Md)))

    parts = [
        checkpoint(part, hidden_Nd[start : start + CHUNK], start, use_reentrant=False)
        for start in range(0, len(hidden_Nd), CHUNK)
    ]
    return torch.cat(parts)


PATCHES = {
    "shuffled": shuffled,
    "log_ratio": log_ratio,
    "weighted": weighted,
    "negative": negative,
    "renormalised": renormalised,
}


class PatchedLoss(nn.Module):
    """Student forward and a patched loss, in place of `stages.loops.steps.StudentLoss`."""

    def __init__(self, student: Student, config: DualKLConfig, patch: str) -> None:
        super().__init__()
        self.model = student.model
        self._student, self._config, self._patch = student, config, PATCHES[patch]

    def forward(self, batch: MicroBatch) -> tuple[Tensor, DualKLOutput]:
        hidden_Nd = at_scored(self._student.hidden(batch.aligned), batch.aligned)
        at = Positions(hidden_Nd, self._student.head, batch, self._config)
        with torch.no_grad():
            seen = at.loss()
        out = self._patch(at, seen)
        return out.loss, out
