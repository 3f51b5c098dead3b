"""Rows out of Parquet and Arrow files, by row groups and record batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tasks.ingestion.errors import DataError, RowError

ROWS_AT_ONCE = 1000


class RawRow(NamedTuple):
    """A row as it was read: its 1-based place, and its value or what is wrong with it."""

    line: int
    value: Any
    problem: RowError | None = None


class FileSpan(NamedTuple):
    """A part of a file: bytes of JSONL, of a JSON list or of CSV, row groups or record batches."""

    start: int = 0
    stop: int | None = None
    """None: to the end."""
    first_row: int = 1
    """Number of its first line or row."""
    first_line: int = 1
    """Of a part of a JSON list or of CSV: line and column of its first character."""
    first_column: int = 1
    header_bytes: int = 0
    """Of a part of CSV: those at the front of the file that have the header."""

    def list_bytes(self, size: int) -> tuple[tuple[int, int], ...]:
        """Return which bytes of a file of this size are read, for spans that are bytes."""
        own = (self.start, size if self.stop is None else self.stop)
        return ((0, self.header_bytes), own) if self.header_bytes else (own,)


WHOLE = FileSpan()
BYTE_KINDS = frozenset({"json", "jsonl", "csv", "tsv"})
"""Whose spans are bytes."""


def read_parquet(path: Path, span: FileSpan) -> Iterator[RawRow]:
    """Read record batches of a Parquet file."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            groups = range(file.num_row_groups)[span.start : span.stop]
            yield from _number(file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups), span.first_row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}): write it again") from error


def read_arrow(path: Path, span: FileSpan) -> Iterator[RawRow]:
    """Read record batches of an Arrow file, in the file or the stream form."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as memory:
            is_file = memory.read(6) == b"ARROW1"
            memory.seek(0)
            if is_file:
                file = pa.ipc.open_file(memory)
                places = range(file.num_record_batches)[span.start : span.stop]
                batches = (file.get_batch(place) for place in places)
            else:
                assert span == WHOLE, f"{path}: {span} of a stream"
                batches = iter(pa.ipc.open_stream(memory))
            yield from _number(_verify(batches), span.first_row)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error}): write it again") from error


def _number(batches: Iterator[Any], first_row: int) -> Iterator[RawRow]:
    """Turn record batches into numbered rows; maps become objects."""
    number = first_row - 1
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for row, problem in _to_rows(batch.slice(start, ROWS_AT_ONCE)):
                number += 1
                yield RawRow(number, row, problem)


def _to_rows(batch: Any) -> Iterator[tuple[Any, RowError | None]]:
    """Yield the rows of a batch; where it does not become Python values as a whole, row by row, each with its problem.

    What fails: bytes of a text that are not UTF-8, a date beyond the year 9999, a map that has a key twice.
    """
    try:
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            yield row, None
        return
    except (ValueError, KeyError, OverflowError):
        pass
    for place in range(batch.num_rows):
        one = batch.slice(place, 1)
        try:
            yield one.to_pylist(maps_as_pydicts="strict")[0], None
        except (ValueError, KeyError, OverflowError) as error:
            detail = f"{_find_column(one)} cannot be read: {type(error).__name__}: {error}"
            yield str(detail), RowError("unreadable_value", detail)


def _find_column(row: Any) -> str:
    """Name the first column of a row that does not become a Python value."""
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.to_pylist(maps_as_pydicts="strict")
        except (ValueError, KeyError, OverflowError):
            return f"column {name}"
    return "the row"


def _verify(batches: Iterator[Any]) -> Iterator[Any]:
    """Check the offsets of every batch before a value is read: flipped bytes would else end the process.

    Raises:
        pyarrow.ArrowInvalid: a batch is not what its schema says.
    """
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            _verify_column(name, column)
        yield batch


def _verify_column(name: str, column: Any) -> None:
    """Check a column in full, but for text that is not UTF-8: that is one row's problem."""
    import pyarrow as pa

    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error) and "UTF-8" not in str(error):
            raise pa.ArrowInvalid(f"column {name}: {error}") from error
        column.validate()
