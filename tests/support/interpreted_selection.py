"""Selection kernels on a CPU, under Triton's interpreter, against a float64 sort and the plain path.

Not collected by itself: `test_dualkl_kernels.py` runs it in its own process, like `interpreted_kernels.py`.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dualkl import Head, kernels
from dualkl.compress import Compressed, compress, compress_logits
from dualkl.kernels import selection
from tests.dualkl.test_targets import assert_is_reference, made
from tests.support import reference
from tests.support.thinning import leading, thinned

V = 503
calls: list[int] = []


@pytest.fixture(autouse=True)
def _kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use groups of 8 ids and segments of 128; fail tests that launch nothing."""

    def counted(*args: Any) -> Any:
        calls.append(1)
        return largest(*args)

    largest = selection.largest
    calls.clear()
    monkeypatch.setattr(kernels, "selectable", lambda values, k: values.dtype != torch.float64)
    monkeypatch.setattr(selection, "largest", counted)
    monkeypatch.setattr(selection, "LANES", 16)
    monkeypatch.setattr(selection, "STEPS", 2)
    yield
    assert calls


def select(logits: Tensor, k: int, **options: Any) -> Compressed:
    return compress_logits(logits.float(), torch.arange(len(logits)) % logits.shape[1], k=k, **options)


def plain(logits: Tensor, k: int, **options: Any) -> Compressed:
    return compress_logits(logits.double(), torch.arange(len(logits)) % logits.shape[1], k=k, **options)


def assert_same(found: Compressed, wanted: Compressed, tied: bool = False) -> None:
    for column, value in vars(wanted).items():
        if column != "ids":
            torch.testing.assert_close(getattr(found, column), value, rtol=1e-5, atol=2e-6, equal_nan=True)
        elif not tied:
            assert torch.equal(found.ids, value)


@pytest.mark.parametrize(
    ("k", "p", "floor", "spread"),
    thinned(4, [(5, 1.0, 1), (64, 0.9, 1), (64, 0.5, 3), (8, 0.999, 1), (1, 1.0, 1)], [0.3, 1.0, 4.0]),
)
def test_a_head_with_everything_is_a_sort_of_the_full_distribution(
    k: int, p: float, floor: int, spread: float
) -> None:
    hidden, weight, sampled = (x.float() if x.is_floating_point() else x for x in made(spread=spread))
    bias = torch.linspace(-1, 1, V)
    head = Head(weight, bias, 0.9, 30.0)
    found = compress(
        hidden, head, sampled, k=k, p=p, floor=floor, vocab_size=491, temperature=0.8, chunk_rows=3
    )
    as_dict = {"weight": weight, "bias": bias, "scale": 0.9, "softcap": 30.0}
    assert_is_reference(found, reference.head_logits(hidden, as_dict, 491) / 0.8, sampled, k, p, floor, 2e-6)


@pytest.mark.parametrize(
    ("num_ids", "k"), thinned(7, [1, 3, 4, 5, 63, 64, 65, 128, 129, 503], [1, 2, 7, 64, 503])
)
def test_any_shape(num_ids: int, k: int) -> None:
    logits = (
        torch.randn(3, num_ids, generator=torch.Generator().manual_seed(num_ids), dtype=torch.float64) * 3
    )
    logits = logits.float().double()
    assert_same(select(logits, k), plain(logits, k))


@pytest.mark.parametrize("k", leading(2, [9, 200, 1, 40]))
def test_the_largest_may_stand_anywhere(k: int) -> None:
    """In one group, in one segment, in order, in reverse, at the ends: no arrangement hides an id."""
    base = torch.linspace(-3, 3, V, dtype=torch.float64).float().double()
    column = torch.arange(V)
    near = (column % 64 // 4 == 5).double() * 10 + base / 10
    rows = [base, base.flip(0), base + 9 * (column < 70), base + 9 * (column >= 440), near.float().double()]
    logits = torch.stack(rows)
    assert_same(select(logits, k), plain(logits, k))


@pytest.mark.parametrize("k", leading(2, [5, 503, 1, 130]))
def test_ties_are_cut_somewhere_always_alike_and_listed_by_id(k: int) -> None:
    logits = torch.randint(-3, 3, (4, V), generator=torch.Generator().manual_seed(1)).double()
    logits[1] = 2.0
    logits[2] = torch.where(torch.arange(V) % 2 == 0, 0.0, -0.0)
    found = select(logits, k)
    assert_same(found, plain(logits, k), tied=True)
    assert torch.equal(found.ids, select(logits, k).ids)
    for ids, row in zip(found.ids.tolist(), logits[:2], strict=False):
        assert len(set(ids)) == k
        values = row[ids].tolist()
        assert list(zip(values, ids, strict=True)) == sorted(
            zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1])
        )


@pytest.mark.parametrize(("possible", "p", "floor"), thinned(3, [1, 4, 30, 503], [(1.0, 1), (0.7, 2)]))
def test_impossible_ids_are_not_kept(possible: int, p: float, floor: int) -> None:
    logits = (
        torch.randn(3, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float().double()
    )
    order = torch.randperm(V, generator=torch.Generator().manual_seed(8))
    logits[:, order[possible:]] = -math.inf
    found = select(logits, 9, p=p, floor=floor)
    assert_same(found, plain(logits, 9, p=p, floor=floor))
    assert ((found.ids >= 0).sum(1) <= possible).all()


@pytest.mark.parametrize("tail", [1e-6, 1e-14, 1e-52])
def test_the_tail_mass_is_accurate_however_small(tail: float) -> None:
    logits = torch.full((1, V), math.log(tail / (V - 2)), dtype=torch.float64)
    logits[0, [300, 301]] = math.log(0.5)
    for options in ({"k": 2}, {"k": 9, "p": 0.9}):
        assert math.isclose(select(logits, **options).log_tail_mass[0], math.log(tail), rel_tol=1e-6)


def test_a_broken_row_is_nan_and_leaves_the_others_alone() -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(3))
    wanted = select(logits[[0, 4]], 6)
    logits[1, 77], logits[2, 78], logits[3] = math.nan, math.inf, -math.inf
    found = select(logits, 6)
    for column in (found.log_tail_mass, found.entropy, found.sampled_logprobs):
        assert column[1:4].isnan().all()
    assert (found.ids[1:4] == -1).all()
    assert torch.equal(found.ids[[0, 4]], wanted.ids)
    torch.testing.assert_close(found.entropy[[0, 4]], wanted.entropy)


def test_logits_are_not_changed_whatever_their_layout() -> None:
    logits = torch.randn(4, 600)[:, :V].bfloat16()
    kept = logits.clone()
    wanted = select(kept.float(), 6)
    for layout in (logits, logits.T.contiguous().T):
        found = compress_logits(layout, torch.arange(4), k=6)
        assert torch.equal(found.ids, wanted.ids)
        assert torch.equal(layout, kept)


def test_no_rows_give_empty_columns() -> None:
    found = select(torch.empty(0, V), 5)
    assert found.ids.shape == found.logprobs.shape == (0, 5)
    assert found.entropy.shape == (0,)


@pytest.mark.thorough
def test_a_real_vocabulary_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "LANES", 512)
    monkeypatch.setattr(selection, "STEPS", 8)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 151_936, generator=generator) * torch.tensor([[1.0], [4.0]])
    for k in (64, 256):
        assert_same(select(logits, k), plain(logits, k))
