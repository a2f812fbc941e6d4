"""Modes of a model's modules."""

import pytest
from torch import nn

from stages.models.dropout import evaluating


def test_each_module_is_put_back_into_its_own_mode_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))).train()
    model[1][0].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, True, False]
