"""quality.json: what was read, where it went, what looks wrong, and what a person should know."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tasks.ingestion.identity import Conversation
from tasks.ingestion.mixture import Portion
from tasks.ingestion.near_duplicates import THRESHOLD, NearDuplicate, find_near_duplicates
from tasks.ingestion.quality import PLACES_SHOWN, TEXT_PROBLEMS, check_quality, describe_rows
from tasks.ingestion.rejects import Reject, count_reasons
from tasks.ingestion.screening import KINDS, Screen
from tasks.ingestion.splits import count_shared_prompts, drop_duplicates

if TYPE_CHECKING:
    from tasks.ingestion.dataset import DatasetCounts


def describe_dataset(
    counts: "DatasetCounts", portions: Sequence[Portion], rejects: Sequence[Reject], screen: Screen
) -> dict[str, Any]:
    """Return the quality report: counts, what was read how, checks, statistics, warnings.

    Checks and statistics are about the rows that are used, each once, whatever its weight.
    """
    train = drop_duplicates([row for portion in portions for row in portion.train])[0]
    held_out = [row for portion in portions for row in portion.split.eval]
    checks = check_quality([*train, *held_out])
    pairs = find_near_duplicates(train, held_out)
    shared = count_shared_prompts(train, held_out)
    unused: Counter[str] = Counter()
    for portion in portions:
        unused.update(portion.intake.unused)
    found = count_found([*train, *held_out])
    warnings = [warning for portion in portions for warning in portion.intake.warnings]
    warnings += [*_warn_of_checks(checks), *_warn_of_likeness(pairs, shared), *_warn_of_found(found, screen)]
    warnings += _warn_of_portions(portions)
    warnings += [f"not read: {name} ({number} time(s))" for name, number in unused.items() if number]
    return {
        "counts": {**asdict(counts), "rows_read": counts.rows_read},
        "datasets": [describe_portion(portion) for portion in portions],
        "files": [entry for portion in portions for entry in portion.intake.files],
        "not_read": dict(unused),
        "checks": checks,
        "screen": {"mode": screen, "found": found},
        "near_duplicates": {
            "threshold": THRESHOLD,
            "num_eval_rows": len(pairs),
            "pairs": [pair._asdict() for pair in pairs[:PLACES_SHOWN]],
        },
        "num_shared_prompts": shared,
        "duplicates": _list_places(row for portion in portions for row in portion.split.duplicate),
        "leaks": _list_places(row for portion in portions for row in portion.split.leaked),
        "rejects": [reject._asdict() for reject in rejects[:PLACES_SHOWN]],
        "statistics": {"train": describe_rows(train), "eval": describe_rows(held_out)},
        "warnings": warnings,
    }


def describe_portion(portion: Portion) -> dict[str, Any]:
    """Return where a dataset's rows went; over all datasets each count adds up to that of the whole."""
    return {
        "name": portion.intake.name,
        "weight": portion.dataset.weight,
        "num_rows": portion.dataset.num_rows,
        "rows_read": portion.intake.num_rows,
        "rows_train": len(portion.train),
        "rows_eval": len(portion.split.eval),
        "rows_rejected": count_reasons(portion.intake.rejects),
        "rows_duplicate": len(portion.split.duplicate),
        "rows_leaked": len(portion.split.leaked),
        "rows_left_out": portion.num_left_out,
        "rows_repeated": portion.num_repeated,
    }


def count_found(rows: Sequence[Conversation]) -> dict[str, dict[str, Any]]:
    """Return, by kind of personal data and secrets, how often it is in how many rows, and the first places."""
    by_kind: dict[str, list[Conversation]] = {kind: [] for kind in KINDS}
    numbers: Counter[str] = Counter()
    for row in rows:
        numbers.update(row.found)
        for kind in set(row.found):
            by_kind[kind].append(row)
    return {
        kind: {"num_found": numbers[kind], "num_rows": len(holders), "places": _list_places(holders)}
        for kind, holders in by_kind.items()
    }


def _warn_of_checks(checks: dict[str, dict[str, Any]]) -> list[str]:
    """Say what looks wrong in the texts, and where."""
    return [
        f"{entry['num_rows']} row(s): {TEXT_PROBLEMS.get(code, 'much shorter or longer than the others')} "
        f"({', '.join(entry['places'])})"
        for code, entry in checks.items()
        if entry["num_rows"]
    ]


def _warn_of_likeness(pairs: Sequence[NearDuplicate], num_shared: int) -> list[str]:
    """Say how near the held-out rows are to the trained ones."""
    warnings = []
    if pairs:
        first = pairs[0]
        warnings.append(
            f"{len(pairs)} held-out row(s) are nearly repeated by a training row (Jaccard index at least {THRESHOLD}), "
            f"such as {first.eval_place} by {first.train_place} ({first.jaccard}): their score flatters the model"
        )
    if num_shared:
        warnings.append(f"{num_shared} held-out row(s) have a prompt that is also trained, with another answer")
    return warnings


def _warn_of_found(found: dict[str, dict[str, Any]], screen: Screen) -> list[str]:
    """Say what was found and done about it, never what it was."""
    done = "replaced" if screen == "redact" else "kept (data.screen: redact replaces them)"
    return [
        f"{entry['num_rows']} row(s) hold {entry['num_found']} {KINDS[kind]}, {done}: {', '.join(entry['places'])}"
        for kind, entry in found.items()
        if entry["num_rows"]
    ]


def _warn_of_portions(portions: Sequence[Portion]) -> list[str]:
    """Say which rows are left out or repeated, and which dataset brings nothing."""
    warnings = []
    for portion in portions:
        name, unused = portion.intake.name, len(portion.split.unused)
        left_out = portion.num_left_out - unused
        if unused:
            warnings.append(f"{unused} held-out row(s) beyond data.max_eval_rows are not used")
        if left_out:
            warnings.append(f"{name}: {left_out} training row(s) are left out by its weight or num_rows")
        if portion.num_repeated:
            warnings.append(f"{name}: its weight repeats training rows, {portion.num_repeated} time(s) in all")
        if not portion.train and not portion.split.eval and not unused:
            warnings.append(f"{name}: none of its {portion.intake.num_rows} row(s) is trained or held out")
    return warnings


def _list_places(rows: Iterable[Conversation]) -> list[str]:
    """Return source and line of the first rows."""
    return [f"{row.source}:{row.line}" for row, _ in zip(rows, range(PLACES_SHOWN), strict=False)]
