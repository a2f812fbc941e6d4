"""The engine's kernels on a CPU, under Triton's interpreter, against PyTorch.

Not collected by itself: `tests/stages/engine/test_kernels.py` runs it in its own process with
TRITON_INTERPRET=1.
"""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from stages.engine import fused_layers as fused
from stages.engine import kernels, sampling, slot_attention, weights
from stages.engine.joined import JoinedLinear, _Together
from stages.engine.sampling import Blocks, block_statistics
from stages.engine.slot_attention import plain_attention
from stages.engine.slots import SlotCache
from tests.support.small_models import CONFIGS, random_model, run, theirs
from tests.support.thinning import thinned

CAPACITY = 150


def problem(
    heads: int, kv_heads: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, SlotCache]:
    """Queries and slots, with NaN beyond each row's own positions."""
    generator = torch.Generator().manual_seed(heads + width)
    attended = torch.tensor([1, 17, 64, 65, 150], dtype=torch.int32)
    query = torch.randn(5, heads, width, generator=generator).to(dtype)
    keys, values = (
        torch.randn(5, kv_heads, CAPACITY, width, generator=generator).to(dtype) for _ in range(2)
    )
    slots = SlotCache([keys], [values])
    slots.attended = attended
    return query, slots


def poisoned(slots: SlotCache, window: int | None) -> tuple[Tensor, Tensor]:
    """K and V with NaN wherever a row must not attend."""
    place, attended = torch.arange(CAPACITY), slots.attended
    assert attended is not None
    hidden = place >= attended[:, None]
    if window is not None:
        hidden |= place < attended[:, None] - window
    keys, values = (
        tensor.masked_fill(hidden[:, None, :, None], math.nan) for tensor in (slots.keys[0], slots.values[0])
    )
    return keys, values


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window", "softcap", "splits"),
    thinned(
        7, [(4, 1, 32), (4, 4, 16), (14, 2, 64), (6, 2, 80), (20, 1, 24)], [None, 1, 33], [None, 2.5], [1, 3]
    ),
)
def test_attention_is_that_of_pytorch_and_sees_only_a_rows_own_keys(
    heads: int, kv_heads: int, width: int, window: int | None, softcap: float | None, splits: int
) -> None:
    query, slots = problem(heads, kv_heads, width)
    scale = 1.3 * width**-0.5
    wanted = plain_attention(query, slots.keys[0], slots.values[0], slots, scale, window, softcap)
    keys, values = poisoned(slots, window)
    assert slots.attended is not None
    found = kernels.decode_attention(query, keys, values, slots.attended, scale, window, softcap, splits)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_values_may_be_of_another_width_than_keys() -> None:
    query, slots = problem(4, 2, 48)
    values = slots.values[0][..., :40].contiguous()
    assert slots.attended is not None
    wanted = plain_attention(query, slots.keys[0], values, slots, 0.1, None, None)
    found = kernels.decode_attention(query, slots.keys[0], values, slots.attended, 0.1, None, None, 2)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_half_precision_attention_is_as_near_to_float64_as_pytorchs() -> None:
    """In float16: the interpreter treats bfloat16 as integers; tests/gpu/test_engine.py tests bfloat16."""
    query, slots = problem(8, 2, 64, torch.float16)
    assert slots.attended is not None
    arguments = (slots.keys[0], slots.values[0])
    exact = plain_attention(
        query.double(), slots.keys[0].double(), slots.values[0].double(), slots, 0.125, None, None
    )
    plain = plain_attention(query, *arguments, slots, 0.125, None, None)
    found = kernels.decode_attention(query, *arguments, slots.attended, 0.125, None, None, 2)
    assert found.dtype == torch.float16
    assert (found.double() - exact).norm() < 2 * (plain.double() - exact).norm()


def test_extreme_scores_stay_finite() -> None:
    query, slots = problem(4, 2, 32)
    assert slots.attended is not None
    wanted = plain_attention(query * 1e3, slots.keys[0], slots.values[0], slots, 1.0, None, None)
    for splits in (1, 4):
        found = kernels.decode_attention(
            query * 1e3, slots.keys[0], slots.values[0], slots.attended, 1.0, None, None, splits
        )
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_keys_and_values_are_stored_at_each_rows_place_and_nowhere_else() -> None:
    keys, values = torch.zeros(3, 2, 9, 24), torch.zeros(3, 2, 9, 16)
    places = torch.tensor([0, 8, 4])
    new = torch.randn(3, 1, 2, 24).transpose(1, 2)  # the layout that projections return
    kernels.store(new, new[..., :16], keys, values, places)
    wanted = torch.zeros_like(keys)
    wanted[torch.arange(3), :, places] = new.squeeze(2)
    assert torch.equal(keys, wanted)
    assert torch.equal(values, wanted[..., :16])


@pytest.mark.parametrize("num_ids", [5, 230, 1024, 3000])
def test_block_statistics_are_those_of_pytorch(num_ids: int) -> None:
    logits = torch.randn(4, num_ids + 3, generator=torch.Generator().manual_seed(num_ids)) * 4
    logits[0, 2:] = -math.inf
    logits[1, num_ids // 2] = 80.0
    logits = logits[:, :num_ids]
    for found, wanted in zip(kernels.block_statistics(logits, 1024), block_statistics(logits), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert kernels.block_statistics(logits, 1024)[1].isfinite().all()


def test_a_broken_logit_is_not_hidden() -> None:
    for value in (math.nan, math.inf):
        logits = torch.zeros(2, 2000)
        logits[1, 1500] = value
        mass = kernels.block_statistics(logits, 1024)[1]
        assert mass.isnan().tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("one_centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_is_the_formula(one_centred: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 24).to(dtype), torch.randn(24)
    wanted = fused.rms_norm(x, weight, 1e-6, one_centred)
    found = kernels.rms_norm(x, weight, 1e-6, one_centred)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-6 if dtype == torch.float32 else 2e-3, atol=1e-6)


@pytest.mark.parametrize("one_centred", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 40])
def test_a_norm_of_heads_that_lie_in_a_joined_product_is_the_formula(heads: int, one_centred: bool) -> None:
    torch.manual_seed(0)
    joined, weight = torch.randn(2, 3, 7 + heads * 16 + 5), torch.randn(16)
    x = joined[..., 7 : 7 + heads * 16].view(2, 3, heads, 16)
    found = kernels.rms_norm(x, weight, 1e-6, one_centred)
    assert found.is_contiguous()
    torch.testing.assert_close(found, fused.rms_norm(x, weight, 1e-6, one_centred), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "places", "cos_rows"),
    thinned(5, [16, 24], [(3, 2), (9, 1), (16, 8)], [(1, 5), (7, 5), (7, 1)]),
)
def test_a_rotary_embedding_is_the_formula(
    width: int, heads: int, kv_heads: int, places: int, cos_rows: int
) -> None:
    """Queries and keys as parts of a joined product, at one position per row and at several."""
    torch.manual_seed(0)
    joined = torch.randn(5, places, heads + kv_heads, width).transpose(1, 2)
    query, key = joined.split([heads, kv_heads], dim=1)
    cos, sin = torch.randn(cos_rows, places, width).cos(), torch.randn(cos_rows, places, width).sin()
    for found, wanted in zip(
        kernels.rotary(query, key, cos, sin), fused.rotary(query, key, cos, sin), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gate_is_the_formula(dtype: torch.dtype) -> None:
    joined = (4 * torch.randn(3, 5, 5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    joined[0, 0, :2] = torch.tensor([-90.0, 90.0])
    gate, up = joined.split(2500, -1)
    found, wanted = kernels.gated(gate, up), torch.nn.functional.silu(gate) * up
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-6 if dtype == torch.float32 else 2e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "merged"), thinned(5, CONFIGS, [False, True]))
def test_whole_completions_through_the_kernels_are_those_of_generate(
    name: str, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`merged`: with an adapter that changes nothing, whose merged layers are joined."""
    launches: list[str] = []
    products: list[int] = []

    def through_the_kernel(query, keys, values, slots, scale, window, softcap):
        return kernels.decode_attention(query, keys, values, slots.attended, scale, window, softcap, 2)

    for part in ("rms_norm", "rotary", "gated"):
        function = getattr(kernels, part)
        monkeypatch.setattr(
            kernels, part, lambda *a, part=part, function=function: launches.append(part) or function(*a)
        )
    monkeypatch.setattr(weights, "_on_cuda", lambda module: True)
    monkeypatch.setattr(slot_attention, "plain_attention", through_the_kernel)
    monkeypatch.setattr(
        sampling, "block_statistics", lambda logits: Blocks(*kernels.block_statistics(logits, 64))
    )
    monkeypatch.setattr(sampling, "BLOCK", 64)
    original = JoinedLinear.forward
    monkeypatch.setattr(
        JoinedLinear, "forward", lambda self, x: products.append(self.out_features) or original(self, x)
    )
    monkeypatch.setattr(_Together, "_alone", lambda *_: pytest.fail("a joined layer multiplied by itself"))
    num_tokens = 6  # the second completion starts within a sliding layer's window and ends beyond it
    model, prompts = random_model(name), [np.arange(20, 38), np.arange(60, 69)]
    wanted = [theirs(model, prompt, num_tokens) for prompt in prompts]
    writer = (
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        if merged
        else model
    )
    found = run(writer, prompts, num_tokens, greedy=True)
    assert [completion.ids.tolist() for completion in found] == wanted
    assert len(products) == (5 * num_tokens * model.config.num_hidden_layers if merged else 0)
    assert set(launches) == {"rms_norm", "rotary"} | (
        {"gated"} if model.config.model_type[:5] != "gemma" else set()
    )
    num_layers = model.config.num_hidden_layers
    # once per layer for the prefill, and for each further token
    assert launches.count("rotary") == num_tokens * num_layers
