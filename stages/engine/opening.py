"""Which engine writes with a model. The self-check at loading records its choice; `open_engine` follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers.modeling_utils import PreTrainedModel

from stages.engine.built_in import BuiltInEngine
from stages.engine.hf_generate import HFGenerateEngine
from stages.engine.protocol import Engine
from stages.runtime.errors import UserError


@dataclass(frozen=True)
class HFGenerate:
    """The model writes by transformers' `generate`. Without `use_cache`, each token recomputes its whole row.

    `refused`: why neither engine writes correctly with the model; empty otherwise.
    """

    use_cache: bool
    refused: str = ""


def open_engine(model: PreTrainedModel | PeftModel) -> Engine:
    """The built-in engine, unless the self-check chose another. Errors: `UserError` where no engine serves the model."""
    choice = engine_choice(model)
    if choice is None:
        return BuiltInEngine(model)
    if choice.refused:
        raise UserError(choice.refused)
    return HFGenerateEngine(model, choice.use_cache)


def engine_choice(model: PreTrainedModel | PeftModel) -> HFGenerate | None:
    """What `choose_engine` recorded; None for the built-in engine."""
    return getattr(_base(model), "_engine_choice", None)


def choose_engine(model: PreTrainedModel | PeftModel, choice: HFGenerate) -> None:
    _base(model)._engine_choice = choice


def _base(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
