"""The rollout engine: its tokens against transformers' own, its logprobs against a teacher-forced forward."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from stages.data.prompts import encode
from stages.models import checkpoints
from stages.models.decoding import steps
from stages.models.decoding.sampling import sampling_logits
from stages.models.generation import Completion, Sampling, generate, rollout_engine
from stages.runtime.errors import UserError
from tests.helpers import ROOT, STUDENT

QUESTIONS = [
    "Eva has 23 pens. A friend has 2 times as many. How many pens do they have together?",
    "Sam had 9 cups but lost 4 of them. How many cups are left?",
    "Leo buys 3 bags of 4 eggs and 5 bags of 6 eggs. How many eggs does Leo buy?",
    "Mia has 4 pens and buys 7 more. How many pens does Mia have now?",
    "How many?",
]
V, EOS = 230, 1


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[np.ndarray]:
    return [encode([{"role": "user", "content": question}], {}, tokenizer, {}).ids for question in QUESTIONS]


def run(model: Any, prompts: list[np.ndarray], sampling: Sampling, **values: Any) -> list[Completion]:
    defaults = {"vocab_size": V, "eos_ids": (EOS,), "pad_id": 0, "micro_batch": len(prompts)}
    seeds = values.pop("seeds", list(range(1, len(prompts) + 1)))
    return generate(model, prompts, seeds, sampling, **(defaults | values))


@torch.no_grad()
def forced_logits(model: Any, prompt: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """The logits [T, V] that predict a completion, from one forward over prompt + completion without padding."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()


SHAPE = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "num_hidden_layers": 4, "vocab_size": V, "max_position_embeddings": 256, "initializer_range": 0.4, "tie_word_embeddings": False}  # fmt: skip
WINDOW = 12
"""Places that a sliding layer sees: fewer than the prompts have."""
CONFIGS = {
    "qwen3": Qwen3Config(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "llama": LlamaConfig(**SHAPE, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma2": Gemma2Config(
        **SHAPE, sliding_window=WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=8.0, query_pre_attn_scalar=24
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=24
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def shape(request: pytest.FixtureRequest) -> Any:
    """A small random model of each architecture, peaked enough to have clear winners."""
    return random_model(request.param)


def random_model(name: str) -> Any:
    torch.manual_seed(3)
    attention = "eager" if name == "gemma2" else "sdpa"  # its cap is not for PyTorch's
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=attention).eval()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    return model


def theirs(model: Any, prompt: np.ndarray, num_tokens: int) -> list[int]:
    """What transformers' `generate` writes greedily, one prompt at a time: without any padding."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": EOS, "pad_token_id": 0}
    return model.generate(input_ids=ids, **settings)[0, len(prompt) :].tolist()


def check_logprobs(model: Any, prompt: np.ndarray, completion: Completion, temperature: float, atol: float) -> None:
    """Those of a teacher-forced forward."""
    logprobs = (forced_logits(model, prompt, completion.ids) / temperature).log_softmax(-1)
    picked = logprobs.gather(1, torch.from_numpy(completion.ids.astype(np.int64))[:, None])[:, 0]
    np.testing.assert_allclose(completion.logprobs, picked.numpy(), atol=atol)
    np.testing.assert_allclose(completion.entropy, -(logprobs.exp() * logprobs).sum(-1).numpy(), atol=atol)


def same(left: Completion, right: Completion) -> bool:
    return np.array_equal(left.ids, right.ids) and left.finish_reason == right.finish_reason


def test_a_bf16_model_gives_unrounded_logits(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(student_model).to(torch.bfloat16)
    head = model.get_output_embeddings()
    states, scores = [], []
    model.model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    original = steps.choose
    monkeypatch.setattr(steps, "choose", lambda s, *rest: scores.append(s) or original(s, *rest))
    run(model, prompts, Sampling(4))
    for state, score in zip(states[1:], scores[1:], strict=True):  # the first is the prefill
        exact = state[:, -1].double() @ head.weight.detach().double().T
        assert score.dtype == torch.float32
        assert (score.double() - exact).abs().max() < 1e-4


# Tokens


def test_greedy_tokens_are_those_of_transformers_generate(student_model: Any, prompts: list[np.ndarray]) -> None:
    for prompt, completion in zip(prompts, run(student_model, prompts, Sampling(40, greedy=True)), strict=True):
        assert completion.ids.tolist() == theirs(student_model, prompt, 40)


def test_greedy_tokens_of_every_architecture_are_those_of_generate(shape: Any, prompts: list[np.ndarray]) -> None:
    """Through refills, shared prefills and windows shorter than the prompts."""
    several = [*prompts, prompts[2], prompts[2]]
    found = run(shape, several, Sampling(40, greedy=True), micro_batch=3)
    for prompt, completion in zip(several, found, strict=True):
        assert completion.ids.tolist() == theirs(shape, prompt, 40)
    assert len({tuple(c.ids) for c in found}) == len(prompts)


def test_sampled_logprobs_of_every_architecture_are_those_of_a_forced_forward(
    shape: Any, prompts: list[np.ndarray]
) -> None:
    for prompt, completion in zip(prompts, run(shape, prompts, Sampling(30, 1.4), micro_batch=2), strict=True):
        check_logprobs(shape, prompt, completion, 1.4, atol=1e-4)


def test_the_batch_around_a_row_changes_nothing_but_rounding(student_model: Any, prompts: list[np.ndarray]) -> None:
    together = run(student_model, prompts, Sampling(30))
    alone = [run(student_model, [p], Sampling(30), seeds=[i + 1])[0] for i, p in enumerate(prompts)]
    for a, b in zip(together, alone, strict=True):
        assert same(a, b)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-5)


def test_the_same_seed_gives_the_same_completion_in_another_batch(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    sampling = Sampling(40, temperature=1.3)
    seeds = [2**127 + i for i in range(len(prompts))]
    first = run(student_model, prompts, sampling, seeds=seeds)
    order = [3, 0, 4, 2, 1]
    second = run(student_model, [prompts[i] for i in order], sampling, seeds=[seeds[i] for i in order], micro_batch=2)
    for place, i in enumerate(order):
        assert same(second[place], first[i])


def test_other_seeds_give_other_completions(student_model: Any, prompts: list[np.ndarray]) -> None:
    completions = run(student_model, [prompts[0]] * 8, Sampling(40, temperature=1.5))
    assert len({tuple(c.ids) for c in completions}) > 4


def test_repeating_a_call_repeats_it_bit_for_bit(student_model: Any, prompts: list[np.ndarray]) -> None:
    first, second = (run(student_model, prompts, Sampling(30)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert same(a, b)
        assert np.array_equal(a.logprobs, b.logprobs)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 64])
def test_any_number_of_slots_gives_the_same_completions(
    student_model: Any, prompts: list[np.ndarray], slots: int
) -> None:
    """Groups of one prompt, in runs and scattered; more slots than rows, and fewer."""
    several = [prompts[i] for i in (0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 0, 1)]
    seeds = [100 + i for i in range(len(several))]
    for row, completion in enumerate(run(student_model, several, Sampling(50), seeds=seeds, micro_batch=slots)):
        alone = run(student_model, [several[row]], Sampling(50), seeds=[seeds[row]])[0]
        assert same(completion, alone)
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=3e-5)


class Counted:
    """How many rows each forward of a decoder had, prefills and steps apart."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefills: list[tuple[int, int]] = []
        self.steps: list[int] = []
        original = model.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            rows, tokens = kwargs["input_ids"].shape
            if "slots" in kwargs:
                self.steps.append(rows)
            else:
                self.prefills.append((rows, tokens))
            return original(*args, **kwargs)

        monkeypatch.setattr(model.model, "forward", forward)


def test_completions_of_one_prompt_share_its_prefill(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(student_model, monkeypatch)
    run(student_model, [prompts[0]] * 6 + [prompts[1]] * 6, Sampling(20), micro_batch=12)
    assert counted.prefills == [(2, max(len(prompts[0]), len(prompts[1])))]


def test_a_prefill_has_at_most_so_many_tokens(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(steps.PREFILL_TOKENS, "cpu", 60)
    counted = Counted(student_model, monkeypatch)
    found = run(student_model, prompts, Sampling(20))
    assert len(counted.prefills) > 2
    assert all(rows == 1 or rows * tokens <= 60 for rows, tokens in counted.prefills)
    monkeypatch.undo()
    assert all(same(a, b) for a, b in zip(found, run(student_model, prompts, Sampling(20)), strict=True))


def test_rows_that_end_make_room_and_the_tail_is_narrow(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced texts of known lengths: 40 rows in 8 slots, one of them long, at the end."""
    counted = Counted(student_model, monkeypatch)
    lengths = [*range(2, 41), 60]
    texts = [np.full(length, 42) for length in lengths]
    read = run(student_model, [prompts[0]] * 40, Sampling(1), forced=texts, micro_batch=8)
    assert [len(c.ids) for c in read] == lengths
    assert max(counted.steps) == 8
    assert sum(counted.steps) < 1.2 * (sum(lengths) - 40)  # the first token of a row is its prefill's
    assert counted.steps[-15:] == [1] * 15


def test_an_open_engine_keeps_its_slots_and_writes_the_same(student_model: Any, prompts: list[np.ndarray]) -> None:
    common: dict[str, Any] = {"vocab_size": V, "eos_ids": (EOS,), "pad_id": 0, "micro_batch": 4}
    with rollout_engine(student_model) as engine:
        for first, length in ((0, 30), (2, 10), (1, 45)):
            some, seeds = prompts[first:], list(range(first, len(prompts)))
            found = engine(some, seeds, Sampling(length), **common)
            wanted = generate(student_model, some, seeds, Sampling(length), **common)
            assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
        greedy = engine(prompts, [0] * len(prompts), Sampling(20, greedy=True), **common)
    assert greedy[0].ids.tolist() == theirs(student_model, prompts[0], 20)


def test_an_open_engine_notices_new_weights(adapted_model: Any, prompts: list[np.ndarray]) -> None:
    common: dict[str, Any] = {"vocab_size": V, "eos_ids": (EOS,), "pad_id": 0, "micro_batch": 4}
    seeds = list(range(len(prompts)))
    optimizer = torch.optim.AdamW([p for p in adapted_model.parameters() if p.requires_grad], lr=0.05)
    with rollout_engine(adapted_model) as engine:
        before = engine(prompts, seeds, Sampling(20), **common)
        adapted_model(input_ids=torch.arange(20, 30)[None]).logits.square().mean().backward()
        optimizer.step()
        after = engine(prompts, seeds, Sampling(20), **common)
    wanted = generate(adapted_model, prompts, seeds, Sampling(20), **common)
    assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(after, wanted, strict=True))
    assert not all(same(a, b) for a, b in zip(after, before, strict=True))


def test_an_interrupted_call_leaves_the_engine_usable(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"vocab_size": V, "eos_ids": (EOS,), "pad_id": 0, "micro_batch": 2}
    seeds = list(range(len(prompts)))
    wanted = generate(student_model, prompts, seeds, Sampling(30), **common)
    with rollout_engine(student_model) as engine:
        engine(prompts, seeds, Sampling(30), **common)
        monkeypatch.setattr(steps.Decoder, "take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine(prompts, seeds, Sampling(30), **common)
        monkeypatch.undo()
        assert all(same(a, b) for a, b in zip(engine(prompts, seeds, Sampling(30), **common), wanted, strict=True))


def test_no_prompts_give_no_completions_and_no_room_an_empty_one(student_model: Any, prompts: list[np.ndarray]) -> None:
    assert run(student_model, [], Sampling(5), micro_batch=4) == []
    read = run(student_model, prompts[:2], Sampling(5), forced=[np.array([], np.int64), np.array([20, 21])])
    assert [(c.ids.tolist(), c.finish_reason) for c in read] == [([], "length"), ([20, 21], "length")]


# Log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_those_of_a_teacher_forced_forward(
    student_model: Any, prompts: list[np.ndarray], temperature: float
) -> None:
    for prompt, completion in zip(prompts, run(student_model, prompts, Sampling(40, temperature)), strict=True):
        check_logprobs(student_model, prompt, completion, temperature, atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(40, 1.2, top_p=0.8), Sampling(40, 1.2, top_k=3)])
def test_logprobs_are_of_the_distribution_that_was_cut(
    student_model: Any, prompts: list[np.ndarray], sampling: Sampling
) -> None:
    for prompt, c in zip(prompts, run(student_model, prompts, sampling), strict=True):
        logprobs = sampling_logits(forced_logits(student_model, prompt, c.ids), sampling).log_softmax(-1)
        picked = logprobs.gather(1, torch.from_numpy(c.ids.astype(np.int64))[:, None])[:, 0]
        assert picked.isfinite().all()
        np.testing.assert_allclose(c.logprobs, picked.numpy(), atol=1e-4)


def test_a_forced_text_is_read_with_the_engines_own_logprobs(student_model: Any, prompts: list[np.ndarray]) -> None:
    drawn = run(student_model, prompts, Sampling(40))
    read = run(student_model, prompts, Sampling(7), seeds=[0] * len(prompts), forced=[c.ids for c in drawn])
    for a, b in zip(drawn, read, strict=True):
        assert b.ids[: len(a.ids)].tolist() == a.ids.tolist()
        np.testing.assert_allclose(b.logprobs[: len(a.ids)], a.logprobs, atol=1e-5)


def test_a_forced_text_without_eos_keeps_its_own_length_in_a_longer_batch(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    texts = [np.array([20, 21, 22]), np.array([30, 31, 32, 33, 34, EOS])]
    read = run(student_model, prompts[:2], Sampling(7), forced=texts)
    for prompt, text, c in zip(prompts[:2], texts, read, strict=True):
        logprobs = forced_logits(student_model, prompt, text).log_softmax(-1)
        picked = logprobs.gather(1, torch.from_numpy(text.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(c.logprobs[: len(text)], picked.numpy(), atol=1e-5)


def test_sampled_first_tokens_follow_the_models_distribution(student_model: Any, prompts: list[np.ndarray]) -> None:
    """The whole engine, seeds and all: 3,000 rows of one prompt, tokens of small mass taken together."""
    num_rows = 3000
    rows = run(student_model, [prompts[4]] * num_rows, Sampling(1, temperature=2.0), micro_batch=500)
    counts = np.bincount([c.ids[0] for c in rows], minlength=V)
    logits = forced_logits(student_model, prompts[4], np.array([EOS]))[0]
    expected = (logits / 2.0).softmax(-1).double().numpy() * num_rows
    large = expected >= 10
    pairs = [*zip(counts[large], expected[large], strict=True), (counts[~large].sum(), expected[~large].sum())]
    statistic = sum((c - e) ** 2 / e for c, e in pairs)
    degrees = len(pairs) - 1
    assert degrees >= 2
    assert statistic < degrees + 6 * np.sqrt(2 * degrees) + 12


# Where a completion ends


def always(model: Any, favourite: int) -> Any:
    """A copy of `model` whose every next token is `favourite` (all others are equally unlikely)."""
    changed = copy.deepcopy(model)
    num_ids, width = changed.lm_head.weight.shape
    changed.lm_head = torch.nn.Linear(width, num_ids)
    with torch.no_grad():
        changed.lm_head.weight.zero_()
        changed.lm_head.bias.zero_()
        changed.lm_head.bias[favourite] = 50.0
    return changed


def test_an_immediate_eos_is_a_completion_of_one_token(student_model: Any, prompts: list[np.ndarray]) -> None:
    for completion in run(always(student_model, EOS), prompts, Sampling(10)):
        assert completion.ids.tolist() == [EOS]
        assert completion.finish_reason == "eos"
        assert len(completion.logprobs) == len(completion.entropy) == 1


def test_any_of_several_eos_ids_ends_a_completion(student_model: Any, prompts: list[np.ndarray]) -> None:
    for ending in (EOS, 7, 9):
        found = run(always(student_model, ending), prompts, Sampling(10), eos_ids=(EOS, 7, 9))
        assert all(c.ids.tolist() == [ending] and c.finish_reason == "eos" for c in found)


def test_a_completion_without_eos_ends_at_its_length(student_model: Any, prompts: list[np.ndarray]) -> None:
    for completion in run(always(student_model, 42), prompts, Sampling(6)):
        assert completion.ids.tolist() == [42] * 6
        assert completion.finish_reason == "length"


def test_an_eos_as_the_last_possible_token_is_an_eos(student_model: Any, prompts: list[np.ndarray]) -> None:
    assert run(always(student_model, EOS), prompts[:1], Sampling(1))[0].finish_reason == "eos"


def test_rows_end_on_their_own(student_model: Any, prompts: list[np.ndarray]) -> None:
    for completion in run(student_model, prompts, Sampling(60)):
        assert EOS not in completion.ids[:-1]
        assert (completion.ids[-1] == EOS) == (completion.finish_reason == "eos")
        assert len(completion.ids) == len(completion.logprobs) == len(completion.entropy)


# What may not leak in


def test_ids_at_or_above_the_vocabulary_cut_are_never_drawn(student_model: Any, prompts: list[np.ndarray]) -> None:
    favourite_is_cut = always(student_model, 200)
    completions = run(favourite_is_cut, prompts * 4, Sampling(20), vocab_size=150)
    ids = np.concatenate([c.ids for c in completions])
    assert ids.max() < 150
    assert len(set(ids.tolist())) > 50  # uniform over what is left
    np.testing.assert_allclose(np.concatenate([c.logprobs for c in completions]), -np.log(150), atol=1e-5)
    greedy = run(favourite_is_cut, prompts, Sampling(3, greedy=True), vocab_size=150)
    assert all(c.ids.max() < 150 for c in greedy)


@pytest.fixture
def opinionated(tmp_path: Path) -> str:
    """The student with a generation_config.json like Qwen3's, and worse."""
    folder = tmp_path / "student"
    shutil.copytree(ROOT / STUDENT, folder)
    settings = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 2, "repetition_penalty": 1.5, "min_new_tokens": 30,
        "no_repeat_ngram_size": 2, "suppress_tokens": [20, 21, 22, 23], "max_new_tokens": 5, "eos_token_id": [1, 3],
        "pad_token_id": 0,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_the_checkpoints_generation_config_does_not_change_rollouts(
    student_model: Any, tokenizer: Any, opinionated: str, prompts: list[np.ndarray]
) -> None:
    model = checkpoints.load_model(opinionated, "main", torch.float32, "sdpa")
    assert checkpoints.eos_ids(model, tokenizer) == (1, 3)  # of all its settings these are used
    for sampling in (Sampling(40, temperature=1.2), Sampling(40, greedy=True)):
        expected = run(student_model, prompts, sampling, eos_ids=(1, 3))
        found = run(model, prompts, sampling, eos_ids=(1, 3))
        for a, b in zip(expected, found, strict=True):
            assert same(a, b)
            assert np.array_equal(a.logprobs, b.logprobs)


def test_a_model_without_any_eos_is_a_sentence() -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    with pytest.raises(UserError, match="no EOS token"):
        checkpoints.eos_ids(model, SimpleNamespace(eos_token_id=None))  # type: ignore[arg-type]


def test_a_model_in_training_is_put_back_into_training(student_model: Any, prompts: list[np.ndarray]) -> None:
    student_model.train()
    try:
        run(student_model, prompts[:1], Sampling(2))
        assert student_model.training
    finally:
        student_model.eval()


@pytest.fixture
def adapted_model(student_model: Any) -> Any:
    """The student with a LoRA adapter that does something, in training mode, with dropout."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(student_model), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.train()


def test_an_adapter_takes_part_in_generation(student_model: Any, adapted_model: Any, prompts: list[np.ndarray]) -> None:
    found = run(adapted_model, prompts, Sampling(20))
    assert not all(same(a, b) for a, b in zip(run(student_model, prompts, Sampling(20)), found, strict=True))
    adapted_model.eval()
    for prompt, completion in zip(prompts, found, strict=True):
        check_logprobs(adapted_model, prompt, completion, 1.0, atol=1e-5)


def test_a_merged_bf16_adapter_stays_within_the_probes_tolerance(adapted_model: Any, prompts: list[np.ndarray]) -> None:
    """Base weights in bf16, adapter in fp32, both under autocast: generator against training forward."""
    for name, parameter in adapted_model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    adapted_model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(adapted_model, prompts, Sampling(30))
        gaps = []
        for prompt, c in zip(prompts, found, strict=True):
            logprobs = forced_logits(adapted_model, prompt, c.ids).log_softmax(-1)
            picked = logprobs.gather(1, torch.from_numpy(c.ids.astype(np.int64))[:, None])[:, 0]
            gaps.append(np.abs(c.logprobs - picked.numpy()))
    assert np.concatenate(gaps).mean() < 0.02


def test_full_fine_tuning_decodes_in_autocasts_dtype(student_model: Any, prompts: list[np.ndarray]) -> None:
    """fp32 weights under bf16 autocast: the logprobs of the training forward under the same autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        found = run(student_model, prompts, Sampling(30))
        for prompt, c in zip(prompts, found, strict=True):
            logprobs = forced_logits(student_model, prompt, c.ids).log_softmax(-1)
            picked = logprobs.gather(1, torch.from_numpy(c.ids.astype(np.int64))[:, None])[:, 0]
            assert np.abs(c.logprobs - picked.numpy()).mean() < 0.02
    exact = run(student_model, prompts, Sampling(30), forced=[c.ids for c in found])
    assert not all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(found, exact, strict=True))


def test_the_model_is_bit_for_bit_what_it_was(
    adapted_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a call and after one that fails: weights, modules, attention, mode."""
    base = adapted_model.get_base_model()
    before = {name: tensor.clone() for name, tensor in adapted_model.state_dict().items()}
    modules = [id(module) for module in adapted_model.modules()]
    run(adapted_model, prompts, Sampling(5))
    monkeypatch.setattr(steps, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(adapted_model, prompts, Sampling(5))
    after = adapted_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [id(module) for module in adapted_model.modules()] == modules
    assert base.config._attn_implementation == "sdpa"
    assert adapted_model.training


def test_a_model_with_gradient_checkpointing_generates_and_still_trains(
    adapted_model: Any, prompts: list[np.ndarray]
) -> None:
    base = adapted_model.get_base_model()
    expected = run(adapted_model, prompts, Sampling(10))
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(same(a, b) for a, b in zip(run(adapted_model, prompts, Sampling(10)), expected, strict=True))
    loss = adapted_model(input_ids=torch.arange(20, 30)[None], use_cache=False).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None for name, p in adapted_model.named_parameters() if "lora_B" in name)
