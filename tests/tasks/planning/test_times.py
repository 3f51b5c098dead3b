"""The nearest earlier work is what a time is known by, and the further away it is, the wider the bar."""

from typing import Any

from tasks.planning.estimates import Estimate
from tasks.planning.times import PlannedTraining, StageTime, add_up, estimate_stage, estimate_steps
from tasks.speeds import Speed

TOKENS = Estimate(1000.0, 1000.0, 1000.0)


def speed(seconds: float, **more: Any) -> Speed:
    values: dict[str, Any] = {"device": "H", "shape": "a", "settings": "x", "flop_per_unit": 10.0, **more}
    return Speed("train: steps", 100.0, seconds, **values)


def ask(*speeds: Speed) -> tuple[Estimate | None, str]:
    asked = PlannedTraining(
        device="H", is_gpu=False, shape="a", settings="x", engine="", tokens=TOKENS, work={}, flop_per_token=10.0
    )
    return estimate_steps(speeds, asked)


def test_the_nearest_kind_is_taken() -> None:
    far, near, exact = speed(9.0, shape="b", flop_per_unit=30.0), speed(2.0, settings="y"), speed(1.0)
    elsewhere = speed(0.1, device="C")
    by_exact, told = ask(far, near, exact, elsewhere)
    assert by_exact is not None
    assert (by_exact.value, told) == (10.0, "1 earlier run of this model with these settings")
    by_near, _ = ask(far, near, elsewhere)
    by_far, _ = ask(far, elsewhere)
    assert by_near is not None
    assert by_far is not None
    assert (by_near.value, by_far.value) == (20.0, 30.0)  # 9 s for 100 tokens of three times the work
    widths = [found.high / found.value for found in (by_exact, by_near, by_far)]
    assert widths == sorted(set(widths))


def test_another_device_says_nothing() -> None:
    assert ask(speed(1.0, device="C"))[0] is None


def test_an_unknown_stage_leaves_the_whole_unknown() -> None:
    known = StageTime("a", Estimate(1.0, 0.5, 2.0), "")
    assert add_up([known, known]) == Estimate(2.0, 2 - 0.5 * 2**0.5, 2 + 2**0.5)
    assert add_up([known, StageTime("b", None, "")]) is None


def test_a_further_match_widens_the_bar() -> None:
    speeds = [speed(4.0, settings="y")]
    strict, loose = (lambda each: each.settings == "x"), (lambda each: each.shape == "a")
    found, _ = estimate_stage(speeds, 100.0, matches=[strict, loose])
    nearest, _ = estimate_stage(speeds, 100.0, matches=[loose])
    assert found == Estimate(4.0, 4.0 / 1.5, 6.0)
    assert nearest == Estimate(4.0, 4 / 1.2, 4.8)
    assert estimate_stage(speeds, 100.0, matches=[strict])[0] is None
