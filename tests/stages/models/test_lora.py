"""The lean forward of plain LoRA: PEFT's values and gradients, PEFT's own forward for all else, and fewer
products.
"""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from stages.engine.weights import DecodingWeights
from stages.models.lora import LeanLinear, adapted, make_lean
from tests.support.helpers import make_run
from tests.support.thinning import thinned
from tests.support.tiny_runs import TINY, student_of

NARROW, WIDE, R, SCALE = 7, 11, 3, 7 / 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def network(dtype: torch.dtype, offset: bool = True, **options: Any) -> Any:
    """Two adapted layers with weights in `dtype`; adapters in fp32 at least, none of them zero."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(NARROW, WIDE, bias=offset), nn.SiLU(), nn.Linear(WIDE, NARROW, bias=offset)
    ).to(dtype)
    model = get_peft_model(layers, LoraConfig(r=R, lora_alpha=7, target_modules=["0", "2"], **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).to(torch.promote_types(dtype, torch.float32)) / 3
    return model


def results(
    model: Any, x: torch.Tensor, run: Callable[[Any, torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The output, and the gradients of its weighted sum."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16) if x.dtype == torch.bfloat16 else nullcontext():
        out = run(model, x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape))
    found: dict[str, Any] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.dtype != torch.bfloat16 for gradient in found.values())
    return found | {"out": out.detach(), "x": x.grad}


def plain(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def recomputed(model: Any, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(model, x, use_reentrant=False)


def compiled(model: Any, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(model.base_model.model, backend="aot_eager", dynamic=True, fullgraph=True)(x)


def compiled_and_recomputed(model: Any, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    inner = model.base_model.model

    def run(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(inner, x, use_reentrant=False)

    return torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)(x)


def inputs(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, NARROW, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("run", "dtype", "bias"),
    thinned(5, [compiled_and_recomputed, plain, recomputed, compiled], TOLERANCE, [False, True]),
)
def test_values_and_gradients_are_those_of_peft(run: Any, dtype: torch.dtype, bias: bool) -> None:
    theirs, ours = network(dtype, bias), network(dtype, bias)
    make_lean(ours)
    x = inputs(dtype, 2, 5)
    wanted, found = results(theirs, x, plain), results(ours, x, run)
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert (found[name] - value).norm() <= TOLERANCE[dtype] * value.norm(), name


def test_gradients_are_no_farther_from_the_truth_than_those_of_peft() -> None:
    x = inputs(torch.bfloat16, 300)
    theirs, ours = network(torch.bfloat16), network(torch.bfloat16)
    make_lean(ours)
    truth = results(copy.deepcopy(theirs).double(), x.double(), plain)
    errors = []
    for model in (ours, theirs):
        found = results(model, x, plain)
        errors.append(
            sum(float((found[name] - value).norm() / value.norm()) for name, value in truth.items())
        )
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.gpu
@pytest.mark.parametrize("run", [plain, recomputed])
def test_values_and_gradients_on_cuda_are_those_of_the_cpu(run: Any) -> None:
    x, models = inputs(torch.bfloat16, 2, 50), [network(torch.bfloat16), network(torch.bfloat16).to("cuda")]
    make_lean(models[1])
    truth = results(models[0].double(), x.double(), plain)
    found = results(models[1], x.to("cuda"), run)
    for name, value in truth.items():
        assert (found[name].cpu() - value).norm() <= 2e-2 * value.norm(), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("bias", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_without_gradients_an_update_far_below_a_step_of_bfloat16_is_kept(
    bias: bool, dropout: float, device: str
) -> None:
    """PEFT adds it to values that were rounded before, where most of it is lost."""
    torch.manual_seed(0)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(256, 256, bias=bias)).to(torch.bfloat16),
        LoraConfig(r=16, target_modules=["0"], lora_dropout=dropout),
    ).eval()
    layer = model.base_model.model[0]
    layer.lora_B.default.weight.data.normal_(0, 2e-4)
    x = torch.randn(512, 256).to(torch.bfloat16)
    with torch.no_grad():
        low = x.double() @ layer.get_delta_weight("default").double().t()
        base = x.double() @ layer.get_base_layer().weight.double().t()
        base += layer.get_base_layer().bias.double() if bias else 0
    assert 2**-13 < float(low.std() / base.std()) < 2**-11
    model.to(device)

    def kept() -> float:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            moved = model(x.to(device)).double().cpu() - base
        return float((moved * low).sum() / low.square().sum())

    assert kept() < 0.5
    make_lean(model)
    assert kept() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_that_of_the_values(bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 3, NARROW), (WIDE, NARROW), (WIDE,), (R, NARROW), (WIDE, R)]
    x, weight, offset, a, b = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    assert torch.autograd.gradcheck(
        lambda x, a, b: adapted(x, weight, offset if bias else None, a, b, SCALE), leaves, fast_mode=False
    )


def test_what_needs_no_gradient_gets_none() -> None:
    model = network(torch.float32)
    make_lean(model)
    first = model.base_model.model[0]
    first.lora_A.default.weight.requires_grad_(False)
    model(inputs(torch.float32, 4)).sum().backward()
    assert first.lora_A.default.weight.grad is None
    assert first.lora_B.default.weight.grad.any()


def test_rows_that_do_not_lie_together_are_served() -> None:
    model = network(torch.float64)
    x = inputs(torch.float64, 3, 4).transpose(0, 1)
    wanted = model(x)
    make_lean(model)
    torch.testing.assert_close(model(x), wanted)


class Products(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_a_recomputed_block_leaves_out_its_last_wide_product() -> None:
    model = network(torch.float32, offset=False)
    make_lean(model)
    x = inputs(torch.float32, 5).requires_grad_()
    with Products() as ahead:
        out = recomputed(model, x)
    assert ahead.count["aten.addmm_.default"] == 2, "one a layer"
    with Products() as back:
        out.sum().backward()
    assert back.count["aten.addmm_.default"] == 3, (
        "the first layer's again, and the gradients by both layers' inputs"
    )


def second_adapter(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=R, target_modules=["0", "2"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"lora_dropout": 0.5}, None),
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
        ({"bias": "all"}, None),
        ({}, second_adapter),
        ({}, lambda model: model.merge_adapter()),
        ({}, lambda model: model.base_model.disable_adapter_layers()),
    ],
    ids=["dropout", "dora", "bias of the adapter", "trained bias", "two adapters", "merged", "disabled"],
)
def test_all_else_is_the_forward_of_peft(options: Any, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.models.lora.adapted", None)
    model = network(torch.float32, **options)
    if change is not None:
        change(model)
    x = inputs(torch.float32, 4)
    torch.manual_seed(5)
    wanted = model(x)
    make_lean(model)
    torch.manual_seed(5)
    assert torch.equal(model(x), wanted)


def test_weights_in_another_dtype_than_the_products_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.models.lora.adapted", None)
    model = network(torch.float32)
    make_lean(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs(torch.float32, 4)).dtype == torch.bfloat16


def test_an_adapter_is_back_after_it_was_off() -> None:
    model, x = network(torch.float32), inputs(torch.float32, 4)
    make_lean(model)
    on = model(x)
    with model.disable_adapter():
        off = model(x)
    assert torch.equal(model(x), on)
    model.merge_adapter()
    torch.testing.assert_close(model(x), on)
    model.unmerge_adapter()
    assert not torch.allclose(on, off)


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "Linear"), ("bf16", "LeanLinear")])
def test_a_student_is_lean_in_bfloat16(tmp_path: Path, dtype: str, kind: str) -> None:
    student = student_of(make_run(tmp_path, **(TINY | {"dtype": dtype})))
    layers = [m for name, m in student.model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    assert {type(layer).__name__ for layer in layers} == {kind}


def test_the_engine_merges_lean_layers(tmp_path: Path) -> None:
    student = student_of(make_run(tmp_path, **(TINY | {"dtype": "bf16"})))
    decoder = student.base.get_decoder()
    own = decoder.layers[0].mlp.up_proj
    assert type(own) is LeanLinear
    with DecodingWeights(decoder, torch.bfloat16).swapped():
        assert type(decoder.layers[0].mlp.up_proj) is nn.Linear
    assert decoder.layers[0].mlp.up_proj is own
