"""Packed rows: every sequence as if it were alone, whatever the architecture, and a refusal where that cannot
be.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from dualkl import DualKLConfig, LogitsTeacher, dual_kl
from stages.data.alignment import Packing, align, at_scored
from stages.models import packing
from stages.models import student as students
from stages.models.packing import PACKED, enable_packing, model_inputs, packed_attention
from stages.models.pretrained import head_of
from stages.models.student import compile_layers
from stages.runtime.config import parse_arguments
from stages.runtime.errors import UserError
from tests.support.helpers import make_run
from tests.support.tiny_runs import TINY, student_of

CPU = torch.device("cpu")
V = 61
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
SERVED: dict[str, Any] = {
    "qwen3": Qwen3Config(**SHAPE),
    "qwen3 with windows": Qwen3Config(
        **SHAPE, use_sliding_window=True, sliding_window=5, layer_types=SLIDING
    ),
    "qwen3 moe": Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    "llama": LlamaConfig(**SHAPE),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=4),
    "gemma": GemmaConfig(**SHAPE),
    "gemma 3": Gemma3TextConfig(**SHAPE, sliding_window=6, layer_types=SLIDING),
}
LENGTHS = ((3, 9), (1, 1), (7, 4), (2, 15), (1, 6))  # prompt and completion


def tiny(config: Any, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)


def sequences() -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(0)
    prompts, completions = (
        [random.integers(2, V, n) for n in column] for column in zip(*LENGTHS, strict=True)
    )
    return prompts, completions


def forward(model: Any, packed: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states at the scored positions, the loss on them, and its gradient by all weights."""
    aligned = align(*sequences(), 0, CPU, packed=packed)
    inputs = model_inputs(aligned, model.config._attn_implementation)
    hidden_Nd = at_scored(model.get_decoder()(**inputs, use_cache=False).last_hidden_state, aligned)
    teacher = torch.randn(len(hidden_Nd), V, generator=torch.Generator().manual_seed(1))
    out = dual_kl(hidden_Nd, head_of(model), LogitsTeacher(teacher), DualKLConfig())
    model.zero_grad()
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden_Nd.detach(), out.loss.detach(), gradients


def assert_packed_is_padded(model: Any) -> None:
    hidden, loss, gradients = forward(model, packed=False)
    packed_hidden, packed_loss, packed_gradients = forward(model, packed=True)
    torch.testing.assert_close(packed_hidden, hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed_loss, loss, atol=1e-6, rtol=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", SERVED)
def test_packed_rows_have_the_hidden_states_loss_and_gradient_of_padded_ones(name: str) -> None:
    model = tiny(SERVED[name])
    assert enable_packing(model, True) == ""
    assert model.config._attn_implementation == PACKED
    assert_packed_is_padded(model)


def test_packed_rows_are_exact_with_gradient_checkpointing() -> None:
    model = tiny(SERVED["qwen3"]).train()
    enable_packing(model, True)
    expected = forward(model, packed=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = forward(model, packed=True)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[2][name], gradient) for name, gradient in expected[2].items())


def test_a_sequence_does_not_see_its_neighbours() -> None:
    model = tiny(SERVED["llama"])
    enable_packing(model, True)
    prompts, completions = sequences()
    states = []
    for last in (5, 6):
        prompts[1] = np.array([last])
        aligned = align(prompts, completions, 0, CPU, packed=True)
        with torch.no_grad():
            states.append(
                model.get_decoder()(**model_inputs(aligned, PACKED), use_cache=False).last_hidden_state[0]
            )
    other = torch.ones(len(states[0]), dtype=torch.bool)
    other[12:14] = False  # the second sequence
    assert torch.equal(states[0][other], states[1][other])
    assert not torch.equal(states[0][~other], states[1][~other])


def test_padded_rows_and_generation_are_those_of_sdpa() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    found = []
    for wanted in (False, True):
        model = tiny(SERVED["mistral with a window"]).eval()
        enable_packing(model, wanted)
        mask = (ids != 0).long()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        found.append((logits, written))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


REFUSED: dict[str, tuple[Any, str, str]] = {
    "eager": (SERVED["qwen3"], "eager", "attn_implementation eager does not keep packed sequences apart"),
    "linear attention": (
        Qwen3NextConfig(
            **SHAPE,
            layer_types=["linear_attention", "full_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
        ),
        "sdpa",
        "linear_attention",
    ),
    "sinks": (GptOssConfig(**SHAPE, num_local_experts=2), "eager", "eager does not keep"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_packed_is_padded_or_refused(name: str) -> None:
    config, implementation, reason = REFUSED[name]
    model = tiny(config, implementation)
    assert reason in enable_packing(model, "auto")
    assert model.config._attn_implementation == implementation
    with pytest.raises(UserError, match=r"packing: on, but .*cannot be packed.*Use packing: auto"):
        enable_packing(model, True)


def test_soft_capped_attention_is_padded() -> None:
    model = tiny(Gemma2Config(**SHAPE, layer_types=SLIDING), "eager")
    model.config._attn_implementation_internal = (
        "sdpa"  # transformers lets it be set, and refuses in the forward
    )
    assert "soft-capped" in packing.refusal(model)


def states(num_heads: int, length: int) -> torch.Tensor:
    return torch.zeros(1, num_heads, length, 8)


@pytest.mark.parametrize("keywords", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}], ids=["softcap", "sinks"])
def test_what_packed_attention_does_not_do_stops_the_forward(keywords: dict[str, Any]) -> None:
    packing = Packing((2, 3), torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    with pytest.raises(UserError, match=r"uses (softcap|s_aux); use --packing off"):
        packed_attention(
            torch.nn.Module(), states(4, 5), states(2, 5), states(2, 5), None, packing=packing, **keywords
        )


def test_a_window_that_only_the_mask_knows_stops_the_forward() -> None:
    model = tiny(SERVED["qwen3 with windows"])
    enable_packing(model, True)
    module = model.get_decoder().layers[0].self_attn
    packing = Packing((2, 3), torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    with pytest.raises(UserError, match="does not pass its sliding window"):
        packed_attention(module, states(4, 5), states(2, 5), states(2, 5), None, packing=packing)


def test_a_model_that_drops_the_boundaries_cannot_go_on() -> None:
    """Its attention gets the mask without elements, which is no mask."""
    nothing = model_inputs(align(*sequences(), 0, CPU, packed=True), PACKED)["attention_mask"]
    with pytest.raises(AssertionError, match="does not hand `packing`"):
        packed_attention(torch.nn.Module(), states(4, 5), states(2, 5), states(2, 5), nothing)


def test_flash_attention_gets_the_boundaries_that_transformers_knows() -> None:
    aligned = align(*sequences(), 0, CPU, packed=True)
    inputs = model_inputs(aligned, "flash_attention_2")
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 12, 14, 25, 42, 49]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 17
    assert "attention_mask" not in inputs


def test_the_variable_length_kernel_has_what_is_needed() -> None:
    """Without it a GPU falls back to SDPA by groups."""
    assert packing._varlen_attn is not None


def stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `varlen_attn` documents, by a mask over the whole row; queries are the last of their keys."""
    assert (cu_seq_q.dtype, cu_seq_k.dtype, window_size[1]) == (torch.int32, torch.int32, 0)
    assert 0 < max_q <= max_k
    lengths_q, lengths_k = cu_seq_q.diff(), cu_seq_k.diff()
    at_q, at_k = torch.arange(query.shape[0]), torch.arange(key.shape[0])
    sequence_q, sequence_k = (
        torch.bucketize(at, bounds, right=True) - 1 for at, bounds in ((at_q, cu_seq_q), (at_k, cu_seq_k))
    )
    place_q = at_q - cu_seq_q[sequence_q] + (lengths_k - lengths_q)[sequence_q]
    behind = place_q[:, None] - (at_k - cu_seq_k[sequence_k])
    mask = (sequence_q[:, None] == sequence_k) & (behind >= 0)
    if window_size[0] >= 0:
        mask &= behind <= window_size[0]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
    )
    return out[0].transpose(0, 1)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, with a stand-in for the kernel."""
    monkeypatch.setattr(packing, "_varlen_attn", stand_in)
    monkeypatch.setattr(packing, "varlen_usable", lambda *_: True)


@pytest.mark.parametrize("name", ["qwen3", "qwen3 with windows", "mistral with a window", "gemma 3"])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.usefixtures("varlen")
def test_the_kernel_is_asked_for_causal_attention_in_each_sequence(
    name: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_varlen_groups", grouped)
    model = tiny(SERVED[name])
    enable_packing(model, True)
    assert_packed_is_padded(model)


@pytest.mark.usefixtures("varlen")
def test_fp32_weights_under_autocast_use_the_kernel_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in full fine-tuning, where rotated queries and keys are fp32."""
    usable = (torch.bfloat16, torch.float16)
    asked: list[torch.dtype] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **how: Any) -> Any:
        asked.extend(states.dtype for states in (query, key, value))
        return stand_in(query, key, value, *rest, **how)

    monkeypatch.setattr(packing, "_varlen_attn", kernel)
    monkeypatch.setattr(packing, "varlen_usable", lambda query, value, dtype: dtype in usable)
    model = tiny(SERVED["qwen3"])
    enable_packing(model, True)
    with torch.autocast("cpu", torch.bfloat16):
        forward(model, packed=True)
    assert set(asked) == {torch.bfloat16}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.usefixtures("varlen")
def test_layers_share_what_is_compiled_for_batches_of_any_shape(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    graphs = [0]

    def count(graph: Any, example: Any) -> Any:
        graphs[0] += 1
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic: torch._dynamo.optimize(count, dynamic=dynamic)(function)
    )
    model = tiny(Qwen3Config(**(SHAPE | {"num_hidden_layers": 12}))).train()
    enable_packing(model, True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = forward(model, packed=True)
    compile_layers(model)
    found = forward(model, packed=True)
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-5)
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    once = graphs[0]
    assert once == 1
    prompts, completions = sequences()
    for count_ in (4, 3, 2):
        aligned = align(prompts[:count_], completions[:count_], 0, CPU, packed=True)
        hidden = model.get_decoder()(**model_inputs(aligned, PACKED), use_cache=False).last_hidden_state
        hidden.sum().backward()
    assert graphs[0] == once


GPT2 = GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=61)


@pytest.mark.parametrize(
    ("asked", "device", "shape", "compiled"),
    [
        ("auto", "cuda", Qwen3Config(**SHAPE), True),
        ("auto", "cpu", Qwen3Config(**SHAPE), False),
        ("auto", "cuda", GPT2, False),
        ("true", "cpu", Qwen3Config(**SHAPE), True),
        ("false", "cuda", Qwen3Config(**SHAPE), False),
    ],
)
def test_a_student_is_compiled_where_it_was_asked_for_and_on_a_gpu_by_itself(
    asked: str, device: str, shape: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: calls.append(1) or function)
    config = parse_arguments(["--compile", asked, "--use_lora", "false"], "")
    tokenizer: Any = None
    student = students.assemble(config, tiny(shape), tokenizer, "tiny", 61, (1,), torch.device(device))
    assert student.is_compiled == bool(calls) == compiled


def test_layers_that_are_not_found_are_not_compiled_but_a_sentence() -> None:
    model = tiny(GPT2)
    with pytest.raises(UserError, match=r"compile: true, but a model of type gpt2 .*set compile: false"):
        compile_layers(model)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_the_variable_length_kernel_is_sdpa_by_groups(window: int | None) -> None:
    lengths = (700, 1, 33, 512, 90)
    bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
    random = torch.Generator(device="cuda").manual_seed(0)
    leaves = [
        torch.randn(
            sum(lengths), heads, 128, device="cuda", dtype=torch.bfloat16, generator=random
        ).requires_grad_()
        for heads in (8, 2, 2)
    ]
    upstream = torch.randn(sum(lengths), 8, 128, device="cuda", dtype=torch.bfloat16, generator=random)
    found = []
    for function in (packing._varlen, lambda *a: packing._by_groups(*a, 0.0)):
        out = function(leaves[0], leaves[1], leaves[2], Packing(lengths, bounds, max(lengths)), 0.1, window)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for varlen, alone in zip(*found, strict=True):
        torch.testing.assert_close(varlen.float(), alone.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("packing", "packs"), [("auto", True), ("on", True), ("off", False)])
def test_the_student_packs_as_the_configuration_says(tmp_path: Path, packing: str, packs: bool) -> None:
    student = student_of(make_run(tmp_path, **(TINY | {"packing": packing})))
    assert student.packs == packs
    assert bool(student.padded_because) != packs


def test_a_student_that_cannot_be_packed_is_a_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path, **(TINY | {"packing": "on", "attn_implementation": "eager"}))
    with pytest.raises(UserError, match=r"packing: on, but .*attn_implementation eager"):
        student_of(run)
