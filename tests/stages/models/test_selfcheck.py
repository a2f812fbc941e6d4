"""A loaded model against itself: what is right, what takes a slower way, what is refused; dropout; `generate`
as engine.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.engine.built_in import BuiltInEngine
from stages.engine.hf_generate import HFGenerateEngine
from stages.engine.opening import open_engine
from stages.models import selfcheck
from stages.models.dropout import own_dropout, switch_off
from stages.models.float32 import WINDOW, in_float32, short_windows
from stages.models.packing import decoder_states, enable_packing
from stages.models.pretrained import head_of
from stages.models.readout import full_forward, output_weights, readout_of, relative_gap
from stages.models.student import _unadapted
from stages.runtime.errors import UserError
from tests.support.small_models import forced_logits, run

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 230,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MASKED_WINDOW = EXPERTS | {
    "shared_expert_intermediate_size": 16,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "sliding_window": 64,
}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}


def tiny(kind: str, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(SIZES | values)), dtype=dtype
    ).eval()


def subject_of(model: Any) -> selfcheck.Subject:
    return selfcheck.Subject(
        model,
        partial(decoder_states, model),
        partial(full_forward, model),
        output_weights(model),
        side="student",
    )


def writes_by_generate_with_a_cache(model: Any) -> bool:
    engine = open_engine(model)
    return isinstance(engine, HFGenerateEngine) and engine.use_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "values", "scale", "softcap"),
    [
        ("llama", {}, 1.0, None),
        ("hyperclovax", {"logits_scaling": 0.125}, 0.125, None),
        ("granite", {"logits_scaling": 3.0}, 1 / 3.0, None),
        ("cohere", {"logit_scale": 0.4}, 0.4, None),
        ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}, 1.0, 3.0),
    ],
)
def test_the_readout_is_measured(
    kind: str, values: Any, scale: float, softcap: float | None, dtype: Any
) -> None:
    model = tiny(kind, dtype, **values)
    assert readout_of(model).scale == scale
    assert readout_of(model).softcap == softcap
    head = head_of(model)
    assert (head.scale, head.softcap) == (scale, softcap)


def test_logits_that_no_readout_makes_are_refused() -> None:
    model = tiny("bert", is_decoder=True)
    with pytest.raises(
        UserError, match="type bert cannot be used: its logits are not its last hidden states"
    ):
        readout_of(model)


def test_bfloat16_is_computed_in_float32() -> None:
    """The same weights give the same logits, held in either dtype."""
    narrow = tiny("qwen3", torch.bfloat16, head_dim=8)
    wide = tiny("qwen3", head_dim=8)
    wide.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    ids = torch.arange(3, 20)[None]
    with in_float32():
        found = full_forward(narrow, ids)[1]
    assert found.dtype == torch.float32
    assert relative_gap(found, wide(input_ids=ids).logits[0].detach()) < 1e-5
    assert narrow(input_ids=ids).logits.dtype == torch.bfloat16


def test_windows_are_short_for_a_while() -> None:
    model = tiny("gemma2", sliding_window=64, head_dim=8)
    with short_windows(model):
        assert model.config.sliding_window == WINDOW
        assert model.model.layers[0].self_attn.sliding_window == WINDOW
    assert model.config.sliding_window == model.model.layers[0].self_attn.sliding_window == 64


def test_a_usual_model_packs_and_writes_by_the_built_in_engine() -> None:
    model = tiny("mistral", torch.bfloat16, sliding_window=64)
    assert enable_packing(model, "auto") == ""
    subject = subject_of(model)
    selfcheck.check_forwards(subject)
    assert selfcheck.packing_refused(subject) == ""
    selfcheck.check_writing(subject, model)
    assert isinstance(open_engine(model), BuiltInEngine)


def test_a_window_that_lives_in_masks_alone_is_padded_and_written_by_generate(capsys: Any) -> None:
    model = tiny("qwen2_moe", **MASKED_WINDOW)
    assert enable_packing(model, "auto") == ""
    subject = subject_of(model)
    selfcheck.check_forwards(subject)
    assert "does not pass its sliding window" in selfcheck.packing_refused(subject)
    selfcheck.check_writing(subject, model)
    assert writes_by_generate_with_a_cache(model)
    assert "slower" in capsys.readouterr().out


def test_packed_rows_that_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    enable_packing(model, "auto")
    subject = subject_of(model)
    selfcheck.check_forwards(subject)
    model.set_attn_implementation("sdpa")  # packed rows become one long row
    monkeypatch.setattr(
        subject, "hidden", lambda a: model.model(a.input_ids, use_cache=False).last_hidden_state
    )
    assert "packed rows give other logits" in selfcheck.packing_refused(subject)


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.model.forward = partial(_seeing_all, model.model)
    with pytest.raises(UserError, match=r"type llama cannot be used: its logits change .* not causal"):
        selfcheck.check_forwards(subject_of(model))


def _seeing_all(decoder: Any, input_ids: Any, **inputs: Any) -> Any:
    inputs["attention_mask"] = torch.ones(1, 1, input_ids.shape[1], input_ids.shape[1], dtype=torch.bool)
    return type(decoder).forward(decoder, input_ids=input_ids, **inputs)


def test_a_forward_that_needs_more_is_one_sentence() -> None:
    model = tiny("llama")

    def forward(**_: Any) -> None:
        raise TypeError("pixel_values are missing")

    model.forward = forward
    with pytest.raises(
        UserError, match=r"student of type llama cannot be used: its forward .* pixel_values are missing"
    ):
        selfcheck.check_forwards(subject_of(model))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("opt", {"dropout": 0.2, "layerdrop": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 16}),
        (
            "falcon",
            {"attention_dropout": 0.1, "hidden_dropout": 0.3},
        ),  # read from the config at every forward
        ("mixtral", {"router_jitter_noise": 0.5, "num_local_experts": 4}),
    ],
)
def test_a_checkpoints_own_randomness_is_off_in_training(kind: str, values: Any) -> None:
    model = tiny(kind, **values)
    ids = torch.arange(3, 30)[None]
    expected = model(input_ids=ids).logits
    model.train()
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
    switch_off(model)
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)


def test_an_exported_config_has_the_checkpoints_dropout() -> None:
    model = tiny("gpt2", resid_pdrop=0.25)
    switch_off(model)
    assert model.config.resid_pdrop == 0.0
    with own_dropout(model):
        assert model.config.resid_pdrop == 0.25
    assert model.config.resid_pdrop == 0.0


def test_what_no_number_switches_off_is_pinned_to_evaluation() -> None:
    """PhiMoE draws its experts in training mode."""
    model = tiny("phimoe", num_local_experts=4)
    switch_off(model)
    subject = subject_of(model)
    selfcheck.check_forwards(subject)
    selfcheck.check_training(subject, model, packed=False)
    model.train()
    with in_float32(), short_windows(model):
        assert subject.gap(packed=False) < 1e-4
    assert model.training
    assert model.model.layers[0].training  # recomputed activations are asked for by layers


def test_training_that_stays_random_is_refused() -> None:
    model = tiny("llama")
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: own(x) + torch.randn_like(x) * float(model.training)
    subject = subject_of(model)
    selfcheck.check_forwards(subject)
    with pytest.raises(UserError, match="type llama cannot be trained: in training mode its logits differ"):
        selfcheck.check_training(subject, model, packed=False)


def test_all_linear_leaves_routers_alone_that_give_more_than_a_product() -> None:
    assert _unadapted(tiny("llama")) is None
    names = _unadapted(tiny("phimoe", num_local_experts=4))
    assert names is not None
    assert all(name.endswith("router") for name in names)


PROMPTS = [np.array(ids) for ids in ([5, 6, 7], [5, 6, 7], [9, 8, 7, 6, 5], [11], [30, 31, 32])]


def test_a_hybrid_of_linear_attention_writes_by_generate() -> None:
    model = tiny("qwen3_next", **(EXPERTS | HYBRID), shared_expert_intermediate_size=16)
    assert "linear_attention" in enable_packing(model, "auto")
    subject = subject_of(model)
    selfcheck.check_forwards(subject)
    selfcheck.check_writing(subject, model)
    assert writes_by_generate_with_a_cache(model)
    completions = run(model, PROMPTS, 6)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        logits = forced_logits(model, prompt, completion.ids).log_softmax(-1)
        targets = torch.from_numpy(completion.ids.astype(np.int64))[:, None]
        assert np.allclose(completion.logprobs, logits.gather(1, targets)[:, 0].numpy(), atol=1e-3)


def test_a_student_that_no_engine_writes_right_with_is_refused_when_it_is_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("stablelm")
    subject = subject_of(model)
    selfcheck.check_forwards(subject)
    monkeypatch.setattr(
        selfcheck, "forced_logprobs", lambda _, prompts, completions, **__: [c * 0.0 for c in completions]
    )
    selfcheck.check_writing(subject, model)
    with pytest.raises(
        UserError, match=r"student of type stablelm cannot write rollouts: .* with transformers' `generate`"
    ):
        run(model, PROMPTS, 3)
