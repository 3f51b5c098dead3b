"""Writes tables as a stream of row groups, and validates every row."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandera.errors
import pandera.polars as pa
import polars as pl

GROUP_ROWS = 10_000
_PARTS_WANTED = 16
_MOST_GROUPS = 5
"""In a part."""


def count_part_rows(num_rows: int) -> int:
    """Return the rows of each part of a table but the last, by the table's size alone.

    They are one to _MOST_GROUPS whole row groups: few rows keep all cores busy, many keep the files few. A table of no
    more rows is one file.
    """
    return min(max(num_rows // (_PARTS_WANTED * GROUP_ROWS), 1), _MOST_GROUPS) * GROUP_ROWS


def write_table(
    frames: Iterable[pl.DataFrame],
    schema: Any,
    model: type[pa.DataFrameModel],
    path: Path,
    group_rows: int | None = None,
) -> int:
    """Validate every row, and write a Parquet file; where a row is wrong, no file is left.

    Args:
        frames: of any size.
        schema: of their columns.
        model: what each row has to be.
        path: of the file.
        group_rows: rows of a row group; None: GROUP_ROWS.

    Returns:
        The number of rows.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    group_rows = group_rows or GROUP_ROWS
    num_rows = 0
    try:
        with pq.ParquetWriter(path, pl.DataFrame(schema=schema).to_arrow().schema, compression="zstd") as writer:
            for frame in _regroup(frames, group_rows):
                try:
                    # An eager frame: of a lazy one pandera checks types only.
                    model.validate(frame, lazy=True)
                except pandera.errors.SchemaErrors as error:
                    raise AssertionError(f"{path.name} breaks its schema: {error.failure_cases}") from error
                writer.write_table(frame.to_arrow(), row_group_size=group_rows)
                num_rows += frame.height
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return num_rows


def _regroup(frames: Iterable[pl.DataFrame], group_rows: int) -> Iterator[pl.DataFrame]:
    """Cut frames of any size into groups, the last one excepted."""
    waiting: list[pl.DataFrame] = []
    num_rows = 0
    for frame in frames:
        waiting.append(frame)
        num_rows += frame.height
        if num_rows >= group_rows:
            whole = pl.concat(waiting)
            full = num_rows - num_rows % group_rows
            yield from (whole[start : start + group_rows] for start in range(0, full, group_rows))
            waiting, num_rows = [copy_rows(whole[full:])], num_rows - full
    if num_rows:
        yield pl.concat(waiting)


def copy_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows without the texts of the others from which they were taken, as a slice would keep them."""
    return pl.DataFrame(rows.to_arrow())
