"""Modes of a model's modules."""

import pytest
import torch
from torch import nn

from stages.models.dropout import evaluating


def test_each_module_is_put_back_into_its_own_mode_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))).train()
    model[1].get_submodule("0").eval()
    seen: list[bool] = []
    model[1].register_forward_pre_hook(lambda module, _: seen.append(module.training) or 1 / 0)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        model(torch.ones(2))
    assert seen == [False]
    assert [module.training for module in model.modules()] == [True, True, True, False]
