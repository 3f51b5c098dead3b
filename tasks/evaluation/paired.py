"""Statistics of a paired comparison: bootstrap intervals, randomization tests, and Holm's correction.

The unit is the source conversation: its rows stay together, because they are not independent. Everything here works on
sums over conversations, for many comparisons at once.

Dimensions: `N` conversations, `K` sums or comparisons, `R` resamples.
"""

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**22
"""Most resampling counts that exist at once (32 MiB)."""
RANDOMIZATIONS_PER_LEVEL = 100
"""Swaps drawn for each 1 / level: the smallest p-value is then a hundredth of the level, enough for several metrics."""

Floats = NDArray[np.float64]


def draw_counts(num_conversations: int, num_resamples: int, source: np.random.Generator) -> Iterator[Floats]:
    """Give blocks `[r, N]` of how often a bootstrap resample drew each conversation."""
    chances = np.full(num_conversations, 1 / num_conversations)
    for size in _blocks(num_conversations, num_resamples):
        yield source.multinomial(num_conversations, chances, size=size).astype(np.float64)


def draw_signs(num_conversations: int, num_signs: int, source: np.random.Generator) -> Iterator[Floats]:
    """Give blocks `[r, N]` of random signs."""
    for size in _blocks(num_conversations, num_signs):
        yield np.where(source.integers(0, 2, size=(size, num_conversations)), 1.0, -1.0)


def _blocks(num_conversations: int, total: int) -> Iterator[int]:
    block = max(1, BLOCK // num_conversations)
    for start in range(0, total, block):
        yield min(block, total - start)


def resample(sums: Floats, counts: Iterator[Floats]) -> Floats:
    """Return sums `[N, K]` over each resample, `[R, K]`.

    Every metric is a ratio of sums over rows, so that all resamples at once are one matrix product.
    """
    return np.vstack([block @ sums for block in counts])


def count_randomizations(confidence: float, num_resamples: int) -> int:
    """Return how many swaps a test draws: at least as many as the bootstrap draws resamples."""
    return max(num_resamples, round(RANDOMIZATIONS_PER_LEVEL / (1 - confidence)))


def randomize(differences: Floats, signs: Iterator[Floats]) -> Floats:
    """Return the two-sided p-value `[K]` of differences `[N, K]`, by paired randomization.

    Were the two models equal, each conversation's results could as well be swapped between them. The p-value is the
    share of random swaps whose total differs at least as much as the observed one, itself included: exact for models
    that are equal, whatever the distribution (Fisher 1935; approximate randomization in Yeh 2000, cs/0008005).
    """
    observed = np.abs(differences.sum(axis=0))
    # Totals that are equal on paper may differ in the last digits.
    limits = observed - 1e-9 * np.abs(differences).sum(axis=0)
    num_extreme, total = np.ones_like(observed), 1
    for block in signs:
        num_extreme += (np.abs(block @ differences) >= limits).sum(axis=0)
        total += len(block)
    return num_extreme / total


def find_interval(resamples: Floats, values: Floats, tail: float | None) -> tuple[Floats, Floats]:
    """Return the quantiles of resamples `[R, K]` on either side of the values `[K]`.

    One conversation says nothing of chance (no tail), so that its interval takes in zero too.
    """
    if tail is None:
        return np.minimum(0.0, values), np.maximum(0.0, values)
    low, high = np.quantile(resamples, [tail, 1 - tail], axis=0)
    # A mean of resamples and the plain mean may differ in the last digit.
    return np.minimum(low, values), np.maximum(high, values)


def tail_probability(confidence: float, num_conversations: int) -> float | None:
    """Return the quantile at which the interval ends on either side; None for one conversation, which has no spread.

    For many conversations it is (1 - confidence) / 2. A percentile interval is too narrow for few; the quantile is
    then moved outwards as Student's t is wider than the normal: Phi(-sqrt(n / (n - 1)) * t), the expanded percentile
    interval of Hesterberg 2015 (arXiv:1411.5279).
    """
    freedom = num_conversations - 1
    if freedom < 1:
        return None
    t = student_quantile(0.5 + confidence / 2, freedom)
    return NormalDist().cdf(-t * math.sqrt(num_conversations / freedom))


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t; from Abramowitz and Stegun 26.7.5."""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def correct_p_values(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for being several, by Holm's step-down method (Holm 1979).

    The chance that any of them falls to a level by chance alone is then at most this level, however they depend on
    each other. A single one stays as it is.
    """
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda known: p_values[known])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}
