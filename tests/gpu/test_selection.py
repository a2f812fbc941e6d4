"""`compress` on CUDA: the selection kernels at a real vocabulary, against torch.topk and float64."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from dualkl import Head
from dualkl.compress import Compressed, compress, compress_logits
from tests.gpu.test_loss import CountedKernel

pytestmark = pytest.mark.gpu

V, CUT, D = 151_936, 151_669, 1024
KERNELS = ("groups_kernel", "choose_kernel", "pick_kernel")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    from dualkl.kernels import selection

    counts: Counter[str] = Counter()
    for name in KERNELS:
        monkeypatch.setattr(selection, name, CountedKernel(name, getattr(selection, name), counts))
    return counts


def rows(num_rows: int, num_ids: int = V, spread: float = 3.0, seed: int = 1) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(num_rows, num_ids, generator=generator, device="cuda") * spread


def assert_exact(found: Compressed, logits: Tensor, sampled: Tensor, k: int) -> None:
    """ids are torch.topk's where no two logits are equal; numbers are float64's."""
    logq = logits.double().log_softmax(1)
    values, ids = logits.topk(k, dim=1)
    assert torch.equal(logits.gather(1, found.ids.long()), values)
    distinct = (values[:, 1:] != values[:, :-1]).all(1)
    assert torch.equal(found.ids[distinct], ids[distinct].int())
    assert all(len(set(row)) == k for row in found.ids.tolist())
    torch.testing.assert_close(
        found.logprobs.double(), logq.gather(1, found.ids.long()), rtol=1e-5, atol=3e-6
    )
    tail = logq.scatter(1, found.ids.long(), -math.inf).logsumexp(1)
    torch.testing.assert_close(found.log_tail_mass.double(), tail, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(found.entropy.double(), -(logq.exp() * logq).sum(1), rtol=1e-5, atol=3e-6)
    wanted = logq.gather(1, sampled[:, None])[:, 0]
    torch.testing.assert_close(found.sampled_logprobs.double(), wanted, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("k", [1, 2, 64, 100, 256, 1024])
@pytest.mark.parametrize("num_ids", [V, CUT, 32_000, 5000])
def test_the_ids_are_topks_and_the_numbers_float64s(k: int, num_ids: int, launches: Counter[str]) -> None:
    logits = rows(70, num_ids)
    logits[1:3] *= 4
    sampled = torch.arange(70, device="cuda") * 71 % num_ids
    assert_exact(compress_logits(logits, sampled, k=k), logits, sampled, k)
    assert launches == dict.fromkeys(KERNELS, 1)


@pytest.mark.parametrize("k", [64, 256])
def test_no_arrangement_hides_an_id(k: int, launches: Counter[str]) -> None:
    """All of the largest in one group's columns, in one segment, in order; whole rows of ties."""
    column = torch.arange(V, device="cuda")
    base = torch.linspace(-4, 4, V, device="cuda")
    lane = (column % 2048 < 4).float() * 20 + rows(1)[0]
    segment = (column // 16_384 == 3).float() * 20 + rows(1)[0]
    steps = (base * 8).round() / 8
    logits = torch.stack([base, base.flip(0), lane, segment, steps, torch.zeros_like(base)])
    sampled = torch.zeros(len(logits), dtype=torch.long, device="cuda")
    found = compress_logits(logits, sampled, k=k)
    assert_exact(found, logits, sampled, k)
    for _ in range(5):
        assert torch.equal(compress_logits(logits, sampled, k=k).ids, found.ids)
    assert launches == dict.fromkeys(KERNELS, 6)


@pytest.mark.parametrize("tail", [1e-6, 1e-14, 1e-52])
def test_the_tail_mass_is_accurate_however_small(tail: float) -> None:
    logits = torch.full((3, V), math.log(tail / (V - 2)), device="cuda")
    logits[:, [40_000, 150_001]] = math.log(0.5)
    for options in ({"k": 2}, {"k": 9, "p": 0.9}):
        found = compress_logits(logits, torch.zeros(3, dtype=torch.long, device="cuda"), **options)
        assert (found.log_tail_mass - math.log(tail)).abs().max() < 1e-5 * abs(math.log(tail))


def test_impossible_ids_are_not_kept_and_broken_rows_stay_alone() -> None:
    logits = rows(6)
    logits[0, 30:] = logits[4, :-3] = logits[3] = -math.inf
    logits[1, 77], logits[2, 78] = math.nan, math.inf
    found = compress_logits(logits, torch.zeros(6, dtype=torch.long, device="cuda"), k=64)
    assert (found.ids >= 0).sum(1).tolist() == [30, 0, 0, 0, 3, 64]
    assert found.entropy.isnan().tolist() == [False, True, True, True, False, False]
    assert found.log_tail_mass[[0, 4]].tolist() == [-math.inf] * 2
    assert torch.equal(found.ids[5], logits[5].topk(64).indices.int())


@pytest.mark.parametrize("options", [{"k": 64}, {"k": 256, "p": 0.9, "floor": 4}])
@pytest.mark.parametrize("cut", [None, CUT])
def test_a_bfloat16_head_agrees_with_the_plain_path(
    options: dict[str, Any], cut: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualkl import kernels

    generator = torch.Generator("cuda").manual_seed(4)
    hidden = torch.randn(300, D, generator=generator, device="cuda").bfloat16()
    weight = (torch.randn(V, D, generator=generator, device="cuda") * 3 * D**-0.5).bfloat16()
    head = Head(weight, torch.linspace(-1, 1, V, device="cuda"), 0.9, 20.0)
    sampled = torch.arange(300, device="cuda") * 501

    def run() -> Compressed:
        return compress(hidden, head, sampled, vocab_size=cut, temperature=0.8, chunk_rows=128, **options)

    found = run()
    monkeypatch.setattr(kernels, "selectable", lambda values, k: False)
    wanted = run()
    for column in ("entropy", "sampled_logprobs", "log_tail_mass"):
        torch.testing.assert_close(getattr(found, column), getattr(wanted, column), rtol=1e-5, atol=1e-5)
    assert ((found.ids >= 0).sum(1) - (wanted.ids >= 0).sum(1)).abs().max() <= 1  # p = 0.9 is met to rounding
    both = (found.ids >= 0) & (wanted.ids >= 0)
    torch.testing.assert_close(found.logprobs[both], wanted.logprobs[both], rtol=1e-5, atol=1e-5)
    assert (found.ids[both] == wanted.ids[both]).float().mean() > 0.999


def test_nothing_waits_for_the_device_and_logits_are_not_copied() -> None:
    logits = rows(1024)
    sampled = torch.zeros(1024, dtype=torch.long, device="cuda")
    compress_logits(logits, sampled, k=64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compress_logits(logits, sampled, k=64, p=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 0.15 * logits.nbytes


def test_more_ids_than_the_kernels_hold_run_in_plain_pytorch(launches: Counter[str]) -> None:
    logits, sampled = rows(3, 5000), torch.zeros(3, dtype=torch.long, device="cuda")
    found = compress_logits(logits, sampled, k=1500)
    assert not launches
    assert torch.equal(logits.gather(1, found.ids.long()), logits.topk(1500, dim=1).values)
