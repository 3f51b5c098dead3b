"""quality.json: what was read, where it went, what looks wrong, and what a person should know."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from schemas.plurals import count_of
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.rejects import Tally
from tasks.ingestion.row_statistics import PLACES_SHOWN, Flagged, RowStatistics, find_outliers, gather_statistics
from tasks.ingestion.rows.quality import TEXT_PROBLEMS
from tasks.ingestion.rows.screening import KINDS, Screen, redact_text
from tasks.ingestion.splitting.index import Index
from tasks.ingestion.splitting.mixture import Division
from tasks.ingestion.splitting.near_duplicates import THRESHOLD, BestMatch
from tasks.ingestion.splitting.shard_summary import ShardSummary, SourceStats
from tasks.ingestion.splitting.splits import DUPLICATE, EVAL, LEAKED, count_shared_prompts


def describe_dataset(
    counts: DatasetCounts,
    summary: ShardSummary,
    division: Division,
    pairs: Sequence[BestMatch],
    rejects: Tally,
    screen: Screen,
) -> dict[str, Any]:
    """Return the quality report: counts, what was read how, checks, statistics, warnings.

    Checks and statistics are about the rows that are used, each once, whatever its weight.

    Args:
        counts: where the rows went.
        summary: what was read.
        division: the side of each row.
        pairs: near duplicates, by their places in the index.
        rejects: of all datasets.
        screen: what was done about personal data.
    """
    index, intakes = summary.rows, summary.intakes
    train_rows, held_out_rows = division.repeats > 0, division.sides == EVAL
    train, held_out = gather_statistics(index, train_rows), gather_statistics(index, held_out_rows)
    outliers = find_outliers(index, train_rows, held_out_rows, train.lengths + held_out.lengths)
    checks = _describe_checks(index, train, held_out, outliers)
    nearest = _describe_pairs(index, pairs[:PLACES_SHOWN])
    shared = count_shared_prompts(index, train_rows, held_out_rows)
    unused: Counter[str] = Counter()
    hide = str if screen == "off" else redact_text  # a column's name may be a token
    for intake in intakes:
        unused.update({hide(name): number for name, number in intake.unused.items()})
    found = _describe_found(index, train, held_out)
    warnings = [warning for intake in intakes for warning in intake.warnings]
    warnings += [
        *_warn_of_checks(checks),
        *_warn_of_likeness(nearest, len(pairs), shared),
        *_warn_of_found(found, screen),
    ]
    warnings += _warn_of_datasets(intakes, division)
    warnings += [f"not read: {name} ({count_of(number, 'time')})" for name, number in unused.items() if number]
    return {
        "counts": {**asdict(counts), "rows_read": counts.rows_read},
        "datasets": [describe_portion(intake, division, number) for number, intake in enumerate(intakes)],
        "files": [entry for intake in intakes for entry in intake.files],
        "not_read": dict(unused),
        "checks": checks,
        "screen": {"mode": screen, "found": found},
        "near_duplicates": {"threshold": THRESHOLD, "num_eval_rows": len(pairs), "pairs": nearest},
        "num_shared_prompts": shared,
        "duplicates": index.name(index.find(division.sides == DUPLICATE, PLACES_SHOWN)),
        "leaks": index.name(index.find(division.sides == LEAKED, PLACES_SHOWN)),
        "rejects": [reject._asdict() for reject in rejects.first],
        "statistics": {"train": train.describe(), "eval": held_out.describe()},
        "warnings": warnings,
    }


def describe_portion(intake: SourceStats, division: Division, number: int) -> dict[str, Any]:
    """Return where a dataset's rows went; over all datasets each count adds up to that of the whole."""
    dataset, counts = division.datasets[number], division.count(number)
    return {
        "name": intake.name,
        "weight": dataset.weight,
        "num_rows": dataset.num_rows,
        "rows_read": intake.num_rows,
        "rows_train": counts["rows_train"],
        "rows_eval": counts["rows_eval"],
        "rows_rejected": intake.rejects.by_reason,
        "rows_duplicate": counts["rows_duplicate"],
        "rows_leaked": counts["rows_leaked"],
        "rows_left_out": counts["rows_left_out"],
        "rows_repeated": counts["rows_repeated"],
    }


def _describe_checks(
    index: Index, train: RowStatistics, held_out: RowStatistics, outliers: Flagged
) -> dict[str, dict[str, Any]]:
    """Return what looks wrong, by code."""
    flagged = {code: train.problems[code] + held_out.problems[code] for code in TEXT_PROBLEMS}
    return {code: _describe_flagged(index, rows) for code, rows in (flagged | {"length_outlier": outliers}).items()}


def _describe_found(index: Index, train: RowStatistics, held_out: RowStatistics) -> dict[str, dict[str, Any]]:
    """Return the personal data and secrets, by kind: how often, in how many rows, and the first of these."""
    return {
        kind: {
            "num_found": train.num_found[kind] + held_out.num_found[kind],
            **_describe_flagged(index, train.found[kind] + held_out.found[kind]),
        }
        for kind in KINDS
    }


def _describe_flagged(index: Index, flagged: Flagged) -> dict[str, Any]:
    """Return how many rows there are, and the first ones by name."""
    return {"num_rows": flagged.num_rows, "places": index.name(flagged.places)}


def _describe_pairs(index: Index, pairs: Sequence[BestMatch]) -> list[dict[str, Any]]:
    """Return the places of both rows of each pair."""
    held_out, train = index.name(pair.held_out for pair in pairs), index.name(pair.train for pair in pairs)
    return [
        {"eval_place": place, "train_place": other, "jaccard": pair.jaccard}
        for place, other, pair in zip(held_out, train, pairs, strict=True)
    ]


def _warn_of_checks(checks: dict[str, dict[str, Any]]) -> list[str]:
    """Say what looks wrong in the texts, and where."""
    return [
        f"{count_of(entry['num_rows'], 'row')}: {TEXT_PROBLEMS.get(code, 'much shorter or longer than the others')} "
        f"({', '.join(entry['places'])})"
        for code, entry in checks.items()
        if entry["num_rows"]
    ]


def _warn_of_likeness(nearest: Sequence[dict[str, Any]], num_pairs: int, num_shared: int) -> list[str]:
    """Say how near the held-out rows are to the trained ones."""
    warnings = []
    if nearest:
        first = nearest[0]
        warnings.append(
            f"{count_of(num_pairs, 'held-out row is', 'held-out rows are')} nearly repeated by a training row "
            f"(Jaccard index at least {THRESHOLD}), "
            f"such as {first['eval_place']} by {first['train_place']} ({first['jaccard']:.4g}): "
            "their score flatters the model"
        )
    if num_shared:
        shared = count_of(num_shared, "held-out row has", "held-out rows have")
        warnings.append(f"{shared} a prompt that is also trained, with another answer")
    return warnings


def _warn_of_found(found: dict[str, dict[str, Any]], screen: Screen) -> list[str]:
    """Say what was found and done about it, never what it was."""
    done = "replaced" if screen == "redact" else "kept (data.screen: redact replaces them)"
    return [
        f"{count_of(entry['num_rows'], 'row holds', 'rows hold')} {entry['num_found']:,} {KINDS[kind]}, {done}: "
        f"{', '.join(entry['places'])}"
        for kind, entry in found.items()
        if entry["num_rows"]
    ]


def _warn_of_datasets(intakes: Sequence[SourceStats], division: Division) -> list[str]:
    """Say which rows are left out or repeated, and which dataset brings nothing."""
    warnings = []
    for number, intake in enumerate(intakes):
        counts = division.count(number)
        unused = counts["rows_unused"]
        left_out = counts["rows_left_out"] - unused
        if unused:
            warnings.append(f"{count_of(unused, 'held-out row')} beyond data.max_eval_rows not used")
        if left_out:
            warnings.append(f"{intake.name}: {count_of(left_out, 'training row')} left out by its weight or num_rows")
        if counts["rows_repeated"]:
            repeated = counts["rows_repeated"]
            warnings.append(f"{intake.name}: its weight repeats training rows: {count_of(repeated, 'copy', 'copies')}")
        if not counts["rows_train"] and not counts["rows_eval"] and not unused:
            warnings.append(f"{intake.name}: none of its {count_of(intake.num_rows, 'row')} is trained or held out")
    return warnings
