"""How a student is assembled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.models import student as students
from tests.support.helpers import STUDENT, make_run


@pytest.mark.parametrize(
    ("device", "dropout", "checkpointing", "compile", "is_compiled"),
    [
        ("cuda", "0.0", "true", "auto", True),
        ("cuda", "0.1", "false", "auto", True),
        ("cuda", "0.1", "true", "auto", False),
        ("cuda", "0.1", "true", "true", True),
        ("cuda", "0.0", "true", "false", False),
        ("cpu", "0.0", "true", "auto", False),
    ],
)
def test_layers_are_compiled_on_a_gpu_unless_dropout_is_recomputed(
    tmp_path: Path, device: str, dropout: str, checkpointing: str, compile: str, is_compiled: bool
) -> None:
    run = make_run(tmp_path, lora_dropout=dropout, gradient_checkpointing=checkpointing, compile=compile)
    base = AutoModelForCausalLM.from_pretrained(STUDENT)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    student = students.assemble(run.config, base, tokenizer, "it", 230, (0,), torch.device(device))
    assert student.is_compiled is is_compiled
