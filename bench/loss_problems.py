"""What `bench/loss.py` measures on: seeded problems, the objectives by their definition, and float64
references.

Shape suffixes: N positions, V vocabulary, K kept ids, d / D width of student / teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from dualkl import DualKLConfig, HiddenTeacher, LogitsTeacher, Teacher, TopKTeacher
from dualkl.compress import compress

CONFIG = DualKLConfig()
ENTROPY_GATE_MIDDLE, ENTROPY_GATE_WIDTH = 0.5, 0.1  # orda-kernel's defaults, entropies divided by ln V
WEIGHT_SCALE = 0.03
POSITIONS_COMPARED, IDS_COMPARED = 512, 4096


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem."""

    num_rows: int
    num_ids: int
    width: int
    teacher_width: int = 5120
    k: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        kind = "-fp32" if self.dtype == torch.float32 else ""
        return f"N{self.num_rows}-V{self.num_ids}-d{self.width}{kind}"


@dataclass(frozen=True)
class Reference:
    """Loss, R, F, λ of all positions in float64; dX of some positions and dW of some ids. On the CPU."""

    loss: float
    columns: dict[str, Tensor]
    positions: Tensor
    hidden_gradient: Tensor
    ids: Tensor
    weight_gradient: Tensor


@dataclass
class Problem:
    """Hidden states and heads of a student and a teacher near it; teachers and references made on demand."""

    shape: Shape
    hidden_Nd: Tensor
    weight_Vd: Tensor
    teacher_hidden_ND: Tensor
    teacher_weight_VD: Tensor
    _teachers: dict[str, Teacher] = field(default_factory=dict)
    _references: dict[tuple[str, str], Reference] = field(default_factory=dict)

    def teacher(self, kind: str) -> Teacher:
        """The teacher as hidden states and head, as logits ("full"), or as its top-k and tail."""
        if kind not in self._teachers:
            if kind != "full":
                self._teachers.pop("full", None)  # the only large one
            self._teachers[kind] = self._make_teacher(kind)
        return self._teachers[kind]

    @torch.no_grad()
    def _make_teacher(self, kind: str) -> Teacher:
        hidden_ND, weight_VD = self.teacher_hidden_ND, self.teacher_weight_VD
        if kind == "hidden":
            return HiddenTeacher(hidden_ND, weight_VD)
        if kind == "full":
            return LogitsTeacher(hidden_ND @ weight_VD.T)
        zeros_N = torch.zeros(len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
        kept = compress(hidden_ND, weight_VD, zeros_N, k=self.shape.k)
        return TopKTeacher(kept.ids, kept.logprobs, kept.log_tail_mass)

    def reference(self, kind: str, job: str) -> Reference:
        """The float64 result of `job`, computed once."""
        if (kind, job) not in self._references:
            self._references[kind, job] = make_reference(self, kind, job)
        return self._references[kind, job]


@torch.no_grad()
def make_problem(shape: Shape, device: str, seed: int = 0) -> Problem:
    """Logits like a language model's, in a student and a teacher whose divergence differs between positions.

    Student and teacher share half of the student's width, which gives logits of standard deviation 1.5 to 3.5
    and a peak of up to 25 at one id; the rest of each adds noise of its own, 0.1 to 2 per position, so that R
    spreads from about 0.005 to 2 nats and the gate over (0, 1).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def uniform() -> Tensor:
        return torch.rand(shape.num_rows, 1, generator=generator, device=device)

    shared = shape.width // 2
    embedding_Vr = normal(shape.num_ids, shared)
    state_Nr = normal(shape.num_rows, shared) * (1.5 + 2 * uniform()) / math.sqrt(shared)
    peak_Nr = embedding_Vr[(uniform()[:, 0].pow(3) * shape.num_ids).long().clamp_(max=shape.num_ids - 1)]
    state_Nr += 25 * uniform() * peak_Nr / peak_Nr.square().sum(1, keepdim=True)
    noise_N1 = torch.exp(math.log(0.1) + uniform() * math.log(20)) / math.sqrt(2)

    def model(width: int) -> tuple[Tensor, Tensor]:
        own = width - shared
        weight = torch.cat([embedding_Vr, normal(shape.num_ids, own)], 1).mul_(WEIGHT_SCALE).to(shape.dtype)
        hidden = torch.cat([state_Nr, normal(shape.num_rows, own) * noise_N1 / math.sqrt(own)], 1)
        return hidden.div_(WEIGHT_SCALE).to(shape.dtype), weight

    return Problem(shape, *model(shape.width), *model(shape.teacher_width))


def objective(
    job: str, logits_NV: Tensor, teacher: Tensor | TopKTeacher
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, R, F, λ) per position by their definitions, in the dtype of the logits; differentiable in the
    loss.

    `teacher` is logits [N, V] or a top-k teacher whose slots are all filled. Jobs: "gated" (the dual KL of
    `CONFIG`), "forward" F, "reverse" R, "jsd" (mixture one half), "entropy" (orda-kernel's: F weighted by the
    teacher's entropy).
    """
    if isinstance(teacher, TopKTeacher):
        logp_NC, logq_NC = _topk_outcomes(logits_NV, teacher)
    else:
        logp_NC, logq_NC = log_softmax(logits_NV, 1), log_softmax(teacher, 1)
    p_NC, q_NC = logp_NC.exp(), logq_NC.exp()
    if job == "jsd":
        logm_NC = torch.logaddexp(logp_NC, logq_NC) - math.log(2)
        loss_N = ((p_NC * (logp_NC - logm_NC)).sum(1) + (q_NC * (logq_NC - logm_NC)).sum(1)) / 2
        return loss_N, loss_N.detach(), loss_N.detach(), torch.zeros_like(loss_N)
    difference_NC = logp_NC - logq_NC
    rkl_N, fkl_N = (p_NC * difference_NC).sum(1), -(q_NC * difference_NC).sum(1)
    if job == "gated":
        gate_N = torch.sigmoid(CONFIG.alpha * (CONFIG.tau - rkl_N.detach()))
    elif job == "entropy":
        entropy_N = -(q_NC * logq_NC).sum(1) / math.log(logits_NV.shape[1])
        gate_N = 1 - torch.sigmoid((entropy_N - ENTROPY_GATE_MIDDLE) / ENTROPY_GATE_WIDTH)
    else:
        gate_N = torch.full_like(rkl_N, {"forward": 0.0, "reverse": 1.0}[job])
    return gate_N * rkl_N + (1 - gate_N) * fkl_N, rkl_N.detach(), fkl_N.detach(), gate_N


def _topk_outcomes(logits_NV: Tensor, teacher: TopKTeacher) -> tuple[Tensor, Tensor]:
    """(student, teacher) logprobs of the kept ids and the tail bucket."""
    ids_NK = teacher.ids.long()
    lse_N1 = logits_NV.logsumexp(1, keepdim=True)
    tail_N1 = logits_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1, keepdim=True)
    logp_NC = torch.cat([logits_NV.gather(1, ids_NK), tail_N1], 1) - lse_N1
    floored_N1 = teacher.log_tail_mass[:, None].clamp(min=math.log(CONFIG.tail_floor))
    return logp_NC, log_softmax(torch.cat([teacher.logprobs, floored_N1], 1).to(logits_NV.dtype), 1)


def make_reference(problem: Problem, kind: str, job: str) -> Reference:
    """`objective` and its gradient through the head in float64, 256 positions at a time, on the problem's
    device.
    """
    num_rows, num_ids = problem.shape.num_rows, problem.shape.num_ids
    positions = _spread(num_rows, POSITIONS_COMPARED, problem.hidden_Nd)
    ids = _spread(num_ids, IDS_COMPARED, problem.hidden_Nd)
    weight_Vd = problem.weight_Vd.double()
    teacher_weight_VD = problem.teacher_weight_VD.double() if kind == "hidden" else None
    weight_gradient = torch.zeros(len(ids), problem.shape.width, dtype=torch.float64, device=ids.device)
    parts, hidden_gradients = [], []
    for start in range(0, num_rows, 256):
        rows = slice(start, min(start + 256, num_rows))
        hidden_Nd = problem.hidden_Nd[rows].double()
        logits_NV = (hidden_Nd @ weight_Vd.T).requires_grad_()
        columns = objective(job, logits_NV, _teacher_rows(problem, kind, rows, teacher_weight_VD))
        (gradient_NV,) = torch.autograd.grad(columns[0].sum() / num_rows, logits_NV)
        chosen = positions[(positions >= rows.start) & (positions < rows.stop)] - rows.start
        hidden_gradients.append((gradient_NV[chosen] @ weight_Vd).cpu())
        weight_gradient += gradient_NV[:, ids].T @ hidden_Nd
        parts.append([column.detach().cpu() for column in columns])
        del logits_NV, gradient_NV, columns
    loss_N, rkl_N, fkl_N, gate_N = (torch.cat(column) for column in zip(*parts))
    return Reference(
        float(loss_N.mean()),
        {"rkl": rkl_N, "fkl": fkl_N, "gate": gate_N},
        positions.cpu(),
        torch.cat(hidden_gradients),
        ids.cpu(),
        weight_gradient.cpu(),
    )


def _teacher_rows(
    problem: Problem, kind: str, rows: slice, teacher_weight_VD: Tensor | None
) -> Tensor | TopKTeacher:
    if teacher_weight_VD is not None:
        return problem.teacher_hidden_ND[rows].double() @ teacher_weight_VD.T
    teacher = problem.teacher(kind)
    if isinstance(teacher, TopKTeacher):
        return TopKTeacher(
            teacher.ids[rows], teacher.logprobs[rows].double(), teacher.log_tail_mass[rows].double()
        )
    assert isinstance(teacher, LogitsTeacher)
    return teacher.logits[rows].double()


def _spread(total: int, wanted: int, like: Tensor) -> Tensor:
    """About `wanted` indices, evenly over range(total)."""
    return torch.arange(0, total, max(1, total // wanted), device=like.device)
