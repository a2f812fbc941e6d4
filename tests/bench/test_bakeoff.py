"""The bake-off's own losses against plain autograd, and its order of cells."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.bakeoff.arms import ARMS, PATCHES, Positions, threshold_of
from bench.bakeoff.measures import pass_at
from bench.bakeoff.tasks import TINY, Cell, Results, plan
from dualkl import DualKLConfig, Head, Sampled, TopKTeacher

N, V, K, D = 21, 50, 5, 8


def positions(config: DualKLConfig) -> tuple[Positions, Tensor, Tensor]:
    """Inputs at random, and the logits of both sides [N, V]; the student's have gradients."""
    torch.manual_seed(1)
    hidden = torch.randn(N, D, requires_grad=True)
    head, teacher = torch.randn(V, D), torch.randn(N, V).mul(2).log_softmax(1)
    top = teacher.topk(K, 1)
    tail = torch.log1p(-top.values.exp().sum(1))
    ids = torch.randint(V, (N,))
    sampled = Sampled(ids, teacher.gather(1, ids[:, None])[:, 0], torch.zeros(N))
    batch = SimpleNamespace(
        teacher=TopKTeacher(top.indices, top.values, tail),
        sampled=sampled,
        weights=torch.full((N,), 1 / N),
        tau=None if config.gating == "fixed" else config.tau,
        teacher_entropy=None,
    )
    return Positions(hidden, Head(head), cast(Any, batch), config), hidden @ head.t(), teacher


def both_kls(logits: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
    """Bucketed R and F by autograd."""
    teacher = cast(TopKTeacher, at.batch.teacher)
    logp = logits.log_softmax(1)
    kept = logp.gather(1, teacher.ids)
    p = torch.cat([kept, torch.log1p(-kept.exp().sum(1, keepdim=True))], 1)
    q = torch.cat([teacher.logprobs, teacher.log_tail_mass[:, None]], 1)
    return (p.exp() * (p - q)).sum(1), (q.exp() * (q - p)).sum(1)


def expected(patch: str, logits: Tensor, teacher: Tensor, at: Positions) -> Tensor:
    ids = at.batch.sampled.ids
    logp_y = logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
    delta = (teacher.gather(1, ids[:, None])[:, 0] - logp_y).detach()
    reverse, forward = both_kls(logits, at)
    if patch == "log_ratio":
        gate = torch.sigmoid(delta)
        return (gate * reverse + (1 - gate) * forward).mean()
    if patch == "weighted":
        return (torch.sigmoid(delta) * reverse).mean()
    if patch == "shuffled":
        gate = torch.sigmoid(at.config.alpha * (at.config.tau - reverse.detach()))
        gate = gate[torch.randperm(N)]
        return (gate * reverse + (1 - gate) * forward).mean()
    if patch == "negative":
        lowest = logp_y.argsort()[:4]  # 20 % of 21
        return 0.5 * logp_y[lowest].sum() / N
    top = cast(TopKTeacher, at.batch.teacher).ids
    p, q = logits.gather(1, top).log_softmax(1), teacher.gather(1, top).log_softmax(1)
    gate = torch.sigmoid(at.config.alpha * (at.config.tau - reverse.detach()))
    mixed = gate * (p.exp() * (p - q)).sum(1) + (1 - gate) * (q.exp() * (q - p)).sum(1)
    return mixed.mean()


@pytest.mark.parametrize("patch", PATCHES)
def test_patched_loss_and_gradient_equal_autograd(patch: str) -> None:
    fixed = DualKLConfig(gating="fixed", mix=1.0)
    config = fixed if patch in ("weighted", "negative") else DualKLConfig(tau=0.7, alpha=2.0)
    if patch == "log_ratio":
        config = DualKLConfig(tau=1.0, alpha=1.0)
    at, logits, teacher = positions(config)
    with torch.no_grad():
        seen = at.loss()
    torch.manual_seed(5)
    found = PATCHES[patch](at, seen).loss
    torch.manual_seed(5)
    wanted = expected(patch, logits, teacher, at)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss, at.hidden_Nd, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_threshold_is_the_median_of_positive_divergences() -> None:
    found = threshold_of(torch.tensor([0.0, 0.0, 0.2, 0.4, 3.0]))
    assert found.tau == pytest.approx(0.4)
    assert torch.sigmoid(torch.tensor(found.alpha * found.tau)) == pytest.approx(0.98, abs=1e-6)


def test_pass_at_k_counts_every_choice_of_samples() -> None:
    assert pass_at(np.array([0, 1, 4]), 4, 1) == pytest.approx([0, 0.25, 1])
    assert pass_at(np.array([0, 1, 2]), 4, 2) == pytest.approx([0, 0.5, 5 / 6])


def test_plan_begins_with_all_objectives_of_seed_0_and_results_survive_a_cut_journal(tmp_path: Any) -> None:
    journal = tmp_path / "journal.jsonl"
    results = Results(tmp_path / "one", lambda task: TINY, journal)
    cells = [job for job in plan(results, ["demo"], {"demo": ["demo"]}) if isinstance(job, Cell)]
    objectives = [name for name in ARMS if not name.endswith("renormalised")]
    assert [(c.arm, c.seed) for c in cells[: len(objectives)]] == [(name, 0) for name in objectives]
    record = {"sizes": json.loads(json.dumps(TINY.__dict__)), "x": 1}
    results.put(cells[0].name, record)
    journal.write_text(journal.read_text() + '{"name": "cut o')
    other = Results(tmp_path / "two", lambda task: TINY)
    assert other.take(journal) == 1
    assert other.get(cells[0]) == record
