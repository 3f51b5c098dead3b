"""A prediction hits what the law says, and its bar says how well it is known."""

import random

import pytest

from tasks.planning.estimates import Estimate, predict, predict_rate


def test_work_of_two_sizes_tells_the_fixed_part_from_the_pace() -> None:
    found = predict([(100, 30.0), (300, 70.0)], 500)
    assert found is not None
    assert found.value == pytest.approx(10 + 0.2 * 500)
    assert found.low < found.value < found.high


def test_one_piece_of_work_leaves_open_how_much_of_it_was_fixed() -> None:
    found = predict([(100, 10.0)], 300)
    assert found == Estimate(20.0, 10 / 1.2, 36.0)
    same = predict([(100, 10.0)], 100)
    assert same == Estimate(10.0, 10 / 1.2, 12.0)


def test_neither_part_is_below_zero() -> None:
    falling = predict([(100, 50.0), (200, 40.0)], 1000)
    assert falling is not None
    assert 40 < falling.value < 50
    steep = predict([(100, 1.0), (200, 4.0)], 50)
    assert steep is not None
    assert 0 < steep.value < 1.0


def test_nothing_known_is_nothing_said() -> None:
    assert predict([], 10) is None
    assert predict_rate([], 10) is None


def test_a_pace_is_the_middle_one_and_its_bar_grows_with_the_scatter() -> None:
    steady = predict_rate([(1000, 10.0), (2000, 20.2), (1000, 9.9), (4000, 40.0)], 3000)
    wild = predict_rate([(1000, 10.0), (2000, 30.0), (1000, 6.0), (4000, 40.0)], 3000)
    assert steady is not None
    assert wild is not None
    assert steady.value == pytest.approx(30.0, rel=0.01)
    assert steady.high - steady.low < 0.3 * steady.value < wild.high - wild.low


def test_the_bar_holds_nineteen_of_twenty() -> None:
    random.seed(0)
    hits, draws = 0, 2000
    for _ in range(draws):
        known = [(u, (5 + 0.1 * u) * random.gauss(1, 0.15)) for u in (50, 100, 200, 400, 300, 80)]
        found = predict(known, 250)
        assert found is not None
        hits += found.low <= (5 + 0.1 * 250) * random.gauss(1, 0.15) <= found.high
    assert 0.93 <= hits / draws <= 0.985


def test_bars_of_independent_parts_add_like_sides_of_a_right_angle() -> None:
    assert Estimate(10, 7, 14) + Estimate(20, 16, 23) == Estimate(30, 25, 35)
