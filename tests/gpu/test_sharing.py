"""Shared prompts on a GPU: the flash kernel's masks, bf16 gradients, compiled layers, no waiting."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from dualkl import DualKLConfig, LogitsTeacher, dual_kl
from stages.data.alignment import Aligned, align, at_scored
from stages.models import packing
from stages.models.packing import enable_packing, model_inputs
from stages.models.pretrained import head_of
from stages.models.student import compile_layers

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
GROUPS = ((700, (300, 1, 512, 64)), (1, (33, 90)), (128, (256,)), (513, (7, 640)))
"""Tokens of a prompt and of its completions."""
V = 1000
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}
MODELS = {"qwen3": Qwen3Config(**SHAPE), "with a window": MistralConfig(**SHAPE, sliding_window=200)}


def batch(shared: bool, device: torch.device = GPU) -> Aligned:
    random = np.random.default_rng(0)
    prompts, completions = [], []
    for length, sizes in GROUPS:
        prompts += [random.integers(2, V, length)] * len(sizes)
        completions += [random.integers(2, V, size) for size in sizes]
    return align(prompts, completions, 0, device, packed=True, shared=shared)


def model_of(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32, attn_implementation="sdpa")
    assert enable_packing(model, True) == ""
    return model.to(GPU, dtype).train()


def forward(model: Any, aligned: Aligned) -> list[torch.Tensor]:
    """States at the scored positions, and the gradient of a loss on them by all weights, in float32."""
    inputs = model_inputs(aligned, model.config._attn_implementation)
    hidden_Nd = at_scored(model.get_decoder()(**inputs, use_cache=False).last_hidden_state, aligned)
    teacher = torch.randn(len(hidden_Nd), V, generator=torch.Generator().manual_seed(1)).to(GPU)
    model.zero_grad()
    dual_kl(hidden_Nd, head_of(model), LogitsTeacher(teacher), DualKLConfig()).loss.backward()
    gradients = [p.grad.float().clone() for p in model.parameters() if p.grad is not None]
    return [hidden_Nd.detach().float(), *gradients]


def gaps(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("window", [None, 100])
def test_queries_at_the_end_of_copied_keys_are_sdpa_by_groups(window: int | None) -> None:
    layout = batch(shared=True).packing
    assert layout is not None
    random = torch.Generator(device="cuda").manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        size = sum(layout.lengths), heads, 128
        return torch.randn(size, device=GPU, dtype=torch.bfloat16, generator=random)

    leaves, upstream, found = [normal(heads).requires_grad_() for heads in (8, 2, 2)], normal(8), []
    for function in (packing._varlen, lambda *a: packing._by_groups(*a, 0.0)):
        out = function(leaves[0], leaves[1], leaves[2], layout, 0.1, window)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for name, kernel, alone in zip(("out", "query", "key", "value"), *found, strict=True):
        gap = float((kernel.float() - alone.float()).norm() / alone.float().norm())
        assert gap < 1e-2, (name, gap)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_shared_prompts_are_as_near_to_float32_as_rows_alone(name: str, is_compiled: bool) -> None:
    torch._dynamo.reset()
    exact_model = model_of(name, torch.float32)
    exact = forward(exact_model, batch(shared=False))
    assert max(gaps(forward(exact_model, batch(shared=True)), exact)) < 1e-4
    model = model_of(name, torch.bfloat16)
    if is_compiled:
        compile_layers(model)
    alone, shared = (gaps(forward(model, batch(shared=wanted)), exact) for wanted in (False, True))
    for one, both in zip(shared, alone, strict=True):
        assert one <= 1.25 * both + 2e-3, (one, both)


def test_the_host_does_not_wait_for_shared_prompts() -> None:
    model = model_of("qwen3", torch.bfloat16)
    forward(model, batch(shared=True))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        aligned = batch(shared=True)
        inputs = model_inputs(aligned, model.config._attn_implementation)
        states = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        at_scored(states, aligned).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
