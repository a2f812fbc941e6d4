"""Float64 oracles: the gated dual KL position by position, written directly from its definition.

They share no code with `dualkl`; gradients come from autograd. A teacher is one of
    {"logits": [N, V]}, {"hidden": [N, D], "head": head} or
    {"ids": [N, K], "logprobs": [N, K], "log_tail_mass": [N]}.
A head is {"weight": [V, d]} and optionally "bias", "scale", "softcap". `config` is any object with the
attributes of `DualKLConfig`. All values are in nats.
"""

import math
from typing import Any

import torch
from torch import Tensor


def head_logits(hidden: Tensor, head: dict[str, Any], vocab_size: int | None = None) -> Tensor:
    """cap(scale * (hidden @ weight.T + bias)) over the first vocab_size ids, float64, differentiable."""
    raw = hidden.double() @ head["weight"].double().T
    if head.get("bias") is not None:
        raw = raw + head["bias"].double()
    logits = raw * head.get("scale", 1.0)
    if head.get("softcap") is not None:
        logits = head["softcap"] * torch.tanh(logits / head["softcap"])
    return logits if vocab_size is None else logits[:, :vocab_size]


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Σ_c p_c (ln p_c - ln q_c) of one position, outcome by outcome; impossible outcomes of p add 0."""
    total = torch.zeros((), dtype=torch.float64)
    possible = [c for c in range(len(logp)) if logp[c] > -math.inf]
    for block in range(0, len(possible), 64):
        chosen = torch.tensor(possible[block : block + 64])
        total = total + (logp[chosen].exp() * (logp[chosen] - logq[chosen])).sum()
    return total


def jensen_shannon(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """β KL(q || m) + (1 - β) KL(p || m), m = β q + (1 - β) p, of one position (arXiv 2306.13649)."""
    log_mixture = torch.logaddexp(logq + math.log(beta), logp + math.log(1 - beta))
    return beta * kl(logq, log_mixture) + (1 - beta) * kl(logp, log_mixture)


def log_softmax(z: Tensor) -> Tensor:
    """z - max z - ln Σ exp(z - max z) of one position."""
    centred = z - z.max().detach()
    return centred - centred.exp().sum().log()


def smooth(logprob: Tensor, epsilon: float, num_ids: int, num_shares: int = 1) -> Tensor:
    """ln((1 - ε) q + ε num_shares / V)."""
    return ((1 - epsilon) * logprob.exp() + epsilon * num_shares / num_ids).log() if epsilon else logprob


def topk_outcomes(
    z: Tensor, teacher: dict[str, Any], row: int, tail_floor: float, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(student, teacher) logprobs of the kept ids and, unless all ids are kept, of the tail bucket (last)."""
    kept = [int(i) for i in teacher["ids"][row] if i >= 0]
    outside = [j for j in range(len(z)) if j not in set(kept)]
    logq = [smooth(teacher["logprobs"][row, slot].double(), smoothing, len(z)) for slot in range(len(kept))]
    lse = torch.logsumexp(z, 0)
    logp = [z[i] - lse for i in kept]
    if outside:
        floor = math.log(tail_floor) if tail_floor > 0 else -math.inf
        tail = smooth(teacher["log_tail_mass"][row].double(), smoothing, len(z), len(outside))
        logq.append(tail.clamp(min=floor))
        logp.append(torch.logsumexp(z[torch.tensor(outside)], 0) - lse)
    stacked = torch.stack(logq)
    return torch.stack(logp), stacked - torch.logsumexp(stacked, 0)


def gate(divergence: float, config: Any, tau: float | None = None) -> float:
    """λ of one position, as a plain number."""
    tau = config.tau if tau is None else tau
    if config.gating == "fixed":
        return float(config.mix)
    if config.gating == "hard":
        return 1.0 if divergence <= tau else 0.0
    x = config.alpha * (tau - divergence)
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def importance(student_logprob: float, behaviour_logprob: float, cap: float) -> float:
    """min(p(y) / μ(y), cap)."""
    return min(math.exp(student_logprob - behaviour_logprob), cap)


def position_loss(
    z: Tensor,
    teacher: dict[str, Any],
    row: int,
    config: Any,
    sampled: dict[str, Tensor] | None,
    tau: Tensor | None = None,
    teacher_entropy: Tensor | None = None,
) -> dict[str, Any]:
    """loss (differentiable in z), rkl, fkl and gate of one position; `z` and teacher logits at temperature.

    `tau` and `teacher_entropy` cover all positions.
    """
    threshold, epsilon = None if tau is None else float(tau[row]), config.teacher_smoothing
    logp_all = log_softmax(z)
    if "ids" not in teacher:
        logp, logq = logp_all, smooth(log_softmax(teacher["logits"][row]), epsilon, len(z))
        top = int(logq.argmax())
    elif not (teacher["ids"][row] >= 0).any():
        given = teacher_entropy if config.gate_on == "teacher_entropy" else None
        weight = gate(0.0 if given is None else float(given[row]), config, threshold)
        return {"loss": z.sum() * 0, "rkl": 0.0, "fkl": 0.0, "gate": weight}
    else:
        logp, logq = topk_outcomes(z, teacher, row, config.tail_floor, epsilon)
        top = 0
    rkl, fkl = kl(logp, logq), kl(logq, logp)
    known = entropy(logq) if teacher_entropy is None else float(teacher_entropy[row])
    signals = {"rkl": float(rkl.detach()), "fkl": float(fkl.detach()), "teacher_entropy": known}
    weight = gate(signals[config.gate_on], config, threshold)
    reverse = rkl
    if config.rkl == "mc":
        assert sampled is not None
        logp_y = logp_all[int(sampled["ids"][row])]
        log_ratio = float(
            logp_y.detach() - smooth(sampled["teacher_logprobs"][row].double(), epsilon, len(z))
        )
        ratio = importance(
            float(logp_y.detach()), float(sampled["behaviour_logprobs"][row]), config.importance_cap
        )
        advantage = ratio * (log_ratio - float(rkl.detach()))
        reverse = ratio * log_ratio + advantage * (logp_y - logp_y.detach())
    forward = -logp[top] if config.fkl == "argmax" else fkl
    loss = weight * reverse + (1 - weight) * forward
    if config.objective == "jsd":
        loss = jensen_shannon(logp, logq, config.mix)
    return {"loss": loss, "rkl": float(rkl.detach()), "fkl": float(fkl.detach()), "gate": weight}


def dual_kl(
    hidden: Tensor,
    head: dict[str, Any],
    teacher: dict[str, Any],
    config: Any,
    sampled: dict[str, Tensor] | None = None,
    weights: Tensor | None = None,
    tau: Tensor | None = None,
    teacher_entropy: Tensor | None = None,
) -> dict[str, Tensor]:
    """The full loss, differentiable in hidden and the head's weight and bias; rkl, fkl, gate per position."""
    num_rows = hidden.shape[0]
    if weights is None:
        weights = torch.full((num_rows,), 1 / max(1, num_rows), dtype=torch.float64)
    vocab_size = config.vocab_size
    logits = head_logits(hidden, head, vocab_size) / config.temperature
    if "ids" not in teacher:
        dense = head_logits(teacher["hidden"], teacher["head"]) if "hidden" in teacher else teacher["logits"]
        dense = dense.double() if vocab_size is None else dense.double()[:, :vocab_size]
        teacher = {"logits": dense / config.temperature}
    loss = torch.zeros((), dtype=torch.float64)
    rows: list[dict[str, Any]] = []
    for row in range(num_rows):
        rows.append(position_loss(logits[row], teacher, row, config, sampled, tau, teacher_entropy))
        loss = loss + float(weights[row]) * rows[-1]["loss"]
    columns = {
        name: torch.tensor([r[name] for r in rows], dtype=torch.float64) for name in ("rkl", "fkl", "gate")
    }
    return {"loss": loss, **columns}


def compress(
    logits: Tensor, k: int, p: float = 1.0, floor: int = 1
) -> tuple[list[list[int]], list[list[float]], list[float]]:
    """Kept ids by descending probability, their logprobs, and the log tail mass, one entry per position."""
    all_ids, all_logprobs, tails = [], [], []
    for z in logits.double():
        logq = log_softmax(z)
        order = sorted(range(len(z)), key=lambda j: -float(logq[j]))
        kept: list[int] = []
        while len(kept) < min(k, len(z)):
            mass = sum(math.exp(float(logq[j])) for j in kept)
            if p < 1 and len(kept) >= floor and mass >= p:
                break
            kept.append(order[len(kept)])
        rest = order[len(kept) :]
        all_ids.append(kept)
        all_logprobs.append([float(logq[j]) for j in kept])
        tails.append(float(torch.logsumexp(logq[torch.tensor(rest)], 0)) if rest else -math.inf)
    return all_ids, all_logprobs, tails


def entropy(logp: Tensor) -> float:
    """-Σ_j p_j ln p_j of one position."""
    return -sum(math.exp(float(x)) * float(x) for x in logp if x > -math.inf)
