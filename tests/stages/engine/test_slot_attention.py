"""Which models the built-in engine refuses."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, T5Config

from stages.engine.slot_attention import check_served
from stages.runtime.errors import UserError
from tests.support.small_models import run

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 60,
    "head_dim": 8,
}


def refused(model: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"of type {model.config.model_type}: .*{reason}"):
        run(model, [np.arange(5)], 3, vocab_size=60)


def test_attention_with_sinks_is_a_sentence() -> None:
    config = GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    refused(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(), "s_aux")


def test_linear_attention_is_a_sentence() -> None:
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        **SMALL,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    refused(AutoModelForCausalLM.from_config(config).eval(), "linear_attention")


def test_a_rotary_embedding_that_depends_on_the_batch_is_a_sentence() -> None:
    config = LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    refused(AutoModelForCausalLM.from_config(config).eval(), "longest row")


def test_an_encoder_is_a_sentence() -> None:
    model = type("Model", (), {"config": T5Config()})()
    with pytest.raises(UserError, match="of type t5: it attends to an encoder"):
        check_served(model, model)


def test_attention_outside_the_interface_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    monkeypatch.setattr(type(model.model), "_supports_attention_backend", False)
    refused(model, "AttentionInterface")
    monkeypatch.undo()
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
    refused(model, "only 1 of its 2 layers")
