"""The rollout engine: its tokens against transformers' own, its logprobs against a teacher-forced forward."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.engine import sampler
from stages.engine.sampling import sampling_logits
from stages.models import ends, pretrained
from stages.models.readout import readout_of
from tests.support.helpers import ROOT, STUDENT
from tests.support.small_models import (
    CONFIGS,
    EOS,
    V,
    check_logprobs,
    forced_logits,
    question_prompts,
    random_model,
    run,
    same,
    sampling_of,
    theirs,
)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[np.ndarray]:
    return question_prompts(tokenizer)


@pytest.fixture(scope="module", params=CONFIGS)
def shape(request: pytest.FixtureRequest) -> Any:
    """A small random model of each architecture, peaked enough to have clear winners."""
    return random_model(request.param)


def test_a_bf16_model_gives_unrounded_logits(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(student_model).to(torch.bfloat16)
    head = model.get_output_embeddings()
    readout_of(model)  # a forward of its own
    states, scores = [], []
    model.model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    original = sampler.choose
    monkeypatch.setattr(sampler, "choose", lambda s, *rest: scores.append(s) or original(s, *rest))
    run(model, prompts, 4)
    for state, score in zip(states[1:], scores[1:], strict=True):  # the first is the prefill
        exact = state[:, -1].double() @ head.weight.detach().double().T
        assert score.dtype == torch.float32
        assert (score.double() - exact).abs().max() < 1e-4


# Tokens


def test_greedy_tokens_are_those_of_transformers_generate(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    for prompt, completion in zip(prompts, run(student_model, prompts, 40, greedy=True), strict=True):
        assert completion.ids.tolist() == theirs(student_model, prompt, 40)


def test_greedy_tokens_of_every_architecture_are_those_of_generate(
    shape: Any, prompts: list[np.ndarray]
) -> None:
    """Through refills, shared prefills and windows shorter than the prompts."""
    several = [*prompts, prompts[2], prompts[2]]
    found = run(shape, several, 40, greedy=True, num_slots=3)
    for prompt, completion in zip(several, found, strict=True):
        assert completion.ids.tolist() == theirs(shape, prompt, 40)
    assert len({tuple(c.ids) for c in found}) == len(prompts)


def test_sampled_logprobs_of_every_architecture_are_those_of_a_forced_forward(
    shape: Any, prompts: list[np.ndarray]
) -> None:
    for prompt, completion in zip(
        prompts, run(shape, prompts, 30, temperature=1.4, num_slots=2), strict=True
    ):
        check_logprobs(shape, prompt, completion, 1.4, atol=1e-4)


def test_the_batch_around_a_row_changes_nothing_but_rounding(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    together = run(student_model, prompts, 30)
    alone = [run(student_model, [p], 30, seeds=[i + 1])[0] for i, p in enumerate(prompts)]
    for a, b in zip(together, alone, strict=True):
        assert same(a, b)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-5)


def test_the_same_seed_gives_the_same_completion_in_another_batch(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    seeds = [2**127 + i for i in range(len(prompts))]
    first = run(student_model, prompts, 40, temperature=1.3, seeds=seeds)
    order = [3, 0, 4, 2, 1]
    second = run(
        student_model,
        [prompts[i] for i in order],
        40,
        temperature=1.3,
        seeds=[seeds[i] for i in order],
        num_slots=2,
    )
    for place, i in enumerate(order):
        assert same(second[place], first[i])


def test_other_seeds_give_other_completions(student_model: Any, prompts: list[np.ndarray]) -> None:
    completions = run(student_model, [prompts[0]] * 8, 40, temperature=1.5)
    assert len({tuple(c.ids) for c in completions}) > 4


def test_repeating_a_call_repeats_it_bit_for_bit(student_model: Any, prompts: list[np.ndarray]) -> None:
    first, second = (run(student_model, prompts, 30) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert same(a, b)
        assert np.array_equal(a.logprobs, b.logprobs)


# Log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropies_are_those_of_a_teacher_forced_forward(
    student_model: Any, prompts: list[np.ndarray], temperature: float
) -> None:
    for prompt, completion in zip(
        prompts, run(student_model, prompts, 40, temperature=temperature), strict=True
    ):
        check_logprobs(student_model, prompt, completion, temperature, atol=1e-5)


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 3}], ids=str)
def test_logprobs_are_of_the_distribution_that_was_cut(
    student_model: Any, prompts: list[np.ndarray], cut: dict[str, Any]
) -> None:
    sampling = sampling_of(temperature=1.2, **cut)
    found = run(student_model, prompts, 40, temperature=1.2, **cut)
    for prompt, c in zip(prompts, found, strict=True):
        logprobs = sampling_logits(forced_logits(student_model, prompt, c.ids), sampling).log_softmax(-1)
        picked = logprobs.gather(1, torch.from_numpy(c.ids.astype(np.int64))[:, None])[:, 0]
        assert picked.isfinite().all()
        np.testing.assert_allclose(c.logprobs, picked.numpy(), atol=1e-4)


def test_a_forced_text_is_read_with_the_engines_own_logprobs(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    drawn = run(student_model, prompts, 40)
    read = run(student_model, prompts, 7, seeds=[0] * len(prompts), forced=[c.ids for c in drawn])
    for a, b in zip(drawn, read, strict=True):
        assert b.ids[: len(a.ids)].tolist() == a.ids.tolist()
        np.testing.assert_allclose(b.logprobs[: len(a.ids)], a.logprobs, atol=1e-5)


def test_a_forced_text_without_eos_keeps_its_own_length_in_a_longer_batch(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    texts = [np.array([20, 21, 22]), np.array([30, 31, 32, 33, 34, EOS])]
    read = run(student_model, prompts[:2], 7, forced=texts)
    for prompt, text, c in zip(prompts[:2], texts, read, strict=True):
        logprobs = forced_logits(student_model, prompt, text).log_softmax(-1)
        picked = logprobs.gather(1, torch.from_numpy(text.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(c.logprobs[: len(text)], picked.numpy(), atol=1e-5)


def test_sampled_first_tokens_follow_the_models_distribution(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    """The whole engine, seeds and all: 3,000 rows of one prompt, tokens of small mass taken together."""
    num_rows = 3000
    rows = run(student_model, [prompts[4]] * num_rows, 1, temperature=2.0, num_slots=500)
    counts = np.bincount([c.ids[0] for c in rows], minlength=V)
    logits = forced_logits(student_model, prompts[4], np.array([EOS]))[0]
    expected = (logits / 2.0).softmax(-1).double().numpy() * num_rows
    large = expected >= 10
    pairs = [
        *zip(counts[large], expected[large], strict=True),
        (counts[~large].sum(), expected[~large].sum()),
    ]
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
    for completion in run(always(student_model, EOS), prompts, 10):
        assert completion.ids.tolist() == [EOS]
        assert completion.finish_reason == "eos"
        assert len(completion.logprobs) == len(completion.entropy) == 1


def test_any_of_several_eos_ids_ends_a_completion(student_model: Any, prompts: list[np.ndarray]) -> None:
    for ending in (EOS, 7, 9):
        found = run(always(student_model, ending), prompts, 10, eos_ids=(EOS, 7, 9))
        assert all(c.ids.tolist() == [ending] and c.finish_reason == "eos" for c in found)


def test_a_completion_without_eos_ends_at_its_length(student_model: Any, prompts: list[np.ndarray]) -> None:
    for completion in run(always(student_model, 42), prompts, 6):
        assert completion.ids.tolist() == [42] * 6
        assert completion.finish_reason == "length"


def test_an_eos_as_the_last_possible_token_is_an_eos(student_model: Any, prompts: list[np.ndarray]) -> None:
    assert run(always(student_model, EOS), prompts[:1], 1)[0].finish_reason == "eos"


def test_rows_end_on_their_own(student_model: Any, prompts: list[np.ndarray]) -> None:
    for completion in run(student_model, prompts, 60):
        assert EOS not in completion.ids[:-1]
        assert (completion.ids[-1] == EOS) == (completion.finish_reason == "eos")
        assert len(completion.ids) == len(completion.logprobs) == len(completion.entropy)


# What may not leak in


def test_ids_at_or_above_the_vocabulary_cut_are_never_drawn(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    favourite_is_cut = always(student_model, 200)
    completions = run(favourite_is_cut, prompts * 4, 20, vocab_size=150)
    ids = np.concatenate([c.ids for c in completions])
    assert ids.max() < 150
    assert len(set(ids.tolist())) > 50  # uniform over what is left
    np.testing.assert_allclose(np.concatenate([c.logprobs for c in completions]), -np.log(150), atol=1e-5)
    greedy = run(favourite_is_cut, prompts, 3, greedy=True, vocab_size=150)
    assert all(c.ids.max() < 150 for c in greedy)


@pytest.fixture
def opinionated(tmp_path: Path) -> str:
    """The student with a generation_config.json like Qwen3's, and worse."""
    folder = tmp_path / "student"
    shutil.copytree(ROOT / STUDENT, folder)
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 2,
        "repetition_penalty": 1.5,
        "min_new_tokens": 30,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [20, 21, 22, 23],
        "max_new_tokens": 5,
        "eos_token_id": [1, 3],
        "pad_token_id": 0,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_the_checkpoints_generation_config_does_not_change_rollouts(
    student_model: Any, tokenizer: Any, opinionated: str, prompts: list[np.ndarray]
) -> None:
    model = pretrained.load_model(opinionated, torch.float32, "sdpa")
    assert set(ends.checkpoint_ends(opinionated)) == {1, 3}  # of all its settings these are used
    for sampling in ({"temperature": 1.2}, {"greedy": True}):
        expected = run(student_model, prompts, 40, eos_ids=(1, 3), **sampling)
        found = run(model, prompts, 40, eos_ids=(1, 3), **sampling)
        for a, b in zip(expected, found, strict=True):
            assert same(a, b)
            assert np.array_equal(a.logprobs, b.logprobs)


def test_a_model_in_training_is_put_back_into_training(student_model: Any, prompts: list[np.ndarray]) -> None:
    student_model.train()
    try:
        run(student_model, prompts[:1], 2)
        assert student_model.training
    finally:
        student_model.eval()
