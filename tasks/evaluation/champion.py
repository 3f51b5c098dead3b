"""The new version against the champion: the same rows, and only those that neither was trained on."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import polars as pl

from schemas.artifacts import ChampionReport
from schemas.config import EvaluationConfig
from tasks.evaluation.comparison import Comparison, check_same_rows, compare
from tasks.evaluation.metrics import is_derived, metrics_of, row_values


@dataclass(frozen=True)
class Rival:
    """The champion beside the base and the new model, for the report page."""

    report: ChampionReport
    comparison: Comparison | None
    """Champion (before) against the new version (after); None when they could not be compared."""
    rows: pl.DataFrame | None
    """Its answers to all held-out rows, also to those that were left out of the comparison."""


def compare_with_champion(
    version: str,
    champion: pl.DataFrame,
    new: pl.DataFrame,
    seen: Collection[str],
    config: EvaluationConfig,
    *,
    seed: int,
    notes: tuple[str, ...] = (),
    judged: Collection[str] = (),
    conversations: Mapping[str, str] | None = None,
) -> Rival:
    """Compare two evaluations (EvaluationRows) of the same rows, without those that the champion was trained on.

    Args:
        version: of the champion.
        champion: its rows.
        new: the new version's rows.
        seen: example_ids of the champion's training rows.
        config: resamples and confidence.
        seed: of the resamples.
        notes: for the report.
        judged: metrics that the gate decides by.
        conversations: as in `compare`.

    Raises:
        ComparisonError: these are not the same rows.
    """
    check_same_rows(champion, new)
    unseen = ~new["example_id"].is_in(list(seen))
    num_seen = new.height - int(unseen.sum())
    if num_seen:
        notes = (*notes, f"{num_seen} of {new.height} held-out rows are left out: the champion was trained on them")
    if num_seen == new.height:
        return incomparable(version, (*notes, "no held-out row is new to it"), num_seen=num_seen)
    kept = champion.filter(unseen), new.filter(unseen)
    comparison = compare(*kept, config, seed=seed, judged=judged, conversations=conversations)
    report = ChampionReport(
        version=version,
        num_examples=comparison.num_examples,
        num_conversations=comparison.num_conversations,
        num_seen=num_seen,
        metrics=comparison.before,
        delta=comparison.delta,
        notes=notes,
    )
    return Rival(report, comparison, champion)


def incomparable(version: str, notes: tuple[str, ...], *, num_seen: int = 0) -> Rival:
    """Return a champion that could not be compared; the notes say why."""
    return Rival(
        ChampionReport(version=version, num_examples=0, num_seen=num_seen, metrics={}, delta={}, notes=notes),
        None,
        None,
    )


def add_answers(table: pl.DataFrame, rival: Rival | None) -> pl.DataFrame:
    """Put the champion's answers and measures beside the other two, as columns that end in _champion."""
    if rival is None or rival.rows is None:
        return table
    measured = [
        row_values(rival.rows, name).alias(f"{name}_champion")
        for name in metrics_of(rival.rows)
        if not is_derived(name)
    ]
    return table.with_columns(rival.rows["answer"].alias("answer_champion"), *measured)
