"""Two models on the same rows: differences with paired intervals and tests, and the rows side by side.

Dimensions: `N` conversations, `M` columns of sums, `R` resamples.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from schemas.artifacts import Delta
from schemas.config import EvaluationConfig
from tasks.evaluation import paired
from tasks.evaluation.metrics import (
    METRICS,
    Floats,
    average_rows,
    column_of,
    columns,
    is_derived,
    metrics_of,
    row_values,
)

CHRF_TOLERANCE = 1.0
"""An answer changes for better or worse when its chrF (0 to 100) moves by more than this; our choice."""
SIDES = ("before", "after")


class ComparisonError(ValueError):
    """The two evaluations are not of the same rows."""


@dataclass(frozen=True)
class Comparison:
    """Base (before) against fine-tuned model (after) on the same held-out rows."""

    num_examples: int
    num_conversations: int
    """Source conversations of these rows."""
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


def compare(
    before: pl.DataFrame,
    after: pl.DataFrame,
    config: EvaluationConfig,
    *,
    seed: int,
    judged: Collection[str] = (),
    conversations: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare two evaluations (EvaluationRows) of the same rows in the same order.

    The intervals are paired: each resample draws conversations with replacement and takes both models' rows of
    them, so that what makes a row hard for both does not widen the interval of the difference. The p-values are those
    of paired randomization, corrected by Holm's method for the number of metrics: those that a gate judges are one
    family, all others another.

    Args:
        before: rows of one model.
        after: rows of the other.
        config: resamples and confidence.
        seed: of the resamples.
        judged: metrics that the gate decides by.
        conversations: example_id to the source conversation, where several rows come from one; others are their own.

    Raises:
        ComparisonError: the rows differ in number, example_id, order or reference length, or there are none.
    """
    check_same_rows(before, after)
    groups = before["example_id"].replace(conversations or {})
    sums = {"before": _sum_groups(before, groups), "after": _sum_groups(after, groups)}
    num_conversations = len(sums["before"])
    source = np.random.default_rng(seed)
    counts = paired.draw_counts(num_conversations, config.num_resamples, source)
    halves = np.split(paired.resample(np.hstack([sums[side] for side in SIDES]), counts), 2, axis=1)
    names = list(metrics_of(before))
    resamples = {side: _read_sums(half, names) for side, half in zip(SIDES, halves, strict=True)}
    tail = paired.tail_probability(config.confidence, num_conversations)
    metrics = {"before": average_rows(before), "after": average_rows(after)}
    intervals: dict[str, dict[str, tuple[float, float]]] = {"before": {}, "after": {}}
    p_values = _test(sums, config, source, judged, names)
    delta: dict[str, Delta] = {}
    for name in names:
        for side in SIDES:
            intervals[side][name] = _interval(resamples[side][name], metrics[side][name], tail)
        value = metrics["after"][name] - metrics["before"][name]
        low, high = _interval(resamples["after"][name] - resamples["before"][name], value, tail)
        delta[name] = Delta(value=value, ci_low=low, ci_high=high, p_value=p_values[name], confidence=config.confidence)
    return Comparison(
        num_examples=before.height,
        num_conversations=num_conversations,
        confidence=config.confidence,
        before=metrics["before"],
        after=metrics["after"],
        delta=delta,
        before_interval=intervals["before"],
        after_interval=intervals["after"],
        table=put_side_by_side(before, after),
    )


def compare_nothing(before: pl.DataFrame, after: pl.DataFrame, config: EvaluationConfig) -> Comparison:
    """Return the comparison of two models for which no row was held out: it says nothing of either.

    Args:
        before: rows of one model, none.
        after: rows of the other, none.
        config: confidence.
    """
    assert before.is_empty()
    assert after.is_empty()
    return Comparison(
        num_examples=0,
        num_conversations=0,
        confidence=config.confidence,
        before={},
        after={},
        delta={},
        before_interval={},
        after_interval={},
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


def _sum_groups(rows: pl.DataFrame, groups: pl.Series) -> Floats:
    """Return `[N, M]`: num_rows, num_tokens and the columns of the metrics, summed over each conversation."""
    listed = [column for column in columns() if column in rows.columns]
    grouped = rows.select("num_tokens", *listed).with_columns(groups.alias("group"))
    summed = grouped.group_by("group", maintain_order=True).agg(
        pl.len().alias("num_rows"), pl.col("num_tokens", *listed).sum()
    )
    return summed.drop("group").to_numpy().astype(np.float64)


def _read_sums(sums: Floats, names: Sequence[str]) -> dict[str, Floats]:
    """Turn sums `[R, M]` into metrics, as average_rows does."""
    weights = {"row": sums[:, 0], "token": sums[:, 1]}
    places = _find_places(names)
    return {name: METRICS[name].link(sums[:, places[name]] / weights[METRICS[name].weight]) for name in names}


def _find_places(names: Sequence[str]) -> dict[str, int]:
    """Return the column of each metric in the sums."""
    listed = [column for column, first in columns().items() if first in names]
    return {name: 2 + listed.index(column_of(name)) for name in names}


def _test(
    sums: Mapping[str, Floats],
    config: EvaluationConfig,
    source: np.random.Generator,
    judged: Collection[str],
    names: Sequence[str],
) -> dict[str, float]:
    """Return the corrected p-value of each metric's difference.

    The two models have the same rows and tokens, so that swapping them within a conversation turns the sign of its
    difference; a metric that is derived from another by an increasing function has the same p-value.
    """
    num_signs = paired.count_randomizations(config.confidence, config.num_resamples)
    signs = paired.draw_signs(len(sums["before"]), num_signs, source)
    found = paired.randomize(sums["after"] - sums["before"], signs)
    raw = {name: float(found[place]) for name, place in _find_places(names).items()}
    families = (
        {name: p for name, p in raw.items() if name in judged},
        {name: p for name, p in raw.items() if name not in judged and not is_derived(name)},
    )
    corrected = {name: p for family in families for name, p in paired.correct_p_values(family).items()}
    first = columns()
    return {name: corrected.get(name, corrected[first[column_of(name)]]) for name in names}


def _interval(resamples: Floats, value: float, tail: float | None) -> tuple[float, float]:
    low, high = paired.find_interval(resamples[:, None], np.array([value]), tail)
    return float(low[0]), float(high[0])


def put_side_by_side(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """Return one table with both answers and measures, and an outcome: improved, worsened or unchanged.

    An answer improves when it becomes an exact match, or else when its chrF rises by more than CHRF_TOLERANCE.
    """
    table = before.select("example_id", "question", "reference", pl.col("answer").alias("answer_before"))
    table = table.with_columns(after["answer"].alias("answer_after"))
    for name in metrics_of(before):
        if not is_derived(name):
            for side, rows in zip(SIDES, (before, after), strict=True):
                table = table.with_columns(row_values(rows, name).alias(f"{name}_{side}"))
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
