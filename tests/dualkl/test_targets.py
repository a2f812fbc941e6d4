"""`compress` against a sort of the full distribution, and what the teacher objects refuse."""

import math
import re

import pytest
import torch
from torch import Tensor

from dualkl import Head, HiddenTeacher, LogitsTeacher, TopKTeacher
from dualkl.checks import check_ids
from dualkl.compress import Compressed, compress
from dualkl.heads import as_head
from dualkl.targets import check_teacher, check_topk_values, shared_vocabulary
from tests.support import reference

N, V, D = 7, 503, 24


def made(seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64) * spread
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(0, 491, (N,), generator=generator)


def assert_is_reference(
    found: Compressed, logits: Tensor, sampled: Tensor, k: int, p: float, floor: int, rounding: float = 1e-7
) -> None:
    ids, logprobs, tails = reference.compress(logits, k, p, floor)
    for n in range(N):
        width = len(ids[n])
        assert found.ids[n, :width].tolist() == ids[n]
        assert (found.ids[n, width:] == -1).all()
        assert (found.logprobs[n, width:] == -math.inf).all()
        wanted = torch.tensor(logprobs[n]).double()
        torch.testing.assert_close(found.logprobs[n, :width].double(), wanted, rtol=rounding, atol=rounding)
        assert math.isclose(found.log_tail_mass[n], tails[n], rel_tol=1e-5)
        logq = reference.log_softmax(logits[n])
        assert math.isclose(found.entropy[n], reference.entropy(logq), rel_tol=1e-5, abs_tol=1e-6)
        assert math.isclose(found.sampled_logprobs[n], float(logq[sampled[n]]), rel_tol=1e-5)


@pytest.mark.parametrize(
    ("k", "p", "floor"), [(5, 1.0, 1), (64, 0.9, 1), (64, 0.5, 3), (8, 0.999, 1), (1, 1.0, 1)]
)
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_compress_is_a_sort_of_the_full_distribution(k: int, p: float, floor: int, spread: float) -> None:
    hidden, weight, sampled = made(spread=spread)
    bias = torch.linspace(-1, 1, V)
    head = Head(weight, bias, 0.9, 30.0)
    found = compress(
        hidden, head, sampled, k=k, p=p, floor=floor, vocab_size=491, temperature=0.8, chunk_rows=3
    )
    as_dict = {"weight": weight, "bias": bias, "scale": 0.9, "softcap": 30.0}
    assert_is_reference(found, reference.head_logits(hidden, as_dict, 491) / 0.8, sampled, k, p, floor)
    assert found.ids.dtype == torch.int32
    assert found.logprobs.dtype == found.log_tail_mass.dtype == found.entropy.dtype == torch.float32


def test_the_tail_mass_is_accurate_however_small() -> None:
    for tail in (1e-6, 1e-14, 1e-30):
        logits = torch.full((1, V), math.log(tail / (V - 2)))
        logits[0, :2] = math.log(0.5)
        found = compress(torch.ones(1, 1), logits.T.clone(), torch.zeros(1, dtype=torch.long), k=2)
        assert math.isclose(found.log_tail_mass[0], math.log(tail), rel_tol=1e-6)


def test_keeping_all_ids_leaves_no_tail() -> None:
    hidden, weight, sampled = made()
    found = compress(hidden, weight, sampled, k=1000)
    assert found.ids.shape == (N, V)
    assert (found.log_tail_mass == -math.inf).all()


def test_impossible_ids_are_not_kept() -> None:
    bias = torch.zeros(V)
    bias[3:] = -math.inf
    found = compress(torch.zeros(1, 1), Head(torch.zeros(V, 1), bias), torch.zeros(1, dtype=torch.long), k=5)
    assert sorted(found.ids[0].tolist()) == [-1, -1, 0, 1, 2]
    assert found.ids[0, 3:].tolist() == [-1, -1]
    assert found.log_tail_mass[0] == -math.inf
    assert math.isclose(found.entropy[0], math.log(3), rel_tol=1e-6)


def test_chunks_do_not_change_what_is_compressed() -> None:
    hidden, weight, sampled = made()
    whole = compress(hidden.float(), weight.float(), sampled, k=5)
    for rows in (1, 2, 5):
        parts = compress(hidden.float(), weight.float(), sampled, k=5, chunk_rows=rows)
        assert torch.equal(whole.ids, parts.ids)
        torch.testing.assert_close(whole.log_tail_mass, parts.log_tail_mass)


def test_compressing_nothing_gives_empty_columns() -> None:
    found = compress(torch.empty(0, D), torch.ones(V, D), torch.empty(0, dtype=torch.long), k=5)
    assert found.ids.shape == found.logprobs.shape == (0, 5)
    assert found.log_tail_mass.shape == found.entropy.shape == found.sampled_logprobs.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0; expected a number of ids >= 1."),
        ({"p": 0.0}, "p is 0.0; expected a mass in (0, 1]."),
        ({"floor": 6}, "floor is 6; expected a number of ids from 1 to k = 5."),
        ({"temperature": -1.0}, "temperature is -1.0; expected a finite number > 0."),
        ({"vocab_size": 600}, "vocab_size is 600, the teacher's head has 503 ids; expected 1 to 503."),
        ({"sampled_ids": torch.full((N,), 503)}, "sampled_ids[0] is 503; expected an id in [0, 503)."),
        (
            {"sampled_ids": torch.zeros(N)},
            "sampled_ids has dtype torch.float32; expected int64, int32 or int16.",
        ),
        ({"hidden": torch.ones(N, 3)}, "hidden has shape [7, 3]; expected [any, 24]."),
    ],
)
def test_compress_refuses(changes: dict[str, object], message: str) -> None:
    hidden, weight, sampled = made()
    arguments: dict[str, object] = {
        "hidden": hidden,
        "head": weight,
        "sampled_ids": sampled,
        "k": 5,
    } | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        compress(**arguments)


def top3(**changes: Tensor) -> TopKTeacher:
    """Two rows: one with three ids, one with two and an empty slot."""
    columns = {
        "ids": torch.tensor([[4, 2, 9], [1, 0, -1]]),
        "logprobs": torch.tensor([[0.5, 0.25, 0.125], [0.6, 0.3, 0.0]]).log(),
        "log_tail_mass": torch.tensor([0.125, 0.1]).log(),
    }
    return TopKTeacher(**(columns | changes))


def test_a_sound_topk_teacher_passes() -> None:
    check_topk_values(top3(), 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ids": torch.tensor([[4, 2, 9], [1, 1, -1]])},
            "Row 1 of the top-k teacher keeps the same id twice.",
        ),
        (
            {"ids": torch.tensor([[4, 2, 10], [1, 0, -1]])},
            "Row 0 of the top-k teacher holds an id outside the vocabulary",
        ),
        (
            {"ids": torch.tensor([[4, 2, 9], [-1, 0, 1]])},
            "Row 1 of the top-k teacher has an empty slot (id -1) before",
        ),
        (
            {"logprobs": torch.tensor([[0.25, 0.5, 0.125], [0.6, 0.3, 0.0]]).log()},
            "Row 0 of the top-k teacher does not have its most likely id in slot 0.",
        ),
        (
            {"log_tail_mass": torch.tensor([0.125, 0.1002]).log()},
            "Row 1 of the top-k teacher has masses that do not add up to 1 (kept ids and tail: 1.000200",
        ),
        (
            {"log_tail_mass": torch.tensor([math.nan, math.log(0.1)])},
            "(kept ids and tail: nan, tolerance 1e-4)",
        ),
    ],
)
def test_a_topk_teacher_that_is_no_distribution_is_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_topk_values(top3(**changes), 10)


def test_rows_that_do_not_count_are_exempt() -> None:
    broken = top3(
        ids=torch.tensor([[4, 2, 9], [1, 1, 77]]), log_tail_mass=torch.tensor([math.log(0.125), math.nan])
    )
    check_topk_values(broken, 10, torch.tensor([True, False]))


def test_masses_within_the_tolerance_pass() -> None:
    check_topk_values(top3(log_tail_mass=torch.tensor([0.12508, 0.1]).log()), 10)


def test_teachers_of_the_wrong_shape_or_temperature_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("teacher.logits has shape [3, 5]; expected [2, any].")):
        check_teacher(LogitsTeacher(torch.ones(3, 5)), 2, 1.0)
    with pytest.raises(ValueError, match=re.escape("teacher.hidden has shape [2, 4]; expected [2, 6].")):
        check_teacher(HiddenTeacher(torch.ones(2, 4), torch.ones(5, 6)), 2, 1.0)
    with pytest.raises(ValueError, match=re.escape("teacher.log_tail_mass has shape [3]; expected [2].")):
        check_teacher(top3(log_tail_mass=torch.ones(3)), 2, 1.0)
    with pytest.raises(
        ValueError, match=r"top-k logprobs are at temperature 1.0, the loss is at 2.0; use the same"
    ):
        check_teacher(top3(), 2, 2.0)
    with pytest.raises(
        ValueError, match=r"teacher.ids has dtype torch.float32; expected int64, int32 or int16"
    ):
        check_teacher(top3(ids=torch.ones(2, 3)), 2, 1.0)
    with pytest.raises(
        ValueError, match=r"teacher.ids has no slots; expected at least one kept id a position"
    ):
        check_teacher(TopKTeacher(torch.ones(2, 0).long(), torch.ones(2, 0), torch.zeros(2)), 2, 1.0)


def test_vocabularies_that_differ_need_a_cut() -> None:
    student, teacher = as_head(torch.ones(503, 4)), HiddenTeacher(torch.ones(2, 6), torch.ones(512, 6))
    assert shared_vocabulary(student, teacher, 500) == 500
    with pytest.raises(
        ValueError, match=r"differ \(student's head 503, teacher's head 512\); set vocab_size"
    ):
        shared_vocabulary(student, teacher, None)
    with pytest.raises(
        ValueError, match="vocab_size is 510, the student's head has 503 ids; expected 1 to 503"
    ):
        shared_vocabulary(student, teacher, 510)


@pytest.mark.parametrize("num_ids", [300, 49_152, 70_000, 151_936])
def test_short_integers_serve_for_any_vocabulary(num_ids: int) -> None:
    """A vocabulary may have more ids than an int16 can count."""
    ids = torch.tensor([[5, 6, 299]], dtype=torch.int16)
    logprobs = torch.tensor([[0.5, 0.3, 0.1]]).log()
    teacher = TopKTeacher(ids, logprobs, torch.tensor([0.1]).log())
    check_topk_values(teacher, num_ids)
    check_ids("ids", ids[0], num_ids)
    with pytest.raises(ValueError, match="holds an id outside the vocabulary of 299 ids"):
        check_topk_values(teacher, 299)
    with pytest.raises(ValueError, match=r"ids\[2\] is 299; expected an id in \[0, 299\)"):
        check_ids("ids", ids[0], 299)
