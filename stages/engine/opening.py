"""Choice of engine for a model: the one set at loading, else the built-in one."""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftModel
from transformers.modeling_utils import PreTrainedModel

from stages.engine.built_in import BuiltInEngine
from stages.engine.protocol import Engine
from stages.models.readout import base_of

Model = PreTrainedModel | PeftModel


def open_engine(model: Model) -> Engine:
    """A new engine for the model. Raises UserError if no engine supports it."""
    opens: Callable[[Model], Engine] = getattr(base_of(model), "_opens_engine", BuiltInEngine)
    return opens(model)


def choose_engine(model: Model, opens: Callable[[Model], Engine]) -> None:
    """Make `open_engine` return the result of `opens` for the model, with or without adapters."""
    base_of(model)._opens_engine = opens  # type: ignore[assignment]  # modules may hold any attribute
