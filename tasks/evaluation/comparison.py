"""Two models on the same rows: differences with paired bootstrap intervals, and the rows side by side.

Dimensions: `N` conversations, `M` metrics, `R` resamples.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.artifacts import Delta
from schemas.config import EvaluationConfig
from tasks.evaluation.averages import AVERAGED, METRICS, average_rows

CHRF_TOLERANCE = 1.0
"""An answer changes for better or worse when its chrF (0 to 100) moves by more than this; our choice."""
RESAMPLE_BLOCK = 2**22
"""Most resampling counts that exist at once (32 MiB)."""

Floats = NDArray[np.float64]


class ComparisonError(ValueError):
    """The two evaluations are not of the same rows."""


@dataclass(frozen=True)
class Comparison:
    """Base (before) against fine-tuned model (after) on the same held-out rows."""

    num_examples: int
    confidence: float
    """Level of all intervals, such as 0.95."""
    before: dict[str, float]
    after: dict[str, float]
    delta: dict[str, Delta]
    """after minus before, by metric."""
    before_interval: dict[str, tuple[float, float]]
    after_interval: dict[str, tuple[float, float]]
    table: pl.DataFrame
    """A held-out row a row: example_id, question, reference, both answers, each measure before and after, outcome."""


def compare(before: pl.DataFrame, after: pl.DataFrame, config: EvaluationConfig, *, seed: int) -> Comparison:
    """Compare two evaluations (EvaluationRows) of the same rows in the same order.

    The intervals are paired: each resample draws conversations with replacement and takes both models' rows of
    them, so that what makes a row hard for both does not widen the interval of the difference. Examples of one
    conversation stay together, because they are not independent.

    Raises:
        ComparisonError: the rows differ in number, example_id, order or reference length, or there are none.
    """
    check_same_rows(before, after)
    resamples = _resample(before, after, config.num_resamples, seed)
    tail = tail_probability(config.confidence, before["example_id"].n_unique())
    metrics = {"before": average_rows(before), "after": average_rows(after)}
    intervals: dict[str, dict[str, tuple[float, float]]] = {"before": {}, "after": {}}
    delta: dict[str, Delta] = {}
    for name in METRICS:
        for side in ("before", "after"):
            intervals[side][name] = _interval(resamples[side][name], metrics[side][name], tail)
        value = metrics["after"][name] - metrics["before"][name]
        low, high = _interval(resamples["after"][name] - resamples["before"][name], value, tail)
        delta[name] = Delta(value=value, ci_low=low, ci_high=high)
    return Comparison(
        num_examples=before.height,
        confidence=config.confidence,
        before=metrics["before"],
        after=metrics["after"],
        delta=delta,
        before_interval=intervals["before"],
        after_interval=intervals["after"],
        table=put_side_by_side(before, after),
    )


def check_same_rows(before: pl.DataFrame, after: pl.DataFrame) -> None:
    """Refuse tables that cannot be compared row by row."""
    if before.height != after.height or before.is_empty():
        raise ComparisonError(
            f"{before.height} rows before and {after.height} after: the same held-out rows are wanted, at least one; "
            "evaluate both models on one tokens folder"
        )
    for column in ("example_id", "num_tokens"):
        differs = (before[column] != after[column]).arg_true()
        if len(differs):
            at = differs[0]
            raise ComparisonError(
                f"row {at + 1}: {column} is {before[column][at]} before and {after[column][at]} after "
                f"({len(differs)} of {before.height} rows differ): the same rows in the same order are wanted; "
                "evaluate both models on one tokens folder"
            )


def _resample(
    before: pl.DataFrame, after: pl.DataFrame, num_resamples: int, seed: int
) -> dict[str, Mapping[str, Floats]]:
    """Return each metric of each side in R bootstrap resamples, both sides on the same conversations.

    Every metric is a ratio of sums over rows, so a resample is a vector of how often each conversation was drawn
    (multinomial), and all of them at once are one matrix product `[R, N] x [N, M]`.
    """
    sums = {"before": _sums_by_conversation(before), "after": _sums_by_conversation(after)}
    num_conversations = len(sums["before"])
    stacked = np.hstack([sums["before"], sums["after"]])
    source = np.random.default_rng(seed)
    block = max(1, RESAMPLE_BLOCK // num_conversations)
    chances = np.full(num_conversations, 1 / num_conversations)
    drawn = [
        source.multinomial(num_conversations, chances, size=min(block, num_resamples - start)) @ stacked
        for start in range(0, num_resamples, block)
    ]
    halves = np.split(np.vstack(drawn), 2, axis=1)
    return {side: _ratios(half) for side, half in zip(("before", "after"), halves, strict=True)}


def _sums_by_conversation(rows: pl.DataFrame) -> Floats:
    """Return `[N, M]`: num_rows, num_tokens, nll_sum and the averaged metrics, summed over each conversation."""
    grouped = rows.group_by("example_id", maintain_order=True).agg(
        pl.len().alias("num_rows"), pl.col("num_tokens", "nll_sum", *AVERAGED).sum()
    )
    return grouped.drop("example_id").to_numpy().astype(np.float64)


def _ratios(sums: Floats) -> dict[str, Floats]:
    """Turn resampled sums `[R, M]` into metrics, as scoring.average_rows does."""
    nll = sums[:, 2] / sums[:, 1]
    with np.errstate(over="ignore"):
        values = {"nll": nll, "perplexity": np.exp(nll)}
    return values | {name: sums[:, 3 + at] / sums[:, 0] for at, name in enumerate(AVERAGED)}


def tail_probability(confidence: float, num_conversations: int) -> float | None:
    """Return the quantile at which the interval ends on either side; None for one conversation, which has no spread.

    For many conversations it is (1 - confidence) / 2. A percentile interval is too narrow for few; the quantile is
    then moved outwards as Student's t is wider than the normal: Phi(-sqrt(n / (n - 1)) * t), the expanded percentile
    interval of Hesterberg 2015 (arXiv:1411.5279), with t from Abramowitz and Stegun 26.7.5.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    freedom = num_conversations - 1
    if freedom < 1:
        return None
    t = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return NormalDist().cdf(-t * math.sqrt(num_conversations / freedom))


def _interval(resamples: Floats, value: float, tail: float | None) -> tuple[float, float]:
    """Return the interval between the quantiles; one conversation says nothing of chance, so it takes in zero too."""
    if tail is None:
        return min(0.0, value), max(0.0, value)
    low, high = np.quantile(resamples, [tail, 1 - tail])
    # A mean of resamples and the plain mean may differ in the last digit.
    return min(float(low), value), max(float(high), value)


def put_side_by_side(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """Return one table with both answers and measures, and an outcome: improved, worsened or unchanged.

    An answer improves when it becomes an exact match, or else when its chrF rises by more than CHRF_TOLERANCE.
    """
    table = before.select("example_id", "question", "reference", pl.col("answer").alias("answer_before"))
    table = table.with_columns(after["answer"].alias("answer_after"))
    for name in ("nll", *AVERAGED):
        for side, rows in (("before", before), ("after", after)):
            values = rows["nll_sum"] / rows["num_tokens"] if name == "nll" else rows[name]
            table = table.with_columns(values.alias(f"{name}_{side}"))
    exact = pl.col("exact_match_after") - pl.col("exact_match_before")
    gain = pl.col("chrf_after") - pl.col("chrf_before")
    improved = (exact > 0) | ((exact == 0) & (gain > CHRF_TOLERANCE))
    worsened = (exact < 0) | ((exact == 0) & (gain < -CHRF_TOLERANCE))
    outcome = (
        pl.when(improved)
        .then(pl.lit("improved"))
        .when(worsened)
        .then(pl.lit("worsened"))
        .otherwise(pl.lit("unchanged"))
    )
    return table.with_columns(outcome.alias("outcome"))
