"""Counts rejected rows by reason and keeps the first rows of each, reading their tables one row group at a time."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from tasks.ingestion.errors import REASONS

ROWS_KEPT = 5
"""Of each reason."""


@dataclass
class RejectGroup:
    """The rejects of one reason."""

    reason: str
    meaning: str
    count: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The first ROWS_KEPT of them, as in rejects.parquet."""


def group_rejects(tables: Iterable[Path]) -> list[RejectGroup]:
    """Return the rejects of several rejects.parquet by reason, the most frequent first."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    groups: dict[str, RejectGroup] = {}
    for table in tables:
        file = pq.ParquetFile(table)
        for number in range(file.num_row_groups):
            rows = pl.DataFrame(file.read_row_group(number))
            for (reason,), some in rows.group_by("reason", maintain_order=True):
                name = str(reason)
                group = groups.setdefault(name, RejectGroup(name, REASONS.get(name, "")))
                group.count += some.height
                group.rows += some.head(ROWS_KEPT - len(group.rows)).to_dicts()
    return sorted(groups.values(), key=lambda group: -group.count)
