"""What earlier work says of later work: a value and the bar in which nineteen of twenty should end.

A stage takes t = c + r u: something fixed, and something for each unit u of its work (a row, a token, an example).
A bar of a part p goes from t / (1 + p) to t (1 + p).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_BAR = 0.1
"""Part of the value: the same run on the same machine is not faster or slower by less."""
_WIDE = 2.0
"""A wider bar says no more than that nobody knows."""
# Of Student's t: the 97.5 % point by degrees of freedom; beyond, the normal distribution's.
_T = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class Estimate:
    """A number that nobody knows yet."""

    value: float
    low: float
    high: float

    def __add__(self, other: "Estimate") -> "Estimate":
        """Add two that do not depend on each other: their bars add like the sides of a right angle."""
        value = self.value + other.value
        return Estimate(
            value,
            max(0.0, value - math.hypot(self.value - self.low, other.value - other.low)),
            value + math.hypot(self.high - self.value, other.high - other.value),
        )

    def scale(self, factor: float) -> "Estimate":
        """Return so many times the number."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def widen(self, factor: float) -> "Estimate":
        """Return it with a bar that goes down to the factor's part of it, and up to so many times."""
        return Estimate(self.value, min(self.low, self.value / factor), max(self.high, self.value * factor))


def predict_rate(known: Sequence[tuple[float, float]], units: float) -> Estimate | None:
    """Predict work that has nothing fixed in it, such as the steps of a training.

    Args:
        known: units and seconds of work that was done.
        units: of the work to come.

    Returns:
        Seconds, by the median pace; None where nothing is known.
    """
    paces = [seconds / done for done, seconds in known]
    if not paces:
        return None
    middle = statistics.median(paces)
    part = _find_part([math.log(pace / middle) for pace in paces], num_fitted=1)
    return Estimate(middle * units, middle * units / (1 + part), middle * units * (1 + part))


def predict(known: Sequence[tuple[float, float]], units: float) -> Estimate | None:
    """Predict work of which a part may be fixed.

    With work of one size only, nobody knows how much of it was fixed: the bar goes from all of it to nothing.

    Args:
        known: units and seconds of work that was done.
        units: of the work to come.

    Returns:
        Seconds; None where nothing is known.
    """
    if not known:
        return None
    sizes = [done for done, _ in known]
    if max(sizes) <= 1.5 * min(sizes):
        usual, size = statistics.median(seconds for _, seconds in known), statistics.median(sizes)
        part = _find_part([math.log(seconds / usual) for _, seconds in known], num_fitted=1)
        ends = sorted((usual, usual * units / size))
        return Estimate((ends[0] + ends[1]) / 2, ends[0] / (1 + part), ends[1] * (1 + part))
    fixed, pace = _fit(known)
    value = fixed + pace * units
    part = _find_part([math.log((fixed + pace * done) / seconds) for done, seconds in known], num_fitted=2)
    beyond = max(1.0, units / max(sizes))  # further than anything that was measured, the bar grows with the distance
    part *= math.sqrt(beyond)
    return Estimate(value, value / (1 + part), value * (1 + part))


def _fit(known: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the fixed seconds and those of a unit, neither below 0, with the least sum of squared relative errors."""
    weights = [1 / seconds**2 for _, seconds in known]
    total = sum(weights)
    mean_units = sum(w * units for w, (units, _) in zip(weights, known, strict=True)) / total
    mean_seconds = sum(w * seconds for w, (_, seconds) in zip(weights, known, strict=True)) / total
    products = sum(w * (u - mean_units) * (s - mean_seconds) for w, (u, s) in zip(weights, known, strict=True))
    squares = sum(w * (u - mean_units) ** 2 for w, (u, _) in zip(weights, known, strict=True))
    pace = products / squares
    fixed = mean_seconds - pace * mean_units
    if pace < 0:
        return mean_seconds, 0.0
    if fixed < 0:
        squares = sum(w * u * u for w, (u, _) in zip(weights, known, strict=True))
        return 0.0, sum(w * u * s for w, (u, s) in zip(weights, known, strict=True)) / squares
    return fixed, pace


def _find_part(errors: Sequence[float], *, num_fitted: int) -> float:
    """Return the width of the bar as a part of the value.

    With no more pieces of work than numbers fitted to them, their scatter is not known: a fifth is taken.

    Args:
        errors: natural logarithms of predicted over measured, of what is known.
        num_fitted: numbers that were fitted to these.
    """
    freedom = len(errors) - num_fitted
    if freedom < 1:
        return 2 * _LEAST_BAR
    spread = math.sqrt(sum(error * error for error in errors) / freedom)
    factor = _T[freedom - 1] if freedom <= len(_T) else 1.96
    return min(_WIDE, max(_LEAST_BAR, math.expm1(factor * spread * math.sqrt(1 + 1 / len(errors)))))
