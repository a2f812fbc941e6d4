"""Steps over slots, and steps that cannot be captured."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from stages.engine import decoder as decoders
from stages.engine.decoder import Decoder
from stages.engine.protocol import Sampling
from stages.engine.requests import Method, Request
from stages.runtime.errors import UserError


@torch.no_grad()
def test_steps_without_a_live_row_change_nothing_that_counts(student_model: Any) -> None:
    """Capturing a step on a GPU takes a few, with rows in the slots."""
    method = Method(Sampling(20), 230, (1,), 0)
    requests = [Request(0, np.arange(10, 20), 5, 20), Request(1, np.arange(30, 37), 6, 20)]
    pair = [Decoder(student_model, method, 2, 64, 20, None) for _ in range(2)]
    for disturbed, decoder in zip((False, True), pair, strict=True):
        decoder.clear(2)
        decoder.fill(list(enumerate(requests)))
        decoder.run(3, 13)
        if disturbed:
            live = decoder.progress.active.clone()
            decoder.progress.active.zero_()
            decoder.run(2, 15)
            decoder.progress.active.copy_(live)
        decoder.run(10, 23)
    for a, b in zip(*(decoder.progress.rows([0, 1]) for decoder in pair), strict=True):
        assert len(a[0]) > 4
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class _Capture:
    """Stands for CUDA's: `refuses` while it is open, and its end fails after a failure, as torch's does."""

    is_open = False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None:
        _Capture.is_open = True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        _Capture.is_open = False
        if error is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_step_that_cannot_be_captured_is_one_sentence(
    student_model: Any, monkeypatch: pytest.MonkeyPatch, out_of_memory: bool
) -> None:
    class Stream:
        def __init__(self, *_: Any) -> None: ...
        def wait_stream(self, other: Any) -> None: ...

    for name, fake in {"graph": _Capture, "CUDAGraph": Stream, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(decoders, "_capture_stream", Stream)
    method = Method(Sampling(4), 230, (1,), 0)
    decoder = Decoder(student_model, method, 2, 64, 4, None)
    refusal = (
        torch.OutOfMemoryError("no room")
        if out_of_memory
        else RuntimeError("capture forbids this.\nMore lines")
    )

    def draw(*_: Any) -> None:
        if _Capture.is_open:
            raise refusal

    with torch.no_grad():
        decoder.fill([(0, Request(0, np.arange(3, 9), 0, 4))])
        monkeypatch.setattr(decoder.sampler, "draw", draw)
        if out_of_memory:
            with pytest.raises(torch.OutOfMemoryError, match="no room"):
                decoder._graph(2)
            return
        with pytest.raises(UserError) as refused:
            decoder._graph(2)
    sentence = str(refused.value)
    assert sentence.startswith(
        "a decode step of Qwen3ForCausalLM cannot be captured in a CUDA graph (capture forbids this)"
    )
    assert "--role generate --device cpu" in sentence
    assert "\n" not in sentence
