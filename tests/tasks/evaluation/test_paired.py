"""Chance in paired comparisons, against slow oracles and textbook values."""

from itertools import product

import numpy as np
import pytest

from tasks.evaluation import paired


def test_a_randomization_test_is_the_count_over_all_swaps() -> None:
    differences = np.array([0.5, -0.2, 0.9, 0.4, 0.1, 0.7, -0.3, 0.6])
    signs = np.array(list(product((-1.0, 1.0), repeat=8)))
    by_hand = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    found = paired.randomize(differences[:, None], paired.draw_signs(8, 200_000, np.random.default_rng(0)))
    assert found[0] == pytest.approx(by_hand, abs=0.003)


def test_five_changes_to_the_good_are_no_proof_and_six_are() -> None:
    # All the same sign by chance: 2 * 2^-5 = 0.0625, 2 * 2^-6 = 0.03125. Rows without a change do not count.
    for changed, p in ((5, 0.0625), (6, 0.03125)):
        differences = np.array([1.0] * changed + [0.0] * 24)[:, None]
        found = paired.randomize(differences, paired.draw_signs(changed + 24, 100_000, np.random.default_rng(0)))
        assert found[0] == pytest.approx(p, abs=0.002)


def test_no_difference_has_the_largest_p_value() -> None:
    assert paired.randomize(np.zeros((20, 1)), paired.draw_signs(20, 100, np.random.default_rng(0)))[0] == 1.0


def test_holms_correction_of_a_textbook() -> None:
    # Four hypotheses: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 which is not below the one before.
    corrected = paired.correct_p_values({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(corrected) == ["a", "b", "c", "d"]
    assert paired.correct_p_values({"a": 0.04}) == {"a": 0.04}
    assert paired.correct_p_values({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert paired.correct_p_values({}) == {}


@pytest.mark.parametrize(("freedom", "t"), [(9, 2.262), (29, 2.045), (199, 1.972)])
def test_students_quantile_is_that_of_the_table(freedom: int, t: float) -> None:
    assert paired.student_quantile(0.975, freedom) == pytest.approx(t, abs=0.001)


def test_a_stricter_level_is_tested_with_more_swaps() -> None:
    assert paired.count_randomizations(0.95, 400) == 2000
    assert paired.count_randomizations(0.95, 5000) == 5000
    assert paired.count_randomizations(0.999, 400) == 100_000
