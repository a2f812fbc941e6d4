"""What an open rollout engine notices between two of its calls: every change of weights and adapters, and
nothing else.
"""

import copy
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from stages.engine import built_in
from stages.engine.opening import open_engine
from stages.engine.origin import _sum_of_bits
from stages.engine.protocol import Completion
from tests.support.small_models import question_prompts, run, write


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[np.ndarray]:
    return question_prompts(tokenizer)[:2]


@torch.no_grad()
def stirred(model: PeftModel, seed: int, adapter: str = "default") -> PeftModel:
    """B of an adapter with numbers of its own, so that the adapter does something."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name and adapter in name:
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model


def adapted(student_model: Any, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return stirred(get_peft_model(copy.deepcopy(student_model), lora), seed).eval()


@pytest.fixture
def model(student_model: Any, other: Path) -> PeftModel:
    """The student with two adapters, `default` in force."""
    model = adapted(student_model, 1)
    model.load_adapter(str(other), "second")
    return model


@pytest.fixture(scope="module")
def other(student_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another adapter of the student."""
    folder = tmp_path_factory.mktemp("other")
    adapted(student_model, 2).save_pretrained(folder)
    return folder


def written(call: Callable[..., list[Completion]], prompts: list[np.ndarray]) -> list[np.ndarray]:
    """Logprobs of fixed texts and of drawn ones."""
    forced = [np.arange(20, 35)] * len(prompts)
    return [completion.logprobs for completion in call(prompts, 15, forced=forced) + call(prompts, 15)]


def equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def layers(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def weights(model: PeftModel, part: str) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if part in name]


def reload(model: PeftModel, other: Path) -> None:
    """Another adapter under the name of the one that it replaces, perhaps in the memory of the old one."""
    model.set_adapter("second")
    model.delete_adapter("default")
    model.load_adapter(str(other), "default")
    model.set_adapter("default")


@torch.no_grad()
def in_place(model: PeftModel, other: Path) -> None:
    for parameter in weights(model, "lora_B.default"):
        parameter.mul_(2)


def through_data(part: str) -> Callable[[PeftModel, Path], None]:
    def change(model: PeftModel, other: Path) -> None:
        for parameter in weights(model, part):
            parameter.data.mul_(1.5)

    return change


def negated_through_data(model: PeftModel, other: Path) -> None:
    """Of the same norm as before."""
    for parameter in weights(model, "lora_B.default"):
        parameter.data.neg_()


def one_number(model: PeftModel, other: Path) -> None:
    weights(model, "layers.0.self_attn.q_proj.base_layer")[0].data[0, 0] += 1


def rescaled(model: PeftModel, other: Path) -> None:
    for layer in layers(model):
        layer.scale_layer(3.0)


def replaced(model: PeftModel, other: Path) -> None:
    for parameter in weights(model, "lora_A.default"):
        parameter.data = parameter.data.flip(0) * 2


CHANGES: dict[str, Callable[[PeftModel, Path], Any]] = {
    "weights in place": in_place,
    "adapter through .data": through_data("lora_B.default"),
    "adapter negated through .data": negated_through_data,
    "base through .data": through_data("base_layer"),
    "norms through .data": through_data("norm"),
    "head and embedding through .data": through_data("embed_tokens"),
    "one number of a frozen weight": one_number,
    "tensors replaced": replaced,
    "set_adapter": lambda model, other: model.set_adapter("second"),
    "two adapters at once": lambda model, other: model.base_model.set_adapter(["default", "second"]),
    "disable_adapter_layers": lambda model, other: model.base_model.disable_adapter_layers(),
    "load_adapter": lambda model, other: model.load_adapter(str(other), "default"),
    "delete_adapter and load_adapter": reload,
    "hotswap_adapter": lambda model, other: hotswap_adapter(model, str(other), "default"),
    "scale_layer": rescaled,
    "merge another adapter": lambda model, other: model.merge_adapter(["second"]),
    "unload": lambda model, other: model.unload(),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls_takes_effect(
    model: PeftModel, other: Path, prompts: list[np.ndarray], change: str, autocast: bool
) -> None:
    with closing(open_engine(model)) as engine, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = written(partial(write, engine), prompts)
        CHANGES[change](model, other)
        after = written(partial(write, engine), prompts)
        assert equal(after, written(partial(run, model), prompts))
    assert not equal(after, before)


@pytest.mark.parametrize("names", [None, ["second"]], ids=["the active adapter", "another adapter"])
def test_merging_and_unmerging_take_effect(
    model: PeftModel, prompts: list[np.ndarray], names: list[str] | None
) -> None:
    """Each time the engine writes what a new one would, merged weights and all."""
    with closing(open_engine(model)) as engine:
        for change in (lambda: model.merge_adapter(names), model.unmerge_adapter):
            written(partial(write, engine), prompts)
            change()
            assert equal(written(partial(write, engine), prompts), written(partial(run, model), prompts))


def test_a_disabled_adapter_is_the_base_model_for_as_long_as_it_is_disabled(
    student_model: Any, model: PeftModel, prompts: list[np.ndarray]
) -> None:
    with closing(open_engine(model)) as engine:
        before = written(partial(write, engine), prompts)
        with model.disable_adapter():
            plain = written(partial(write, engine), prompts)
        again = written(partial(write, engine), prompts)
    assert equal(plain, written(partial(run, student_model), prompts))
    assert equal(again, before)


def test_a_hot_swap_prepared_for_compilation_is_noticed(
    student_model: Any, other: Path, prompts: list[np.ndarray]
) -> None:
    """Its scales are tensors that are written in place."""
    model = adapted(student_model, 1)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    with closing(open_engine(model)) as engine:
        before = written(partial(write, engine), prompts)
        hotswap_adapter(model, str(other), "default")
        after = written(partial(write, engine), prompts)
        for layer in layers(model):
            layer.scaling["default"].fill_(0.5)
        rescaled = written(partial(write, engine), prompts)
    assert equal(rescaled, written(partial(run, model), prompts))
    assert not equal(before, after)
    assert not equal(after, rescaled)


def test_without_a_change_nothing_is_made_anew_and_a_call_looks_once(
    model: PeftModel, prompts: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many steps it takes: the look is a pass over the weights."""
    calls: list[str] = []

    def count(name: str) -> None:
        original = getattr(built_in, name)
        monkeypatch.setattr(built_in, name, lambda *a: calls.append(name) or original(*a))

    for name in ("DecodingWeights", "Decoder", "origin_of"):
        count(name)
    with closing(open_engine(model)) as engine:
        for _ in range(3):
            written(partial(write, engine), prompts)
    assert calls.count("origin_of") == 6
    assert (calls.count("DecodingWeights"), calls.count("Decoder")) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("place", [slice(None), slice(1, None), slice(3, 8), slice(0, 0)], ids=str)
def test_a_sum_of_bits_is_that_of_the_numbers_wherever_they_lie(dtype: torch.dtype, place: slice) -> None:
    """Whole memory and parts of it that begin and end anywhere; rows and columns."""
    whole = torch.randint(1, 99, (9, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    for view in (whole[place], whole.t()[place]):
        found = _sum_of_bits(view)
        assert found.dtype == torch.int64
        assert torch.equal(found, _sum_of_bits(view.clone(memory_format=torch.contiguous_format)))
        if view.numel():
            view[-1, -1] += 1
            assert not torch.equal(found, _sum_of_bits(view))
