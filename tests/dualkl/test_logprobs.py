"""Logprobs in place: accurate where peaked, no NaN where impossible."""

import math

import torch

from dualkl.logprobs import LEAST_LOGPROB, entropy, log_normalise_
from tests.support import reference


def test_logprobs_are_log_softmax() -> None:
    logits = torch.randn(7, 503, dtype=torch.float64) * 10
    expected = torch.stack([reference.log_softmax(z) for z in logits])
    torch.testing.assert_close(log_normalise_(logits.clone()), expected)


def test_a_peaked_rows_error_is_that_of_numbers_near_0_not_near_60() -> None:
    logits = torch.full((1, 503), 40.0)
    logits[0, 3] = 60.0
    expected = -math.log1p(502 * math.exp(-20.0))
    assert math.isclose(log_normalise_(logits)[0, 3], expected, abs_tol=2.5e-7)


def test_impossible_tokens_are_finite_and_nan_stays_nan() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [0.0, math.nan, 0.0]])
    logprobs = log_normalise_(logits)
    torch.testing.assert_close(logprobs[0], torch.tensor([-math.log(2), LEAST_LOGPROB, -math.log(2)]))
    assert logprobs[1].isnan().all()


def test_entropy_is_its_sum() -> None:
    logprobs = log_normalise_(torch.randn(7, 503, dtype=torch.float64) * 5)
    expected = [reference.entropy(row) for row in logprobs]
    torch.testing.assert_close(entropy(logprobs), torch.tensor(expected, dtype=torch.float64))
    assert entropy(torch.tensor([[0.0, LEAST_LOGPROB]])).item() == 0
