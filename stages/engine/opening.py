"""Choice of engine for a model: the one set at loading, else the built-in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from transformers.modeling_utils import PreTrainedModel

from stages.engine.built_in import BuiltInEngine
from stages.engine.protocol import Engine

Model = PreTrainedModel | PeftModel


def open_engine(model: Model) -> Engine:
    """A new engine for the model. Raises UserError if no engine supports it."""
    opens: Callable[[Model], Engine] = getattr(_base(model), "_opens_engine", BuiltInEngine)
    return opens(model)


def choose_engine(model: Model, opens: Callable[[Model], Engine]) -> None:
    """Make `open_engine` return the result of `opens` for the model, with or without adapters."""
    _base(model)._opens_engine = opens


def _base(model: Model) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
