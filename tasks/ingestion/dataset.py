"""From files to validated tables: train.parquet, eval.parquet, rejects.parquet and quality.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandera.errors
import pandera.polars as pa
import polars as pl

from schemas.config import DataConfig
from schemas.records import Conversations, Rejects
from tasks.ingestion.identity import Conversation
from tasks.ingestion.mixture import Portion, divide, mix, read_datasets
from tasks.ingestion.quality_report import describe_dataset
from tasks.ingestion.rejects import DataError, Reject, check_budget, count_reasons, describe_rejects

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

    rows_in are the rows that the run takes in: those read, without those that are left out, and with the copies that
    a weight above 1 makes (train.parquet then holds an example_id several times). What data.max_rows leaves unread
    is not counted at all.
    """

    rows_in: int
    rows_train: int
    """Rows of train.parquet."""
    rows_eval: int
    rows_rejected: dict[str, int]
    """By reason."""
    rows_duplicate: int
    """Copies beyond the first of a conversation."""
    rows_leaked: int
    """Training rows that hold a held-out conversation."""
    rows_left_out: int = 0
    """Usable rows that a weight, num_rows or max_eval_rows leaves out."""
    rows_repeated: int = 0
    """Copies that weights above 1 made."""

    def __post_init__(self) -> None:
        taken = self.rows_train + self.rows_eval + self.rows_duplicate + self.rows_leaked
        assert self.rows_in == taken + sum(self.rows_rejected.values()), f"rows do not add up: {self}"

    @property
    def rows_read(self) -> int:
        """Rows of the files; what budgets are measured by."""
        return self.rows_in + self.rows_left_out - self.rows_repeated


def build_dataset(config: DataConfig, *, seed: int, folder: Path) -> DatasetCounts:
    """Read, check, split, mix and write a dataset.

    The order is: rows become conversations or rejects; the budget is checked; each dataset is split by itself, its
    copies gone; leaks go, and what several datasets have; training rows are taken by weight or number, and mixed.
    Held-out rows have no weight. rejects.parquet is written even where the dataset is refused.

    Args:
        config: the datasets and their limits.
        seed: of the split and the mixture.
        folder: where the tables are written; made when missing.

    Raises:
        DataError: nothing can be read, too much is rejected, too few rows are there for a mixture, or nothing is left
            to train or to evaluate.
    """
    if config.eval_source is None and config.eval_fraction == 0:
        raise DataError(
            "data.eval_fraction is 0 and there is no data.eval_source, so nothing could be evaluated: "
            "hold out a part (such as 0.1) or give a held-out dataset"
        )
    folder.mkdir(parents=True, exist_ok=True)
    intakes = read_datasets(config, seed=seed)
    rejects = [reject for intake in intakes for reject in intake.rejects]
    write_table(rejects, REJECT_SCHEMA, Rejects, folder / "rejects.parquet")
    where = ", ".join(dataset.source for dataset in config.datasets)
    check_budget(rejects, sum(intake.num_rows for intake in intakes), config.max_rejected_fraction, where)
    portions = divide(intakes, config, seed=seed)
    counts = _count(portions)
    _check_sides(counts, rejects, where, config)
    train = mix([portion.train for portion in portions], seed)
    held_out = mix([portion.split.eval for portion in portions], seed)
    write_table([_to_row(row) for row in train], CONVERSATION_SCHEMA, Conversations, folder / "train.parquet")
    write_table([_to_row(row) for row in held_out], CONVERSATION_SCHEMA, Conversations, folder / "eval.parquet")
    quality = describe_dataset(counts, portions, rejects, config.screen)
    (folder / "quality.json").write_text(json.dumps(quality, ensure_ascii=False, indent=1), encoding="utf-8")
    return counts


def _count(portions: Sequence[Portion]) -> DatasetCounts:
    """Add up where the rows of all datasets went."""
    num_left_out = sum(portion.num_left_out for portion in portions)
    num_repeated = sum(portion.num_repeated for portion in portions)
    return DatasetCounts(
        rows_in=sum(portion.intake.num_rows for portion in portions) - num_left_out + num_repeated,
        rows_train=sum(len(portion.train) for portion in portions),
        rows_eval=sum(len(portion.split.eval) for portion in portions),
        rows_rejected=count_reasons([reject for portion in portions for reject in portion.intake.rejects]),
        rows_duplicate=sum(len(portion.split.duplicate) for portion in portions),
        rows_leaked=sum(len(portion.split.leaked) for portion in portions),
        rows_left_out=num_left_out,
        rows_repeated=num_repeated,
    )


def _check_sides(counts: DatasetCounts, rejects: Sequence[Reject], where: str, config: DataConfig) -> None:
    """Fail when a side of the split is empty."""
    if counts.rows_train and counts.rows_eval:
        return
    side = "train" if not counts.rows_train else "evaluate"
    went = (
        f"{counts.rows_read} rows read, {len(rejects)} rejected, {counts.rows_duplicate} copies, "
        f"{counts.rows_leaked} leaked (also held out), {counts.rows_eval} held out"
    )
    listed = f"\n{describe_rejects(rejects)}" if rejects else ""
    raise DataError(
        f"{where}: no row is left to {side} ({went}): give at least two different usable conversations"
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
