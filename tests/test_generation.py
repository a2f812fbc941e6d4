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

from stages.data.prompts import encode
from stages.models import checkpoints, generation
from stages.models.generation import Completion, Sampling, draw, generate, sampling_logprobs
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


def same(left: Completion, right: Completion) -> bool:
    return np.array_equal(left.ids, right.ids) and left.finish_reason == right.finish_reason


def test_a_bf16_model_gives_unrounded_logits(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(student_model).to(torch.bfloat16)
    head = model.get_output_embeddings()
    states, scores = [], []
    head.register_forward_hook(lambda module, inputs, output: states.append(inputs[0][:, -1]))
    original = generation.sampling_logprobs
    monkeypatch.setattr(generation, "sampling_logprobs", lambda s, *rest: scores.append(s) or original(s, *rest))
    run(model, prompts, Sampling(4))
    exact = torch.cat(states).double() @ head.weight.detach().double().T
    found = torch.cat(scores)
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 1e-4
    assert "forward" not in vars(head)  # the model is as it was


# Tokens


def test_greedy_tokens_are_those_of_transformers_generate(student_model: Any, prompts: list[np.ndarray]) -> None:
    ours = run(student_model, prompts, Sampling(40, greedy=True))
    for prompt, completion in zip(prompts, ours, strict=True):  # theirs one by one: without any padding
        theirs = student_model.generate(
            input_ids=torch.from_numpy(prompt.astype(np.int64))[None], do_sample=False, max_new_tokens=40,
            eos_token_id=EOS, pad_token_id=0,
        )[0, len(prompt) :]  # fmt: skip
        assert completion.ids.tolist() == theirs.tolist()


def test_left_padding_changes_nothing_but_rounding(student_model: Any, prompts: list[np.ndarray]) -> None:
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


# Log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_those_of_a_teacher_forced_forward(
    student_model: Any, prompts: list[np.ndarray], temperature: float
) -> None:
    for prompt, c in zip(prompts, run(student_model, prompts, Sampling(40, temperature)), strict=True):
        logprobs = (forced_logits(student_model, prompt, c.ids) / temperature).log_softmax(-1)
        picked = logprobs.gather(1, torch.from_numpy(c.ids.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(c.logprobs, picked.numpy(), atol=1e-5)
        np.testing.assert_allclose(c.entropy, -(logprobs.exp() * logprobs).sum(-1).numpy(), atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(40, 1.2, top_p=0.8), Sampling(40, 1.2, top_k=3)])
def test_logprobs_are_of_the_distribution_that_was_cut(
    student_model: Any, prompts: list[np.ndarray], sampling: Sampling
) -> None:
    for prompt, c in zip(prompts, run(student_model, prompts, sampling), strict=True):
        logprobs = sampling_logprobs(forced_logits(student_model, prompt, c.ids), sampling, V)
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


# The draw


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    uniforms = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 0.9999999], dtype=torch.float64)
    tokens = draw(p.log().expand(len(uniforms), 4), uniforms)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]


def test_draw_never_gives_a_token_without_mass() -> None:
    p = torch.tensor([[0.0, 0.4, 0.0, 0.6, 0.0]])
    uniforms = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    assert set(draw(p.log().expand(1000, 5), uniforms).tolist()) == {1, 3}


def test_drawn_frequencies_are_the_probabilities() -> None:
    """A chi-square statistic below the 1 - 1e-6 quantile of 12 degrees of freedom (51.7)."""
    num_draws, size = 20_000, 13
    logprobs = torch.randn(1, size, generator=torch.Generator().manual_seed(0)).mul(1.5).log_softmax(-1)
    uniforms = torch.from_numpy(np.random.Generator(np.random.Philox(key=7)).random(num_draws))
    counts = torch.bincount(draw(logprobs.expand(num_draws, size), uniforms), minlength=size)
    expected = logprobs[0].double().exp() * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 51.7


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


# The sampling distribution


def oracle(logits: list[float], sampling: Sampling, vocab_size: int) -> list[float]:
    """Probabilities after cut, temperature, top-k and top-p, token by token in float64."""
    z = [value / sampling.temperature for value in logits[:vocab_size]]
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
        Sampling(1), Sampling(1, 0.5), Sampling(1, top_k=1), Sampling(1, top_k=4), Sampling(1, top_p=0.01),
        Sampling(1, top_p=0.6), Sampling(1, 1.7, 0.9, 6), Sampling(1, 0.8, 0.3, 3), Sampling(1, top_k=1000),
    ],
    ids=str,
)  # fmt: skip
def test_the_sampling_distribution_agrees_with_the_loop(sampling: Sampling) -> None:
    logits = torch.randn(7, 23, generator=torch.Generator().manual_seed(1)) * 2
    found = sampling_logprobs(logits, sampling, 19)
    assert found.shape == (7, 19)
    for row in range(7):
        np.testing.assert_allclose(found[row].exp().numpy(), oracle(logits[row].tolist(), sampling, 19), atol=1e-6)


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


def test_an_adapter_takes_part_in_generation(student_model: Any, prompts: list[np.ndarray]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        copy.deepcopy(student_model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    plain = run(student_model, prompts, Sampling(20))
    assert all(same(a, b) for a, b in zip(plain, run(model, prompts, Sampling(20)), strict=True))  # B is zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    assert not all(same(a, b) for a, b in zip(plain, run(model, prompts, Sampling(20)), strict=True))
