"""Layers of one input as one product: always what the layers give apart, whatever is called when and with
what.
"""

from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from stages.engine.joined import JoinedLinear, join


@torch.no_grad()
@pytest.mark.parametrize("has_bias", [False, True])
def test_joined_layers_give_what_they_gave_apart(has_bias: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, size, bias=has_bias) for size in (6, 4, 5)]
    joined = join(list(layers))
    assert joined is not None
    x, others = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    for inputs in ((x, x, x), (x, others, x), (others, x, others), (x, x, x)):
        for layer, own, given in zip(layers, joined, inputs, strict=True):
            assert torch.equal(own.weight, layer.weight)
            torch.testing.assert_close(own(given), layer(given))
    for own, layer in reversed(
        list(zip(joined, layers, strict=True))
    ):  # in another order, the first one's product is gone
        torch.testing.assert_close(own(x), layer(x))


def joined_pair() -> tuple[list[torch.nn.Linear], list[JoinedLinear]]:
    """Two layers apart, and joined."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(2)]
    joined = join(list(layers))
    assert joined is not None
    return layers, joined


CHANGES = {
    "in place": lambda x: x.mul_(-1),
    "by a view": lambda x: x[1].zero_(),
    "by its detached twin": lambda x: x.detach().add_(1),
    "as an output": lambda x: torch.mm(torch.ones(3, 3), torch.ones(3, 8), out=x),
    "by new data": lambda x: setattr(x, "data", torch.ones(3, 8)),
    "in shape": lambda x: x.unsqueeze_(0),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_input_that_changes_between_two_joined_layers_is_read_anew(
    change: Callable[[torch.Tensor], object],
) -> None:
    layers, joined = joined_pair()
    x = torch.randn(3, 8)
    joined[0](x)
    change(x)
    torch.testing.assert_close(joined[1](x), layers[1](x))


@torch.no_grad()
def test_joined_layers_share_one_product_and_keep_none(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: products.append(len(a[1])) or linear(*a))
    _, joined = joined_pair()
    x = torch.randn(3, 8)
    for layer in joined:
        layer(x)
    assert products == [16]
    assert joined[0]._together._product is None


@torch.no_grad()
def test_a_product_that_fails_leaves_none_of_the_input_before(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, joined = joined_pair()
    joined[0](torch.randn(3, 8))
    x = torch.randn(3, 8)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            joined[0](x)
    torch.testing.assert_close(joined[1](x), layers[1](x))


@torch.no_grad()
def test_joined_layers_of_nested_calls_give_what_they_gave_apart() -> None:
    layers, joined = joined_pair()
    x, inner = torch.randn(3, 8), torch.randn(3, 8)
    joined[0](x)
    for own, layer in zip(joined, layers, strict=True):
        torch.testing.assert_close(own(inner), layer(inner))
    torch.testing.assert_close(joined[1](x), layers[1](x))


def test_joined_layers_have_gradients_and_take_inference_tensors() -> None:
    layers, joined = joined_pair()
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        joined[0](x)
    found = checkpoint(lambda x: joined[0](x) * joined[1](x), x, use_reentrant=False)
    wanted = layers[0](x) * layers[1](x)
    (gradient,), (wanted_gradient,) = (torch.autograd.grad(y.sum(), x) for y in (found, wanted))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    with torch.inference_mode():
        x = torch.randn(3, 8)
        joined[0](x)
        x.mul_(2)
        torch.testing.assert_close(joined[1](x), layers[1](x))


@torch.no_grad()
def test_a_joined_layer_outside_autocast_takes_no_product_of_inside() -> None:
    layers, joined = joined_pair()
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert joined[0](x).dtype == torch.bfloat16
    assert torch.equal(joined[1](x), layers[1](x))


def test_only_plain_layers_of_one_input_and_dtype_are_joined() -> None:
    layer = torch.nn.Linear(8, 6)
    for other in (
        torch.nn.Linear(7, 6),
        torch.nn.Linear(8, 6, bias=False),
        layer.double(),
        torch.nn.Identity(),
    ):
        assert join([torch.nn.Linear(8, 6), other]) is None
