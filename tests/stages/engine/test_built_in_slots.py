"""The rollout engine's slots and weights: refill, shared prefills, engines kept open, adapters, what is put
back.
"""

import copy
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from stages.engine import decoder, sampler
from stages.engine.opening import open_engine
from stages.engine.slots import SlotState
from tests.support.small_models import (
    check_logprobs,
    forced_logits,
    question_prompts,
    run,
    same,
    theirs,
    write,
)
from tests.support.thinning import leading


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[np.ndarray]:
    return question_prompts(tokenizer)


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


# Slots


@pytest.mark.parametrize("slots", leading(2, [2, 7, 1, 3, 64]))
def test_any_number_of_slots_gives_the_same_completions(
    student_model: Any, prompts: list[np.ndarray], slots: int
) -> None:
    """Groups of one prompt, in runs and scattered; more slots than rows, and fewer."""
    several = [prompts[i] for i in (0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 0, 1)]
    seeds = [100 + i for i in range(len(several))]
    for row, completion in enumerate(run(student_model, several, 50, seeds=seeds, num_slots=slots)):
        alone = run(student_model, [several[row]], 50, seeds=[seeds[row]])[0]
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
    run(student_model, [prompts[0]] * 6 + [prompts[1]] * 6, 20, num_slots=12)
    assert counted.prefills == [(2, max(len(prompts[0]), len(prompts[1])))]


def test_a_prefill_has_at_most_so_many_tokens(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decoder.PREFILL_TOKENS, "cpu", 60)
    counted = Counted(student_model, monkeypatch)
    found = run(student_model, prompts, 20)
    assert len(counted.prefills) > 2
    assert all(rows == 1 or rows * tokens <= 60 for rows, tokens in counted.prefills)
    monkeypatch.undo()
    assert all(same(a, b) for a, b in zip(found, run(student_model, prompts, 20), strict=True))


def test_rows_that_end_make_room_and_the_tail_is_narrow(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced texts of known lengths: 40 rows in 8 slots, one of them long, at the end."""
    counted = Counted(student_model, monkeypatch)
    lengths = [*range(2, 41), 60]
    texts = [np.full(length, 42) for length in lengths]
    read = run(student_model, [prompts[0]] * 40, 1, forced=texts, num_slots=8)
    assert [len(c.ids) for c in read] == lengths
    assert max(counted.steps) == 8
    assert sum(counted.steps) < 1.2 * (sum(lengths) - 40)  # the first token of a row is its prefill's
    assert counted.steps[-15:] == [1] * 15


def test_an_open_engine_writes_bit_for_bit_what_a_new_one_writes(
    student_model: Any, prompts: list[np.ndarray]
) -> None:
    with closing(open_engine(student_model)) as engine:
        for first, length in ((0, 30), (2, 10), (1, 45), (4, 45)):
            some, seeds = prompts[first:], list(range(first, len(prompts)))
            found = write(engine, some, length, seeds=seeds, num_slots=4)
            wanted = run(student_model, some, length, seeds=seeds, num_slots=4)
            for a, b in zip(found, wanted, strict=True):
                assert same(a, b)
                assert np.array_equal(a.logprobs, b.logprobs)
        greedy = write(engine, prompts, 20, greedy=True, num_slots=4)
    assert greedy[0].ids.tolist() == theirs(student_model, prompts[0], 20)


def test_slots_are_not_made_anew_for_a_few_tokens_more(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that would capture every step again."""
    made: list[int] = []
    original = decoder.Decoder.__init__
    monkeypatch.setattr(decoder.Decoder, "__init__", lambda *a: made.append(a[5]) or original(*a))
    with closing(open_engine(student_model)) as engine:
        for length in (30, 31, 20, 54, 65):
            texts = [np.full(length, 42)] * 4
            write(engine, [np.arange(20, 30)] * 4, 1, forced=texts)
    assert made == [64, 128]


def test_an_open_engine_notices_new_weights(adapted_model: Any, prompts: list[np.ndarray]) -> None:
    optimizer = torch.optim.AdamW([p for p in adapted_model.parameters() if p.requires_grad], lr=0.05)
    with closing(open_engine(adapted_model)) as engine:
        before = write(engine, prompts, 20, num_slots=4)
        adapted_model(input_ids=torch.arange(20, 30)[None]).logits.square().mean().backward()
        optimizer.step()
        after = write(engine, prompts, 20, num_slots=4)
    wanted = run(adapted_model, prompts, 20, num_slots=4)
    assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(after, wanted, strict=True))
    assert not all(same(a, b) for a, b in zip(after, before, strict=True))


def test_an_interrupted_call_leaves_the_engine_usable(
    student_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(student_model, prompts, 30, num_slots=2)
    with closing(open_engine(student_model)) as engine:
        write(engine, prompts, 30, num_slots=2)
        monkeypatch.setattr(SlotState, "completions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(engine, prompts, 30, num_slots=2)
        monkeypatch.undo()
        assert all(same(a, b) for a, b in zip(write(engine, prompts, 30, num_slots=2), wanted, strict=True))


def test_no_prompts_give_no_completions(student_model: Any) -> None:
    assert run(student_model, [], 5, num_slots=4) == []


# Weights


def test_an_adapter_takes_part_in_generation(
    student_model: Any, adapted_model: Any, prompts: list[np.ndarray]
) -> None:
    found = run(adapted_model, prompts, 20)
    assert not all(same(a, b) for a, b in zip(run(student_model, prompts, 20), found, strict=True))
    adapted_model.eval()
    for prompt, completion in zip(prompts, found, strict=True):
        check_logprobs(adapted_model, prompt, completion, 1.0, atol=1e-5)


def test_a_merged_bf16_adapter_stays_within_the_probes_tolerance(
    adapted_model: Any, prompts: list[np.ndarray]
) -> None:
    """Base weights in bf16, adapter in fp32, both under autocast: generator against training forward."""
    for name, parameter in adapted_model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    adapted_model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(adapted_model, prompts, 30)
        gaps = []
        for prompt, c in zip(prompts, found, strict=True):
            logprobs = forced_logits(adapted_model, prompt, c.ids).log_softmax(-1)
            picked = logprobs.gather(1, torch.from_numpy(c.ids.astype(np.int64))[:, None])[:, 0]
            gaps.append(np.abs(c.logprobs - picked.numpy()))
    assert np.concatenate(gaps).mean() < 0.02


def test_full_fine_tuning_decodes_in_autocasts_dtype(student_model: Any, prompts: list[np.ndarray]) -> None:
    """fp32 weights under bf16 autocast: the logprobs of the training forward under the same autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        found = run(student_model, prompts, 30)
        for prompt, c in zip(prompts, found, strict=True):
            logprobs = forced_logits(student_model, prompt, c.ids).log_softmax(-1)
            picked = logprobs.gather(1, torch.from_numpy(c.ids.astype(np.int64))[:, None])[:, 0]
            assert np.abs(c.logprobs - picked.numpy()).mean() < 0.02
    exact = run(student_model, prompts, 30, forced=[c.ids for c in found])
    assert not all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(found, exact, strict=True))


def test_the_model_is_bit_for_bit_what_it_was(
    adapted_model: Any, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a call and after one that fails: weights, modules, attention, mode."""
    base = adapted_model.get_base_model()
    before = {name: tensor.clone() for name, tensor in adapted_model.state_dict().items()}
    modules = [id(module) for module in adapted_model.modules()]
    run(adapted_model, prompts, 5)
    monkeypatch.setattr(sampler, "choose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(adapted_model, prompts, 5)
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
    expected = run(adapted_model, prompts, 10)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(same(a, b) for a, b in zip(run(adapted_model, prompts, 10), expected, strict=True))
    loss = adapted_model(input_ids=torch.arange(20, 30)[None], use_cache=False).logits.square().mean()
    loss.backward()
    assert all(p.grad is not None for name, p in adapted_model.named_parameters() if "lora_B" in name)
