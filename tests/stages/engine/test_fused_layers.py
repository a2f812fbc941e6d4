"""Which layers are recognised and fused."""

import sys
from typing import Any

import pytest
import torch

from stages.engine import fused_layers as fused
from tests.support.small_models import CONFIGS, random_model


@pytest.mark.parametrize("name", CONFIGS)
def test_mlps_that_are_gated_by_silu_are_recognised(name: str) -> None:
    mlp = random_model(name).model.layers[0].mlp
    found = fused.fused_mlp(mlp, torch.ones(1, dtype=torch.bfloat16))
    assert (found is None) == name.startswith("gemma")
    assert fused.fused_mlp(torch.nn.Linear(8, 8), torch.ones(1)) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_and_rotary_embeddings_of_every_architecture_are_recognised(name: str) -> None:
    decoder = random_model(name).model
    norms = [module for module in decoder.modules() if "RMSNorm" in type(module).__name__]
    assert norms
    for norm in norms:
        norm.weight.data.uniform_(-1, 2)
        found = fused.fused_norm(norm.bfloat16())
        assert found is not None
        assert found.one_centred == name.startswith("gemma")
    modeling = sys.modules[type(decoder).__module__]
    assert fused.fused_rotary(modeling.apply_rotary_pos_emb, norms[0].weight) is not None


def test_what_is_another_formula_stays() -> None:
    others = [
        torch.nn.LayerNorm(8),
        torch.nn.LayerNorm(8, bias=False),
        torch.nn.Linear(8, 8),
        torch.nn.Embedding(8, 8),
    ]
    assert [fused.fused_norm(module) for module in others] == [None] * 4
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    assert fused.fused_norm(Qwen3NextRMSNormGated(8)) is None  # takes a gate too
    from transformers.models.cohere import modeling_cohere  # turns neighbours, not halves

    like = torch.ones(1)
    assert fused.fused_rotary(modeling_cohere.apply_rotary_pos_emb, like) is None
    assert fused.fused_rotary(lambda query, positions: query, like) is None
    assert fused.fused_rotary(lambda query, key, cos, sin: (query, key, cos), like) is None


def test_rotary_functions_come_back(student_model: Any) -> None:
    modeling = sys.modules[type(student_model).__module__]
    own = modeling.apply_rotary_pos_emb
    with fused.fused_rotaries(student_model.model):
        assert modeling.apply_rotary_pos_emb is not own
    assert modeling.apply_rotary_pos_emb is own
    with pytest.raises(KeyboardInterrupt), fused.fused_rotaries(student_model.model):
        raise KeyboardInterrupt
    assert modeling.apply_rotary_pos_emb is own
