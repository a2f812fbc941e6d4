"""The layers that the engine uses in place of a model's own: merged, cast, joined."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from stages.engine import fused_layers as fused
from stages.engine import weights
from stages.engine.joined import JoinedLinear
from stages.engine.weights import DecodingWeights


def adapted(model: Any, **options: Any) -> Any:
    """A copy of the model with a LoRA adapter that does something."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    changed = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return changed.eval()


def merged(model: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    decoder = model.get_base_model().get_decoder()
    with DecodingWeights(decoder, dtype).swapped():
        found = decoder.layers[1].self_attn.q_proj
        assert type(found) is torch.nn.Linear
        return found.weight.clone()


def update(model: Any) -> torch.Tensor:
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    up, down = (getattr(layer, name)["default"].weight.double() for name in ("lora_B", "lora_A"))
    return 3.0 * up @ down


def test_merged_weights_are_the_adapters_rounded_once(student_model: Any) -> None:
    model = adapted(student_model)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    model.get_base_model().to(torch.bfloat16)
    found = merged(model)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.double(), layer.base_layer.weight.double() + update(model), rtol=2**-7, atol=1e-7
    )
    assert model.get_base_model().model.layers[1].self_attn.q_proj is layer


def test_an_update_far_below_a_step_of_bfloat16_is_merged(student_model: Any) -> None:
    """Rounded to nearest it would be gone: W itself lies on the grid."""
    model = adapted(student_model)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    base = layer.base_layer.weight
    base.data = base.to(torch.bfloat16)
    layer.lora_B["default"].weight.data *= 5e-4 * base.abs().mean() / update(model).abs().mean()
    wanted = update(model)
    assert ((base.double() + wanted).to(torch.bfloat16) == base).double().mean() > 0.8
    found = merged(model).double() - base.double()
    assert float((found * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.1)
    assert torch.equal(merged(model), merged(model))
    layer.lora_B["default"].weight.data.zero_()
    assert torch.equal(merged(model), base)


def test_fp32_weights_under_autocast_are_merged_as_training_reads_them(student_model: Any) -> None:
    model = adapted(student_model)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    layer.lora_B["default"].weight.data.zero_()
    assert torch.equal(merged(model, torch.bfloat16), before.to(torch.bfloat16))
    assert torch.equal(merged(model), before)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_adapter_that_is_not_plain_lora_decodes_through_its_own_layers(
    student_model: Any, options: Any
) -> None:
    model = adapted(student_model, **options)
    decoder = model.get_base_model().get_decoder()
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        wanted = decoder(input_ids=ids).last_hidden_state
        with DecodingWeights(decoder, None).swapped():
            assert torch.equal(decoder(input_ids=ids).last_hidden_state, wanted)


def test_a_switched_off_adapter_stays_off(student_model: Any) -> None:
    model = adapted(student_model)
    decoder, ids = model.get_base_model().get_decoder(), torch.arange(20, 30)[None]
    with torch.no_grad(), model.disable_adapter(), DecodingWeights(decoder, None).swapped():
        found = decoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, student_model.model(input_ids=ids).last_hidden_state)


def test_full_fine_tuning_under_autocast_reads_casts_made_once(student_model: Any) -> None:
    decoder = copy.deepcopy(student_model).get_decoder()
    own = decoder.layers[0].mlp.up_proj
    with DecodingWeights(decoder, torch.bfloat16).swapped():
        fast = decoder.layers[0].mlp.up_proj
        assert torch.equal(fast.weight, own.weight.to(torch.bfloat16))
        assert decoder.embed_tokens.weight.dtype == torch.float32  # autocast would not cast it
        assert decoder.norm.weight.dtype == torch.float32
    assert decoder.layers[0].mlp.up_proj is own


def test_weights_come_back_after_an_exception(student_model: Any) -> None:
    decoder = adapted(student_model).get_base_model().get_decoder()
    own = decoder.layers[0].mlp.up_proj
    with pytest.raises(KeyboardInterrupt), DecodingWeights(decoder, None).swapped():
        raise KeyboardInterrupt
    assert decoder.layers[0].mlp.up_proj is own


def test_layers_that_are_copied_anyway_are_joined_on_a_gpu(
    student_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged ones, and casts; a plain model's would be held twice."""
    monkeypatch.setattr(weights, "_on_cuda", lambda module: True)
    names = {f"{part}_proj" for part in ("q", "k", "v", "gate", "up")}
    lora = adapted(student_model).get_base_model().get_decoder()
    cases = [
        (lora, None, names),
        (student_model.model, torch.bfloat16, names),
        (student_model.model, None, set()),
    ]
    for decoder, dtype, wanted in cases:
        own_mlp = decoder.layers[0].mlp
        with DecodingWeights(decoder, dtype).swapped():
            parts = [decoder.layers[0].self_attn, own_mlp]
            found = {
                name for part in parts for name, m in part.named_children() if isinstance(m, JoinedLinear)
            }
            assert isinstance(decoder.layers[0].mlp, fused.FusedMLP)
        assert decoder.layers[0].mlp is own_mlp
        assert not any(isinstance(module, JoinedLinear) for module in decoder.modules())
        assert found == wanted
