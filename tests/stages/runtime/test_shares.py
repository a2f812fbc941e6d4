"""Wilson's interval and the sign test, at their limits and against known values."""

from __future__ import annotations

import pytest

from stages.runtime.shares import paired, sign_test, wilson


def test_wilson_intervals_stay_within_zero_and_one() -> None:
    for share in (0.0, 0.01, 0.5, 1.0):
        centre, width = wilson(share, 10)
        assert -1e-12 < centre - width <= share + 1e-12
        assert share - 1e-12 <= centre + width < 1 + 1e-12


def test_wilson_intervals_of_none_and_all_have_a_width() -> None:
    centre, width = wilson(1.0, 8)
    assert centre - width == pytest.approx(0.6756, abs=1e-4)  # 8 / (8 + 1.96²)


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (1, 9, 22 / 1024)]
)
def test_the_sign_test_is_the_binomial_tail_on_both_sides(gained: int, lost: int, p: float) -> None:
    assert sign_test(gained, lost) == pytest.approx(p)
    assert sign_test(lost, gained) == pytest.approx(p)


def test_a_paired_difference_has_a_width_without_any_change_and_with_all_changed() -> None:
    assert paired(0, 0, 8) == pytest.approx((0.0, 1.96 * (0.2 / 10) ** 0.5))
    centre, width = paired(8, 0, 8)
    assert centre == pytest.approx(0.8)
    assert 0.3 < centre - width < 0.7
    assert paired(3, 9, 50)[0] == pytest.approx(-paired(9, 3, 50)[0])
    assert paired(20, 10, 1000) == pytest.approx((0.01, 1.96 * (0.03 / 1000) ** 0.5), abs=1e-3)  # Wald's
