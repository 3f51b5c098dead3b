"""From files to validated tables: train.parquet, eval.parquet, rejects.parquet and quality.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandera.errors
import pandera.polars as pa
import polars as pl

from schemas.config import DataConfig
from schemas.records import Conversations, Rejects
from tasks.ingestion.formats import Reading
from tasks.ingestion.identity import Conversation
from tasks.ingestion.intake import Intake, take_in
from tasks.ingestion.near_duplicates import THRESHOLD, find_near_duplicates
from tasks.ingestion.quality import PLACES_SHOWN, TEXT_PROBLEMS, check_quality, describe_rows
from tasks.ingestion.rejects import DataError, Reject, check_budget, count_reasons, describe_rejects
from tasks.ingestion.sources import find_sources
from tasks.ingestion.splits import Split, count_shared_prompts, split_rows, split_sources

CONVERSATION_SCHEMA = {
    "example_id": pl.String,
    "source": pl.String,
    "line": pl.Int64,
    "messages": pl.String,
    "tools": pl.String,
}
REJECT_SCHEMA = {
    "example_id": pl.String,
    "source": pl.String,
    "line": pl.Int64,
    "reason": pl.String,
    "detail": pl.String,
    "raw": pl.String,
}


@dataclass(frozen=True)
class DatasetCounts:
    """Where every row went; rows_in = rows_train + rows_eval + rejected + rows_duplicate + rows_leaked.

    Rows that data.max_rows or data.max_eval_rows leave out are not counted as read.
    """

    rows_in: int
    rows_train: int
    rows_eval: int
    rows_rejected: dict[str, int]
    """By reason."""
    rows_duplicate: int
    """Copies beyond the first of a conversation."""
    rows_leaked: int
    """Training rows that hold a held-out conversation."""

    def __post_init__(self) -> None:
        taken = self.rows_train + self.rows_eval + self.rows_duplicate + self.rows_leaked
        assert self.rows_in == taken + sum(self.rows_rejected.values()), f"rows do not add up: {self}"


def build_dataset(config: DataConfig, *, seed: int, folder: Path) -> DatasetCounts:
    """Read, check, split and write a dataset.

    The order is: rows become conversations or rejects; the budget is checked; copies go; the split is made; leaks
    go. rejects.parquet is written even where the dataset is refused.

    Args:
        config: the dataset and its limits.
        seed: of the split.
        folder: where the tables are written; made when missing.

    Raises:
        DataError: nothing can be read, too much is rejected, or nothing is left to train or to evaluate.
    """
    if config.eval_source is None and config.eval_fraction == 0:
        raise DataError(
            "data.eval_fraction is 0 and there is no data.eval_source, so nothing could be evaluated: "
            "hold out a part (such as 0.1) or give a held-out dataset"
        )
    folder.mkdir(parents=True, exist_ok=True)
    reading = Reading(config.format, config.columns)
    intake = take_in(find_sources(config.source, config), reading, config.max_rows, seed=seed)
    held_out = None
    if config.eval_source is not None:
        held_out = take_in(find_sources(config.eval_source, config), reading, seed=seed)
    intakes = [intake] if held_out is None else [intake, held_out]
    rejects = [reject for part in intakes for reject in part.rejects]
    write_table(rejects, REJECT_SCHEMA, Rejects, folder / "rejects.parquet")
    num_rows = sum(part.num_rows for part in intakes)
    check_budget(rejects, num_rows, config.max_rejected_fraction, config.source)
    if held_out is None:
        split = split_rows(intake.conversations, config.eval_fraction, config.max_eval_rows, seed)
    else:
        split = split_sources(intake.conversations, held_out.conversations, config.max_eval_rows, seed)
    _check_sides(split, rejects, num_rows, config)
    counts = DatasetCounts(
        rows_in=num_rows - len(split.unused),
        rows_train=len(split.train),
        rows_eval=len(split.eval),
        rows_rejected=count_reasons(rejects),
        rows_duplicate=len(split.duplicate),
        rows_leaked=len(split.leaked),
    )
    write_table([_to_row(row) for row in split.train], CONVERSATION_SCHEMA, Conversations, folder / "train.parquet")
    write_table([_to_row(row) for row in split.eval], CONVERSATION_SCHEMA, Conversations, folder / "eval.parquet")
    quality = _describe(counts, intakes, split, rejects)
    (folder / "quality.json").write_text(json.dumps(quality, ensure_ascii=False, indent=1), encoding="utf-8")
    return counts


def _check_sides(split: Split, rejects: Sequence[Reject], num_rows: int, config: DataConfig) -> None:
    """Fail when a side of the split is empty."""
    if split.train and split.eval:
        return
    side = "train" if not split.train else "evaluate"
    went = (
        f"{num_rows} rows read, {len(rejects)} rejected, {len(split.duplicate)} copies, "
        f"{len(split.leaked)} leaked (also held out), {len(split.eval)} held out"
    )
    listed = f"\n{describe_rejects(rejects)}" if rejects else ""
    raise DataError(
        f"{config.source}: no row is left to {side} ({went}): give at least two different usable conversations"
        f"{', and a held-out dataset with other ones' if config.eval_source else ''}{listed}"
    )


def _to_row(row: Conversation) -> tuple[str, str, int, str, str | None]:
    """Return the written part of a conversation."""
    return row.example_id, row.source, row.line, row.messages, row.tools


def write_table(rows: Sequence[Any], schema: Any, model: type[pa.DataFrameModel], path: Path) -> None:
    """Validate every row against its schema, and write the table."""
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    try:
        # An eager frame: of a lazy one pandera checks types only.
        model.validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as error:
        raise AssertionError(f"{path.name} breaks its schema: {error.failure_cases}") from error
    frame.write_parquet(path)


def _describe(
    counts: DatasetCounts, intakes: Sequence[Intake], split: Split, rejects: Sequence[Reject]
) -> dict[str, Any]:
    """Return the quality report: counts, what was read how, checks, statistics, warnings."""
    kept = [*split.train, *split.eval]
    checks = check_quality(kept)
    pairs = find_near_duplicates(split.train, split.eval)
    shared = count_shared_prompts(split.train, split.eval)
    unused: dict[str, int] = {}
    for part in intakes:
        for name, number in part.unused.items():
            unused[name] = unused.get(name, 0) + number
    warnings = [warning for part in intakes for warning in part.warnings]
    warnings += [
        f"{found['num_rows']} row(s): {TEXT_PROBLEMS.get(code, 'much shorter or longer than the others')} "
        f"({', '.join(found['places'])})"
        for code, found in checks.items()
        if found["num_rows"]
    ]
    if pairs:
        first = pairs[0]
        warnings.append(
            f"{len(pairs)} held-out row(s) are nearly repeated by a training row (Jaccard index at least {THRESHOLD}), "
            f"such as {first.eval_place} by {first.train_place} ({first.jaccard}): their score flatters the model"
        )
    if shared:
        warnings.append(f"{shared} held-out row(s) have a prompt that is also trained, with another answer")
    if split.unused:
        warnings.append(f"{len(split.unused)} held-out row(s) beyond data.max_eval_rows are not used")
    warnings += [f"not read: {name} ({number} time(s))" for name, number in unused.items() if number]
    return {
        "counts": asdict(counts),
        "num_unused_eval_rows": len(split.unused),
        "files": [entry for part in intakes for entry in part.files],
        "not_read": unused,
        "checks": checks,
        "near_duplicates": {
            "threshold": THRESHOLD,
            "num_eval_rows": len(pairs),
            "pairs": [pair._asdict() for pair in pairs[:PLACES_SHOWN]],
        },
        "num_shared_prompts": shared,
        "duplicates": [f"{row.source}:{row.line}" for row in split.duplicate[:PLACES_SHOWN]],
        "leaks": [f"{row.source}:{row.line}" for row in split.leaked[:PLACES_SHOWN]],
        "rejects": [reject._asdict() for reject in rejects[:PLACES_SHOWN]],
        "statistics": {"train": describe_rows(split.train), "eval": describe_rows(split.eval)},
        "warnings": warnings,
    }
