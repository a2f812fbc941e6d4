"""Columns of the page: codes, how they are packed, and how near the shown values are."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
import pytest

from stages.viewer.columns import LAWS, deflated, encoded, encoded_ids
from tests.support.viewing import codes_of, ids_of, values_of


@pytest.mark.parametrize(
    ("name", "values", "worst"),
    [
        ("teacher_logprob", [0.0, -1e-3, -0.5, -3.0, -39.0], 0.01),
        ("rkl", [0.0, 2e-4, 0.1, 5.0, 39.9], 0.01),
        ("lambda", [0.0, 0.25, 0.999, 1.0], 0.002),
        ("teacher_entropy", [0.0, 0.01, 1.0, 8.0], 0.05),
        ("teacher_top_logprob", [0.0, -0.1, -2.0, -9.0], 0.08),
    ],
)
def test_shown_values_are_near_the_true_ones(name: str, values: list[float], worst: float) -> None:
    column = encoded(name, np.array(values))
    assert column is not None
    shown = values_of(column)
    np.testing.assert_allclose(shown, values, atol=worst)
    assert shown[0] == values[0]


def test_masses_keep_their_order_of_magnitude() -> None:
    masses = np.array([1.0, 0.03, 1e-4, 1e-9])
    column = encoded("tail", masses)
    assert column is not None
    np.testing.assert_allclose(np.log(values_of(column)), np.log(masses), atol=0.06)


@pytest.mark.parametrize("name", sorted(LAWS))
def test_a_missing_value_is_told_apart_from_the_largest(name: str) -> None:
    largest = np.exp(LAWS[name].most) if LAWS[name].law == "log" else LAWS[name].most
    column = encoded(name, np.array([np.nan, largest, 10 * largest, np.nan]))
    assert column is not None
    shown = values_of(column)
    assert np.isnan(shown).tolist() == [True, False, False, True]
    assert shown[1] == pytest.approx(largest, rel=1e-3)


def test_a_column_that_no_row_has_is_left_out() -> None:
    assert encoded("rkl", np.full(3, np.nan)) is None
    assert encoded_ids(np.full((3, 5), -1), {}) is None


def test_codes_are_stored_slot_by_slot_in_planes_of_bytes() -> None:
    column = encoded_ids(np.array([[1, 258], [2, 259], [3, -1]]), {})
    assert column is not None
    assert (column["dtype"], column["width"], column["missing"]) == ("u16", 2, 0xFFFF)
    raw = zlib.decompress(base64.b64decode(column["data"]), wbits=-15)
    assert raw == bytes([1, 2, 3, 2, 3, 255, 0, 0, 0, 1, 1, 255])
    assert codes_of(column).tolist() == [[1, 258], [2, 259], [3, 65535]]


def test_ids_refer_to_equal_ones_of_other_columns() -> None:
    random = np.random.default_rng(0)
    token = random.integers(0, 90_000, 40)
    teacher = np.stack([token, *(random.integers(-1, 90_000, (4, 40)))], 1)
    teacher[0, 1] = 89_999  # a vocabulary beyond 16 bits
    student = np.where(random.random((40, 5)) < 0.7, teacher[:, ::-1], random.integers(-1, 9, (40, 5)))
    columns: dict[str, Any] = {
        "token": encoded_ids(token, {}),
        "teacher_top": encoded_ids(teacher, {"token": token}),
        "student_top": encoded_ids(student, {"token": token, "teacher_top": teacher}),
    }
    assert codes_of(columns["teacher_top"])[:, 0].tolist() == [0] * 40
    assert [columns[name]["dtype"] for name in ("teacher_top", "student_top")] == ["u32", "u16"]
    for name, ids in (("token", token), ("teacher_top", teacher), ("student_top", student)):
        np.testing.assert_array_equal(ids_of(columns, name), ids)


def test_deflated_text_comes_back() -> None:
    text = json.dumps(["</script>", "é"])
    assert zlib.decompress(base64.b64decode(deflated(text.encode())), wbits=-15).decode() == text
