"""`dual_kl` on a CUDA device: bfloat16 products, float32 statistics, no waiting for the device, bounded memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dualkl import DualKLConfig, Head, HiddenTeacher, TopKTeacher, dual_kl
from dualkl.divergences import compare, gather_logprobs
from dualkl.targets import compress
from tests.test_dualkl_losses import METHODS, Case, N, d, gradients, relative_error

pytestmark = pytest.mark.gpu


def moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cuda().requires_grad_(value.requires_grad)
    return {key: moved(x) for key, x in value.items()} if isinstance(value, dict) else value


def on_gpu(case: Case) -> Case:
    """A copy of the case whose tensors are on the CUDA device."""
    copy = Case.__new__(Case)
    vars(copy).update({name: moved(value) for name, value in vars(case).items()})
    return copy


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
@pytest.mark.parametrize("full_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_value_and_gradient_are_the_oracles(kind: str, full_head: bool, dtype: torch.dtype) -> None:
    cpu = Case(full_head, 1.3, 491, dtype)
    gpu = on_gpu(cpu)
    value, slope = (1e-9, 1e-9) if dtype == torch.float64 else (1e-3, 2**-8 + 1e-3)
    for gating, rkl, fkl in METHODS[:4] + METHODS[8:]:
        config = cpu.config(gating=gating, rkl=rkl, fkl=fkl)
        wanted, found = cpu.oracle(kind, config), gpu.run(kind, config, chunk_rows=3, check=True)
        for name in ("rkl", "fkl"):
            torch.testing.assert_close(getattr(found, name).cpu().double(), wanted[name], rtol=value, atol=3e-6)
        pairs = zip(gradients(found.loss, gpu.leaves), gradients(wanted["loss"], cpu.leaves), strict=True)
        assert max(relative_error(f.cpu(), w) for f, w in pairs) < slope


@pytest.mark.parametrize("kind", ["logits", "hidden", "topk"])
def test_nothing_waits_for_the_device(kind: str) -> None:
    gpu = on_gpu(Case(True, dtype=torch.bfloat16))
    gpu.run(kind, gpu.config(rkl="mc")).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.run(kind, gpu.config(rkl="mc")).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_values_are_checked_on_request() -> None:
    gpu = on_gpu(Case())
    gpu.topk["logprobs"] = gpu.topk["logprobs"].log_softmax(1)
    gpu.run("topk", gpu.config())
    with pytest.raises(ValueError, match="masses that do not add up to 1"):
        gpu.run("topk", gpu.config(), check=True)


def test_memory_stays_far_below_that_of_all_logits() -> None:
    num_rows, num_ids = 8192, 65_536
    hidden = torch.randn(num_rows, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(num_ids, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    teacher = HiddenTeacher(torch.randn_like(hidden), torch.randn_like(weight))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dual_kl(hidden, weight, teacher, DualKLConfig(), chunk_rows=512).loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 0.35 * num_rows * num_ids * 4


def test_measuring_and_compressing_agree_with_the_cpu() -> None:
    cpu = Case(True)
    gpu = on_gpu(cpu)
    kept = [compress(c.teacher_hidden, c.teacher_weight, c.sampled_ids, k=5, p=0.8) for c in (cpu, gpu)]
    found = []
    for case, part in zip((cpu, gpu), kept, strict=True):
        teacher = TopKTeacher(part.ids, part.logprobs, part.log_tail_mass)
        head = Head(case.weight, case.bias, 0.8, 6.0)
        measured = compare(case.hidden, head, teacher)
        logprobs = gather_logprobs(case.hidden, head, case.sampled_ids)
        found.append([x.cpu() for x in (*vars(part).values(), *vars(measured).values(), logprobs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert len(found[0][0]) == N
    assert math.isfinite(found[0][-1].sum())
