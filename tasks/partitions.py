"""Tables in one file or in several: `train.parquet` is a Parquet file, or a folder of that name with its parts.

The parts are Parquet files named by their number, 000000.parquet and so on, whose rows follow each other. Nothing joins
them: who writes a part is done with it, and who reads one need not have the others.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_DIGITS = 6


class TableError(ValueError):
    """A table lacks a part."""


class RowGroup(NamedTuple):
    """A row group of a table."""

    part: Path
    number: int
    """In its part."""
    num_rows: int


def name_part(table: Path, number: int) -> Path:
    """Return the file of a part of a table that is a folder."""
    return table / f"{number:0{_DIGITS}}.parquet"


def list_parts(table: Path) -> list[Path]:
    """Return the files of a table in the order of their rows; the table itself where it is a file, or is missing.

    Raises:
        TableError: it is a folder that lacks a part, or holds something else.
    """
    if not table.is_dir():
        return [table]
    found = sorted(table.iterdir())
    wanted = [name_part(table, number) for number in range(max(1, len(found)))]
    if found != wanted:
        missing = next((path for path in wanted if path not in found), None)
        other = next((path for path in found if path not in wanted), None)
        raise TableError(
            f"{table}: it lacks its part {missing.name if missing else ''}"
            f"{f', and holds {other.name}' if other else ''}: delete the folder, so that it is fetched or made again"
        )
    return wanted


def list_row_groups(table: Path) -> Iterator[RowGroup]:
    """Yield the row groups of a table, in order."""
    for part in list_parts(table):
        metadata = _read_metadata(part)
        for number in range(metadata.num_row_groups):
            yield RowGroup(part, number, metadata.row_group(number).num_rows)


def count_rows(table: Path) -> int:
    """Return the rows of a table."""
    return sum(_read_metadata(part).num_rows for part in list_parts(table))


def copy_table(table: Path, target: Path) -> None:
    """Copy a table, whichever form it has; one that is at the target is replaced."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if table.is_dir():
        shutil.copytree(table, target)
    else:
        shutil.copyfile(table, target)


def _read_metadata(part: Path) -> Any:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    return pq.read_metadata(part)
