"""The engine on transformers' `generate`: it writes what the built-in engine writes."""

from functools import partial

import numpy as np
import pytest

from stages.engine.hf_generate import HFGenerateEngine
from stages.engine.opening import choose_engine
from tests.support.small_models import random_model, run

PROMPTS = [np.array(ids) for ids in ([5, 6, 7], [5, 6, 7], [9, 8, 7, 6, 5], [11], [30, 31, 32])]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_writes_what_the_built_in_engine_writes(use_cache: bool) -> None:
    model = random_model("llama")
    sampling = {"temperature": 0.8, "top_k": 50}
    expected = run(model, PROMPTS, 12, **sampling)
    choose_engine(model, partial(HFGenerateEngine, use_cache=use_cache))
    found = run(model, PROMPTS, 12, **sampling, num_slots=2)
    for a, b in zip(found, expected, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.finish_reason == b.finish_reason
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert np.allclose(a.entropy, b.entropy, atol=1e-4)


def test_generate_ends_rows_at_any_of_several_ends() -> None:
    model = random_model("llama")
    choose_engine(model, partial(HFGenerateEngine, use_cache=True))
    full = run(model, PROMPTS, 10, eos_ids=())
    ends = (int(full[0].ids[3]), int(full[2].ids[5]))
    found = run(model, PROMPTS, 10, eos_ids=ends)
    for whole, cut in zip(full, found, strict=True):
        stop = next((i + 1 for i, token in enumerate(whole.ids) if token in ends), 10)
        assert cut.ids.tolist() == whole.ids[:stop].tolist()
        assert cut.finish_reason == ("eos" if whole.ids[stop - 1] in ends else "length")
    assert model.generation_config.eos_token_id == 1
    assert model.training is False
