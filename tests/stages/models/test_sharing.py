"""Packed rows whose sequences share prompts: the states, losses and gradients of sequences that are alone."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, Qwen3Config

from dualkl import DualKLConfig, LogitsTeacher, dual_kl
from stages.data.alignment import Aligned, align, at_scored
from stages.models import packing, selfcheck
from stages.models.packing import PACKED, enable_packing, model_inputs, unshared_because, with_copies
from stages.models.pretrained import head_of
from stages.models.readout import full_forward, output_weights
from stages.models.student import compile_layers
from tests.stages.models.test_packing import SERVED, SHAPE, V, stand_in, tiny

CPU = torch.device("cpu")
GROUPS = ((3, (9, 2, 4)), (1, (1, 6)), (7, (4,)), (20, (1, 1, 3, 12)), (1, (5,)))
"""Tokens of a prompt and of its completions."""
ROPES: dict[str, Any] = {
    "llama 3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
}
MODELS = SERVED | {
    "one key head": Qwen3Config(**(SHAPE | {"num_key_value_heads": 1})),
    "a key head for each": Qwen3Config(**(SHAPE | {"num_key_value_heads": 4})),
    **{f"rope {name}": LlamaConfig(**SHAPE, rope_parameters=rope) for name, rope in ROPES.items()},
}


def rows(
    groups: tuple[tuple[int, tuple[int, ...]], ...] = GROUPS,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(0)
    prompts, completions = [], []
    for length, sizes in groups:
        prompt = random.integers(2, V, length)
        for size in sizes:
            prompts.append(prompt)
            completions.append(random.integers(2, V, size))
    return prompts, completions


def forward(model: Any, aligned: Aligned) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states at the scored positions, the loss on them, and its gradient by all weights."""
    inputs = model_inputs(aligned, model.config._attn_implementation)
    hidden_Nd = at_scored(model.get_decoder()(**inputs, use_cache=False).last_hidden_state, aligned)
    teacher = torch.randn(len(hidden_Nd), V, generator=torch.Generator().manual_seed(1))
    out = dual_kl(hidden_Nd, head_of(model), LogitsTeacher(teacher), DualKLConfig())
    model.zero_grad()
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden_Nd.detach(), out.loss.detach(), gradients


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def assert_shared_is_padded(model: Any) -> None:
    shared = align(*rows(), 0, CPU, packed=True, shared=True)
    assert shared.input_ids.numel() == sum(length + sum(sizes) for length, sizes in GROUPS)
    assert_close(forward(model, shared), forward(model, align(*rows(), 0, CPU)))


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, with a stand-in for the kernel."""
    monkeypatch.setattr(packing, "_varlen_attn", stand_in)
    monkeypatch.setattr(packing, "varlen_usable", lambda *_: True)


@pytest.mark.parametrize("name", MODELS)
def test_sequences_that_share_prompts_have_the_states_loss_and_gradient_of_padded_ones(name: str) -> None:
    model = tiny(MODELS[name])
    assert enable_packing(model, True) == ""
    assert_shared_is_padded(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.usefixtures("varlen")
def test_the_kernel_gets_keys_copied_to_each_sequence(
    name: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_varlen_groups", grouped)
    model = tiny(MODELS[name])
    enable_packing(model, True)
    assert_shared_is_padded(model)


@pytest.mark.usefixtures("varlen")
def test_the_gradient_of_copies_is_the_sum_over_them() -> None:
    shared = align(*rows(), 0, CPU, packed=True, shared=True).packing.shared
    assert shared is not None
    states = torch.randn(len(shared.firsts), 2, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(shared.places), 2, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad(with_copies(states, shared), states, upstream)
    (expected,) = torch.autograd.grad(states[shared.places], states, upstream)
    torch.testing.assert_close(found, expected)
    torch.library.opcheck(
        torch.ops.dualkl.copied.default, (states, shared.places, shared.copies, shared.firsts)
    )
    torch.library.opcheck(torch.ops.dualkl.summed.default, (upstream, shared.copies, shared.firsts))


def test_a_completion_does_not_see_the_others_of_its_prompt() -> None:
    model = tiny(MODELS["llama"])
    enable_packing(model, True)
    prompts, completions = rows(((5, (4, 6, 3)),))
    states = []
    for last in (5, 6):
        completions[0] = np.array([4, 4, 4, last])
        aligned = align(prompts, completions, 0, CPU, packed=True, shared=True)
        with torch.no_grad():
            states.append(model.get_decoder()(**model_inputs(aligned, PACKED)).last_hidden_state[0])
    changed = (states[0] != states[1]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [8]


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_with_and_without_shared_prompts_are_compiled_once_each(
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
    model = tiny(Qwen3Config(**(SHAPE | {"num_hidden_layers": 6}))).train()
    enable_packing(model, True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shared, unshared = (align(*rows(), 0, CPU, packed=True, shared=wanted) for wanted in (True, False))
    expected = forward(model, shared)
    compile_layers(model)
    assert_close(forward(model, shared), expected)
    assert_close(forward(model, unshared), expected)
    assert graphs[0] == 2
    for groups in (GROUPS[:3], GROUPS[1:4], ((2, (3, 4)),), ((9, (5,)), (3, (4,)))):
        forward(model, align(*rows(groups), 0, CPU, packed=True, shared=True))
    assert graphs[0] == 2


def subject_of(model: Any) -> selfcheck.Subject:
    return selfcheck.Subject(
        model,
        partial(packing.decoder_states, model),
        partial(full_forward, model),
        output_weights(model),
        side="teacher",
    )


def test_shared_prompts_are_checked_when_a_model_is_loaded() -> None:
    model = tiny(MODELS["gemma 3"])
    enable_packing(model, "auto")
    subject = subject_of(model)
    selfcheck.check_forwards(subject)
    assert selfcheck.sharing_refused(subject, "") == ""
    whole: Any = packing.packed_attention

    def all_of_the_row(*arguments: Any, packing: Any = None, **keywords: Any) -> Any:
        layout = packing and without_prompts(packing)
        return whole(*arguments, packing=layout, **keywords)

    AttentionInterface.register(PACKED, all_of_the_row)
    try:
        assert selfcheck.packing_refused(subject) == ""
        found = selfcheck.sharing_refused(subject, "")
        assert found.startswith("rows that share a prompt give other logits, by ")
    finally:
        AttentionInterface.register(PACKED, whole)


def without_prompts(packing: Any) -> Any:
    """The layout without shared prompts: completions see themselves alone."""
    return type(packing)(packing.lengths, packing.bounds, packing.longest)


def test_other_attention_and_padded_rows_share_nothing() -> None:
    model = tiny(MODELS["qwen3"], "eager")
    assert unshared_because(model, "") == "attn_implementation eager reads every sequence's own keys"
    padded = selfcheck.sharing_refused(subject_of(model), "it has layers of type linear_attention")
    assert padded == "rows are padded: it has layers of type linear_attention"
