"""The output head: logits, chunking, refusals."""

import pytest
import torch

from dualkl.heads import Head, prepare_head, row_chunks
from tests.support import reference


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_are_the_heads_formula(softcap: float | None, scale: float, with_bias: bool) -> None:
    hidden, weight = torch.randn(7, 16), torch.randn(503, 16)
    bias = torch.randn(503) if with_bias else None
    expected = reference.head_logits(
        hidden, {"weight": weight, "bias": bias, "scale": scale, "softcap": softcap}, 491
    )
    prepared = prepare_head(Head(weight, bias, scale, softcap), hidden, 491)
    torch.testing.assert_close(prepared.logits(hidden).double(), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_logits_are_not_rounded_to_bfloat16() -> None:
    hidden, weight = torch.randn(7, 64).bfloat16(), torch.randn(503, 64).bfloat16()
    prepared = prepare_head(weight, hidden, 503)
    logits = prepared.logits(hidden.to(prepared.weight_Vd.dtype))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits.double(), reference.head_logits(hidden, {"weight": weight}), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("num_rows", "chunk_rows", "expected"), [(7, 3, 3), (7, 7, 1), (7, 100, 1), (7, 1, 7), (0, 3, 0)]
)
def test_chunks_cover_every_row_once(num_rows: int, chunk_rows: int, expected: int) -> None:
    chunks = list(row_chunks(num_rows, chunk_rows, 503, 4, torch.empty(0)))
    assert len(chunks) == expected
    assert [row for chunk in chunks for row in range(num_rows)[chunk]] == list(range(num_rows))
    assert all(1 <= chunk.stop - chunk.start <= chunk_rows for chunk in chunks)


def test_the_default_chunk_stays_within_its_budget() -> None:
    chunks = list(row_chunks(5000, None, 151_936, 4, torch.empty(0)))
    assert max(chunk.stop - chunk.start for chunk in chunks) * 151_936 * 4 * 4 <= 192 * 2**20


def test_a_head_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[5\]; expected \[vocabulary, width\]"):
        Head(torch.ones(5))
    with pytest.raises(ValueError, match=r"bias has shape \[4\]; expected \[5\]"):
        Head(torch.ones(5, 2), torch.ones(4))
    with pytest.raises(ValueError, match=r"softcap is 0.0; expected a number > 0"):
        Head(torch.ones(5, 2), softcap=0.0)
    with pytest.raises(ValueError, match="chunk_rows is 0; expected a number of positions >= 1"):
        row_chunks(7, 0, 5, 1, torch.empty(0))
