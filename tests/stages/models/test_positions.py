"""How many positions a model has: learned, rotary with its scaling, or without a limit."""

from typing import Any

import pytest
from transformers import AutoConfig

from stages.models.positions import positions_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
LLAMA3 = YARN | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("gpt2", {"n_positions": 40}, 40),
        ("opt", {"max_position_embeddings": 64}, 64),
        ("qwen3", {"max_position_embeddings": 100}, 100),
        ("qwen3", {"max_position_embeddings": 100, "rope_parameters": YARN}, 400),
        ("llama", {"max_position_embeddings": 800, "rope_parameters": LLAMA3}, 800),
        ("llama", {"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.0}}, 200),
        ("bloom", {}, None),
        ("mpt", {"max_seq_len": 64}, None),
        ("mpt", {"max_seq_len": 64, "attn_config": {"alibi": False}}, 64),
        ("falcon", {"max_position_embeddings": 64, "alibi": True}, None),
        ("mamba", {}, None),
    ],
)
def test_positions_are_those_of_the_configuration(
    kind: str, values: dict[str, Any], expected: int | None
) -> None:
    assert positions_of(AutoConfig.for_model(kind, **values)) == expected
