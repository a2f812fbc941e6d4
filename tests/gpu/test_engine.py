"""The rollout engine on a CUDA device: kernels, captured steps, bfloat16, memory."""

import copy
import gc
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from stages.engine import decoder, kernels
from stages.engine import fused_layers as fused
from stages.engine.opening import open_engine
from stages.engine.protocol import Completion
from stages.engine.sampling import block_statistics
from stages.engine.slot_attention import plain_attention
from stages.engine.slots import SlotCache
from tests.support.small_models import (
    CONFIGS,
    V,
    forced_logits,
    question_prompts,
    random_model,
    run,
    same,
    theirs,
    write,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[np.ndarray]:
    return question_prompts(tokenizer)


@pytest.fixture(scope="module")
def student(student_model: Any) -> Any:
    return copy.deepcopy(student_model).cuda()


@pytest.fixture
def step_widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The width of each step that ran in Python: two warm-up steps and the captured one, for each graph."""
    widths: list[int] = []
    original = decoder.Decoder._step
    monkeypatch.setattr(
        decoder.Decoder, "_step", lambda self, width: widths.append(width) or original(self, width)
    )
    return widths


def forced_gap(model: Any, prompts: list[np.ndarray], found: list[Completion]) -> float:
    """Mean |engine - teacher-forced forward| in nats, under the autocast that is on."""
    gaps = []
    with torch.device("cuda"):
        for prompt, c in zip(prompts, found, strict=True):
            ids = torch.tensor(np.concatenate([prompt, c.ids]).astype(np.int64))[None]
            with torch.no_grad():
                hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
                head = model.get_output_embeddings().weight[:V]
                with torch.autocast("cuda", enabled=False):
                    logprobs = (hidden.float() @ head.float().T).log_softmax(-1)
            picked = logprobs.gather(1, torch.tensor(c.ids.astype(np.int64))[:, None])[:, 0]
            gaps.append(np.abs(c.logprobs - picked.cpu().numpy()))
    return float(np.concatenate(gaps).mean())


# Kernels


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 8, 128), (7, 1, 32), (8, 4, 256), (6, 2, 80)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 30.0), (64, 50.0)])
@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_is_as_near_to_float64_as_pytorchs(
    heads: int,
    kv_heads: int,
    width: int,
    window: int | None,
    softcap: float | None,
    splits: int | None,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    attended = torch.tensor([1, 63, 64, 65, 333, 500], dtype=torch.int32)
    query, keys, values = torch.randn(6, heads, width), *torch.randn(2, 6, kv_heads, 512, width)
    query, keys, values = (x.to(dtype) for x in (query, keys, values))
    slots = SlotCache([keys], [values])
    slots.attended = attended
    scale = width**-0.5
    exact = plain_attention(query.double(), keys.double(), values.double(), slots, scale, window, softcap)
    slots.masks.clear()
    plain = plain_attention(query, keys, values, slots, scale, window, softcap)
    found = kernels.decode_attention(
        query.cuda(), keys.cuda(), values.cuda(), attended.cuda(), scale, window, softcap, splits
    ).cpu()
    bound = 2 * (plain.double() - exact).norm() + 1e-5 * exact.norm()
    assert found.dtype == dtype
    assert (found.double() - exact).norm() < bound


@pytest.mark.parametrize("num_ids", [230, 3000, 151_669])
def test_block_statistics_are_those_of_the_cpu(num_ids: int) -> None:
    logits = torch.randn(5, num_ids + 7, generator=torch.Generator().manual_seed(0)) * 4
    logits[2, 10:] = -torch.inf
    found = block_statistics(logits.cuda()[:, :num_ids])
    for a, b in zip(found, block_statistics(logits[:, :num_ids]), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_rotary_embeddings_and_gates_round_as_the_formulas(dtype: torch.dtype) -> None:
    """Bit for bit but for the order of a sum and fused multiplications: 1 in 1,000 elements may round the
    other way.
    """
    torch.manual_seed(0)
    x, weight = torch.randn(64, 40, 128, device="cuda").to(dtype), torch.randn(128, device="cuda").to(dtype)
    pairs = [
        (kernels.rms_norm(x, weight, 1e-6, centred), fused.rms_norm(x, weight, 1e-6, centred))
        for centred in (False, True)
    ]
    for rows, places, cos_rows in ((64, 1, 64), (2, 50, 1)):  # a step and a prefill, of a joined product
        joined = torch.randn(rows, places, 48, 128, device="cuda").to(dtype).transpose(1, 2)
        query, key, value = joined.split([32, 8, 8], dim=1)
        angle = 100 * torch.rand(cos_rows, places, 128, device="cuda")
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        pairs += zip(kernels.rotary(query, key, cos, sin), fused.rotary(query, key, cos, sin), strict=True)
        value = value.transpose(1, 2)
        pairs.append(
            (kernels.rms_norm(value, weight, 1e-6, False), fused.rms_norm(value, weight, 1e-6, False))
        )
    gate, up = torch.randn(64, 1, 20_000, device="cuda").to(dtype).split(10_000, -1)
    pairs.append((kernels.gated(gate, up), torch.nn.functional.silu(gate) * up))
    for found, wanted in pairs:
        if dtype == torch.bfloat16:
            assert (found != wanted).float().mean() < 1e-3
        torch.testing.assert_close(found, wanted, rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


# Tokens and logprobs


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_generate_from_captured_steps(
    name: str, prompts: list[np.ndarray], step_widths: list[int]
) -> None:
    model = random_model(name)
    wanted = [theirs(model, prompt, 60) for prompt in prompts]  # on the CPU, in float32 as well
    found = run(model.cuda(), prompts * 3, 60, greedy=True, num_slots=8)
    assert [c.ids.tolist() for c in found] == wanted * 3
    assert step_widths
    assert all(step_widths.count(width) == 3 for width in step_widths)


def test_seeded_completions_are_those_of_the_cpu_whatever_the_slots(
    student_model: Any, student: Any, prompts: list[np.ndarray]
) -> None:
    several = [prompts[i] for i in (0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 0, 1)]
    wanted = run(student_model, several, 50, temperature=1.2)
    for slots in (1, 3, 12):
        found = run(student, several, 50, temperature=1.2, num_slots=slots)
        assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
            np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)


def test_a_call_repeats_itself_bit_for_bit_in_bfloat16(student: Any, prompts: list[np.ndarray]) -> None:
    model = copy.deepcopy(student).bfloat16()
    first, second = (run(model, prompts * 8, 40, num_slots=16) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert same(a, b)
        assert np.array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("kind", ["bf16", "lora", "full"])
def test_sampled_logprobs_equal_a_forced_forward_to_bfloat16_noise(
    student: Any, prompts: list[np.ndarray], kind: str, step_widths: list[int]
) -> None:
    """bf16 weights; a bf16 model with an fp32 adapter; fp32 weights: the last two under autocast, as when
    training.

    Their copied layers are joined.
    """
    model = copy.deepcopy(student) if kind == "full" else copy.deepcopy(student).bfloat16()
    if kind == "lora":
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=True)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0, 0.05)
    model.eval()
    with torch.autocast("cuda", torch.bfloat16, enabled=kind != "bf16"):
        found = run(model, prompts * 4, 50, num_slots=8)
        gap = forced_gap(model.get_base_model() if kind == "lora" else model, prompts * 4, found)
    assert gap < 0.02
    assert step_widths


def test_top_k_and_top_p_are_captured_too(
    student: Any, prompts: list[np.ndarray], step_widths: list[int]
) -> None:
    for cut in ({"top_k": 3}, {"top_p": 0.8}):
        found = run(student, prompts, 30, temperature=1.2, **cut)
        assert all(np.isfinite(c.logprobs).all() for c in found)
    assert step_widths


def test_a_forced_text_is_read_with_the_engines_own_logprobs(student: Any, prompts: list[np.ndarray]) -> None:
    drawn = run(student, prompts, 40)
    read = run(student, prompts, 7, forced=[c.ids for c in drawn])
    for a, b in zip(drawn, read, strict=True):
        assert b.ids.tolist() == a.ids.tolist()
        np.testing.assert_allclose(b.logprobs, a.logprobs, atol=1e-4)


# Refill, narrowing, memory


def test_rows_that_end_make_room_and_the_tail_is_narrow(
    student_model: Any, student: Any, prompts: list[np.ndarray], step_widths: list[int]
) -> None:
    lengths = [*range(2, 62), 200]
    texts = [np.random.default_rng(n).integers(20, V, n) for n in lengths]
    read = run(student, [prompts[i % 5] for i in range(61)], 1, forced=texts, num_slots=16)
    assert [c.ids.tolist() for c in read] == [text.tolist() for text in texts]
    assert set(step_widths) >= {16, 1}
    for i in (0, 30, 60):
        logprobs = forced_logits(student_model, prompts[i % 5], texts[i]).log_softmax(-1)
        picked = logprobs.gather(1, torch.from_numpy(texts[i].astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(read[i].logprobs, picked.numpy(), atol=1e-3)


def test_an_open_engine_captures_once(
    student: Any, prompts: list[np.ndarray], step_widths: list[int]
) -> None:
    with closing(open_engine(student)) as engine:
        first = write(engine, prompts[:4], 40)
        count = len(step_widths)
        second = write(engine, prompts[:4], 40)
    assert count > 0
    assert len(step_widths) == count
    assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(first, second, strict=True))


@torch.no_grad()
def test_captured_steps_notice_adapters_and_writes_through_data(
    student: Any, prompts: list[np.ndarray]
) -> None:
    """Every change: what a new engine writes then, and not what was written before it."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(student), lora)
    model.add_adapter("second", lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    changes = {
        "set_adapter": lambda: model.set_adapter("second"),
        "scale_layer": lambda: [layer.scale_layer(3.0) for layer in layers],
        "adapter through .data": lambda: [layer.lora_B["second"].weight.data.neg_() for layer in layers],
        "base through .data": lambda: [layer.get_base_layer().weight.data.mul_(1.1) for layer in layers],
        "merge_adapter": lambda: model.merge_adapter(["default"]),
        "disable_adapter_layers": model.base_model.disable_adapter_layers,
    }
    texts = [np.arange(20, 35)] * 4
    with closing(open_engine(model)) as engine:
        for name, change in changes.items():
            before = write(engine, prompts[:4], 1, forced=texts)
            change()
            after = write(engine, prompts[:4], 1, forced=texts)
            wanted = run(model, prompts[:4], 1, forced=texts)
            for was, found, new in zip(before, after, wanted, strict=True):
                np.testing.assert_allclose(found.logprobs, new.logprobs, atol=1e-3, err_msg=name)
                assert np.abs(found.logprobs - was.logprobs).max() > 1e-2, name


def test_memory_is_given_back(student: Any, prompts: list[np.ndarray]) -> None:
    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    run(student, prompts * 8, 40, num_slots=32)  # workspaces of the libraries stay
    before = allocated()
    for _ in range(3):
        run(student, prompts * 8, 40, num_slots=32)
        assert allocated() - before < 2**20
    with pytest.raises(ZeroDivisionError):
        interrupted(student, prompts)
    assert allocated() - before < 2**20


def interrupted(model: Any, prompts: list[np.ndarray]) -> None:
    with closing(open_engine(model)) as engine:
        write(engine, prompts, 5, num_slots=4)
        raise ZeroDivisionError
