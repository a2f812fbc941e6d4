"""Columns of the page: codes, how they are packed, and how near the shown values are."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stages.viewer.columns import FINE_LAWS, LAWS, Law, deflated, id_columns, number_columns
from tests.support.viewing import codes_of, ids_of, inflated, values_of


def shown(name: str, values: list[float] | np.ndarray, laws: dict[str, Law] = LAWS) -> np.ndarray:
    """What the page shows of a column alone."""
    return values_of({"columns": number_columns({name: np.array(values)}, laws)}, name)


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.law != "log"])
def test_a_page_with_room_has_nats_and_the_gate_to_three_decimals(name: str) -> None:
    values = np.sign(LAWS[name].most) * np.random.default_rng(0).exponential(3, 500)
    assert [f"{v:.3f}" for v in shown(name, values, FINE_LAWS)] == [f"{v:.3f}" for v in values]


def test_a_page_with_room_has_tails_to_three_digits() -> None:
    masses = np.exp(-np.random.default_rng(0).uniform(0, 20, 500))
    np.testing.assert_allclose(shown("tail", masses, FINE_LAWS), masses, rtol=5e-4)


@pytest.mark.parametrize(
    ("name", "values", "worst"),
    [
        ("teacher_logprob", [0.0, -1e-3, -0.5, -3.0, -39.0], 0.04),
        ("rkl", [0.0, 2e-4, 0.1, 5.0, 39.9], 0.04),
        ("lambda", [0.0, 0.25, 0.999, 1.0], 0.002),
        ("teacher_entropy", [0.0, 0.01, 1.0, 8.0], 0.09),
        ("teacher_top_logprob", [0.0, -0.1, -2.0, -6.9], 0.12),
    ],
)
def test_shown_values_are_near_the_true_ones(name: str, values: list[float], worst: float) -> None:
    found = shown(name, values)
    np.testing.assert_allclose(found, values, atol=worst)
    assert found[0] == values[0]


@pytest.mark.parametrize("name", ["teacher_logprob", "rkl"])
def test_a_value_of_one_nat_is_shown_within_one_per_cent(name: str) -> None:
    sign = np.sign(LAWS[name].most)
    np.testing.assert_allclose(
        shown(name, sign * np.linspace(1, 40, 500)), sign * np.linspace(1, 40, 500), 0.01
    )


def test_masses_keep_their_order_of_magnitude() -> None:
    masses = np.array([1.0, 0.03, 1e-4, 1e-9])
    np.testing.assert_allclose(np.log(shown("tail", masses)), np.log(masses), atol=0.11)


@pytest.mark.parametrize("name", sorted(LAWS))
def test_a_missing_value_is_told_apart_from_the_largest(name: str) -> None:
    largest = np.exp(LAWS[name].most) if LAWS[name].law == "log" else LAWS[name].most
    found = shown(name, np.array([np.nan, largest, 10 * largest, np.nan]))
    assert np.isnan(found).tolist() == [True, False, False, True]
    assert found[1] == pytest.approx(largest, rel=1e-3)


def test_a_column_that_no_row_has_is_left_out() -> None:
    assert number_columns({"rkl": np.full(3, np.nan)}, LAWS) == {}
    assert id_columns({"token": np.full((3, 5), -1)}, {"token": ()}) == {}


def test_columns_after_each_other_come_back() -> None:
    random = np.random.default_rng(0)
    values = {name: random.normal(-3, 3, (60, 5 if "top" in name else 1)).squeeze() for name in LAWS}
    signs = {name: 1 if law.law == "log" else np.sign(law.most) for name, law in LAWS.items()}
    values = {name: signs[name] * np.abs(own) for name, own in values.items()}
    for own in values.values():
        own[random.random(own.shape) < 0.2] = np.nan
    found = {"columns": number_columns(values, LAWS)}
    assert found["columns"]["trained_logprob"]["after"] == "behaviour_logprob"
    for name, own in values.items():
        codes = LAWS[name].codes(own).astype(float)
        codes[codes == LAWS[name].missing] = np.nan
        np.testing.assert_array_equal(codes_of(found, name), codes, name)
    del values["behaviour_logprob"]
    assert "after" not in number_columns(values, LAWS)["trained_logprob"]


@pytest.mark.parametrize("laws", [LAWS, FINE_LAWS])
def test_a_column_comes_after_one_with_as_many_codes(laws: dict[str, Law]) -> None:
    for law in laws.values():
        if law.after:
            assert (law.law, law.bits, law.most) == (*vars(laws[law.after]).values(),)[:3]


def test_codes_are_stored_slot_by_slot_as_first_bytes_and_longer_ones_behind() -> None:
    columns = id_columns({"token": np.array([[1, 259], [2, 300], [3, -1]])}, {"token": ()})
    about = columns["token"]
    assert (about["width"], about["escape"], about["tail"]) == (2, 254, 1)
    assert inflated(about["data"]) == bytes([2, 3, 4, 254, 254, 0, 6, 47])
    assert ids_of({"columns": columns, "tokens": 3}, "token").tolist() == [[1, 259], [2, 300], [3, -1]]


@pytest.mark.parametrize("vocabulary", [200, 20_000, 90_000, 9_000_000])
def test_ids_refer_to_equal_ones_of_other_columns(vocabulary: int) -> None:
    random = np.random.default_rng(0)
    token = random.integers(0, vocabulary, 40)
    teacher = np.stack([token, *(random.integers(-1, vocabulary, (4, 40)))], 1)
    teacher[0, 1] = vocabulary - 1
    student = np.where(random.random((40, 5)) < 0.7, teacher[:, ::-1], random.integers(-1, 9, (40, 5)))
    places = {"token": token, "teacher_top": teacher, "student_top": student}
    refers = {"token": (), "teacher_top": ("token",), "student_top": ("token", "teacher_top")}
    columns = id_columns(places, refers)
    assert inflated(columns["teacher_top"]["data"])[:40] == bytes([1] * 40)
    for name, ids in places.items():
        np.testing.assert_array_equal(ids_of({"columns": columns, "tokens": 40}, name), ids)


def test_deflated_text_comes_back_and_needs_no_escapes() -> None:
    text = json.dumps(["</script>", "é", *np.random.default_rng(0).random(99)])
    assert inflated(deflated(text.encode())).decode() == text
    assert not {*"<>&\"\\'"} & {*deflated(text.encode())}
