"""The parts of the rollout engine: the draw, the sampling distribution, merged weights, which models are served."""

import contextlib
import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, T5Config

from stages.models.decoding import fused, steps, weights
from stages.models.decoding import sampling as sampling_module
from stages.models.decoding.attention import check_served
from stages.models.decoding.joined import JoinedLinear
from stages.models.decoding.sampling import Sampling, block_statistics, choose, sampling_logits
from stages.models.decoding.steps import Decoder, Method, Request
from stages.models.decoding.weights import DecodingWeights
from stages.models.generation import generate
from stages.runtime.errors import UserError
from tests.support.small_models import CONFIGS, random_model

# The draw


SAMPLED = Sampling(1)


def draw(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling = SAMPLED) -> torch.Tensor:
    return choose(logits, uniforms, torch.full((len(uniforms),), -1), sampling).token


@pytest.fixture(params=[1024, 2, 3], ids=lambda size: f"blocks of {size}")
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "BLOCK", request.param)


@pytest.mark.usefixtures("_block_size")
def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    uniforms = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 0.9999999], dtype=torch.float64)
    assert draw(p.log().expand(len(uniforms), 4), uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.usefixtures("_block_size")
def test_draw_never_gives_a_token_without_mass() -> None:
    p = torch.tensor([[0.0, 0.4, 0.0, 0.0, 0.6, 0.0, 0.0]])
    uniforms = torch.cat([torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53])])
    assert set(draw(p.log().expand(1001, 7), uniforms).tolist()) == {1, 4}


@pytest.mark.usefixtures("_block_size")
def test_drawn_frequencies_are_the_probabilities() -> None:
    """A chi-square statistic below the 1 - 1e-6 quantile of 12 degrees of freedom (51.7)."""
    num_draws, size = 20_000, 13
    logprobs = torch.randn(1, size, generator=torch.Generator().manual_seed(0)).mul(1.5).log_softmax(-1)
    uniforms = torch.from_numpy(np.random.Generator(np.random.Philox(key=7)).random(num_draws))
    counts = torch.bincount(draw(logprobs.expand(num_draws, size) + 30.0, uniforms), minlength=size)
    expected = logprobs[0].double().exp() * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 51.7


def test_a_draw_over_many_blocks_is_the_search_in_one_cumulative_sum() -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(1)) * 3
    uniforms = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cumulative = logits.double().softmax(-1).cumsum(-1)
    wanted = torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0]
    assert torch.equal(draw(logits, uniforms), wanted)
    assert torch.equal(draw(logits, uniforms, Sampling(1, greedy=True)), logits.argmax(-1))


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize(
    "sampling", [Sampling(1), Sampling(1, 0.7), Sampling(1, top_k=5), Sampling(1, 1.3, top_p=0.6)]
)
def test_logprob_and_entropy_are_those_of_the_distribution_that_is_drawn_from(sampling: Sampling) -> None:
    logits = torch.randn(20, 4099, generator=torch.Generator().manual_seed(3)) * 2 + 40
    uniforms = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = choose(logits, uniforms, torch.full((20,), -1), sampling)
    logprobs = sampling_logits(logits, sampling).double().log_softmax(-1)
    wanted = logprobs.gather(1, found.token[:, None])[:, 0]
    torch.testing.assert_close(found.logprob.double(), wanted, rtol=1e-6, atol=1e-5)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=1e-6)


def test_a_forced_token_is_taken_and_the_others_are_drawn() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 3] = 50.0
    found = choose(logits, torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([7, -1]), Sampling(1))
    assert found.token.tolist() == [7, 3]
    assert found.logprob.tolist() == pytest.approx([-50.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_broken_logit_gives_a_nan_logprob_and_a_token_of_the_vocabulary(value: float, greedy: bool) -> None:
    logits = torch.zeros(2, 3000)
    logits[1, 1500] = value
    found = choose(
        logits, torch.full((2,), 0.9, dtype=torch.float64), torch.tensor([-1, -1]), Sampling(1, greedy=greedy)
    )
    assert found.logprob.isnan().tolist() == [False, True]
    assert 0 <= int(found.token.min()) <= int(found.token.max()) < 3000


def test_a_block_without_mass_counts_nothing() -> None:
    logits = torch.full((1, 2048), -torch.inf)
    logits[0, 5] = -1e30
    blocks = block_statistics(logits)
    assert blocks.mass.tolist() == [[1.0, 0.0]]
    assert blocks.moment.abs().max() == 0


# The sampling distribution


def oracle(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities after temperature, top-k and top-p, token by token in float64."""
    z = [value / sampling.temperature for value in logits]
    weights = [np.exp(value - max(z)) for value in z]
    order = sorted(range(len(z)), key=lambda i: -weights[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass / total >= sampling.top_p:
            break
        kept.append(i)
        mass += weights[i]
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(z))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1),
        Sampling(1, 0.5),
        Sampling(1, top_k=1),
        Sampling(1, top_k=4),
        Sampling(1, top_p=0.01),
        Sampling(1, top_p=0.6),
        Sampling(1, 1.7, 0.9, 6),
        Sampling(1, 0.8, 0.3, 3),
        Sampling(1, top_k=1000),
    ],
    ids=str,
)
def test_the_sampling_distribution_agrees_with_the_loop(sampling: Sampling) -> None:
    logits = torch.randn(7, 19, generator=torch.Generator().manual_seed(1)) * 2
    found = sampling_logits(logits, sampling).softmax(-1)
    for row in range(7):
        np.testing.assert_allclose(found[row].numpy(), oracle(logits[row].tolist(), sampling), atol=1e-6)


# The weights


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


# What takes one product or one launch on a GPU


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


# Slots


@torch.no_grad()
def test_steps_without_a_live_row_change_nothing_that_counts(student_model: Any) -> None:
    """Capturing a step on a GPU takes a few, with rows in the slots."""
    method = Method(Sampling(20), 230, (1,), 0)
    requests = [Request(0, np.arange(10, 20), 5, 20), Request(1, np.arange(30, 37), 6, 20)]
    decoders = [Decoder(student_model, method, 2, 64, 20, None) for _ in range(2)]
    for disturbed, decoder in zip((False, True), decoders, strict=True):
        decoder.clear(2)
        decoder.fill(list(enumerate(requests)))
        decoder.run(3, 13)
        if disturbed:
            live = decoder.progress.active.clone()
            decoder.progress.active.zero_()
            decoder.run(2, 15)
            decoder.progress.active.copy_(live)
        decoder.run(10, 23)
    for a, b in zip(*(decoder.take([0, 1]) for decoder in decoders), strict=True):
        assert len(a[0]) > 4
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# Which models

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
        generate(
            model, [np.arange(5)], [1], Sampling(3), vocab_size=60, eos_ids=(1,), pad_id=0, micro_batch=2
        )


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


# A step that cannot be captured


class _Capture:
    """Stands for CUDA's: `refuses` while it is open, and its end fails after a failure, as torch's does."""

    is_open = False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None:
        _Capture.is_open = True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        _Capture.is_open = False
        if error is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_step_that_cannot_be_captured_is_one_sentence(
    student_model: Any, monkeypatch: pytest.MonkeyPatch, out_of_memory: bool
) -> None:
    class Stream:
        def __init__(self, *_: Any) -> None: ...
        def wait_stream(self, other: Any) -> None: ...

    for name, fake in {"graph": _Capture, "CUDAGraph": Stream, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(steps, "_capture_stream", Stream)
    method = Method(Sampling(4), 230, (1,), 0)
    decoder = Decoder(student_model, method, 2, 64, 4, None)
    refusal = (
        torch.OutOfMemoryError("no room")
        if out_of_memory
        else RuntimeError("capture forbids this.\nMore lines")
    )

    def draw(*_: Any) -> None:
        if _Capture.is_open:
            raise refusal

    with torch.no_grad():
        decoder.fill([(0, Request(0, np.arange(3, 9), 0, 4))])
        monkeypatch.setattr(decoder, "_draw", draw)
        if out_of_memory:
            with pytest.raises(torch.OutOfMemoryError, match="no room"):
                decoder._graph(2)
            return
        with pytest.raises(UserError) as refused:
            decoder._graph(2)
    sentence = str(refused.value)
    assert sentence.startswith(
        "a decode step of Qwen3ForCausalLM cannot be captured in a CUDA graph (capture forbids this)"
    )
    assert "--role generate --device cpu" in sentence
    assert "\n" not in sentence
