"""Writes tables as a stream of row groups, and validates every row."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandera.errors
import pandera.polars as pa
import polars as pl

GROUP_ROWS = 10_000


def write_table(frames: Iterable[pl.DataFrame], schema: Any, model: type[pa.DataFrameModel], path: Path) -> None:
    """Validate every row, and write the table in row groups of GROUP_ROWS; where a row is wrong, no table is left."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetWriter(path, pl.DataFrame(schema=schema).to_arrow().schema, compression="zstd") as writer:
            for frame in _regroup(frames):
                try:
                    # An eager frame: of a lazy one pandera checks types only.
                    model.validate(frame, lazy=True)
                except pandera.errors.SchemaErrors as error:
                    raise AssertionError(f"{path.name} breaks its schema: {error.failure_cases}") from error
                writer.write_table(frame.to_arrow(), row_group_size=GROUP_ROWS)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _regroup(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Cut frames of any size into groups of GROUP_ROWS, the last one excepted."""
    waiting: list[pl.DataFrame] = []
    num_rows = 0
    for frame in frames:
        waiting.append(frame)
        num_rows += frame.height
        if num_rows >= GROUP_ROWS:
            whole = pl.concat(waiting)
            full = num_rows - num_rows % GROUP_ROWS
            yield from (whole[start : start + GROUP_ROWS] for start in range(0, full, GROUP_ROWS))
            waiting, num_rows = [copy_rows(whole[full:])], num_rows - full
    if num_rows:
        yield pl.concat(waiting)


def copy_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows without the texts of the others from which they were taken, as a slice would keep them."""
    return pl.DataFrame(rows.to_arrow())
