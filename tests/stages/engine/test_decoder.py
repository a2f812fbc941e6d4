"""Steps over slots, and steps that cannot be captured."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

from stages.engine import decoder as decoders
from stages.engine.decoder import Decoder
from stages.engine.protocol import Request
from stages.runtime.errors import UserError
from tests.support.small_models import sampling_of


@torch.no_grad()
def test_steps_without_a_live_row_change_nothing_that_counts(student_model: Any) -> None:
    """Capturing a step on a GPU takes a few, with rows in the slots."""
    requests = [Request(np.arange(10, 20), 20, seed=5), Request(np.arange(30, 37), 20, seed=6)]
    pair = [Decoder(student_model, sampling_of(), 2, 64, 20, None) for _ in range(2)]
    for disturbed, decoder in zip((False, True), pair, strict=True):
        decoder.clear(2)
        decoder.fill(list(enumerate(requests)))
        decoder.run(3, 13)
        if disturbed:
            live = decoder.state.active.clone()
            decoder.state.active.zero_()
            decoder.run(2, 15)
            decoder.state.active.copy_(live)
        decoder.run(10, 23)
    for a, b in zip(*(decoder.state.completions([0, 1], ()) for decoder in pair), strict=True):
        assert len(a.ids) > 4
        assert np.array_equal(a.ids, b.ids)
        assert np.array_equal(a.logprobs, b.logprobs)
        assert np.array_equal(a.entropy, b.entropy)


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
    decoder = Decoder(student_model, sampling_of(), 2, 64, 4, None)
    refusal = (
        torch.OutOfMemoryError("no room")
        if out_of_memory
        else RuntimeError("capture forbids this.\nMore lines")
    )

    def draw(*_: Any) -> None:
        if _Capture.is_open:
            raise refusal

    with torch.no_grad():
        decoder.fill([(0, Request(np.arange(3, 9), 4))])
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
