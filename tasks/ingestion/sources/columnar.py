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


class Span(NamedTuple):
    """A part of a file: bytes of a JSONL file, row groups or record batches; of other files only the whole."""

    start: int = 0
    stop: int | None = None
    """None: to the end."""
    first_row: int = 1
    """Number of its first line or row."""


WHOLE = Span()


def read_parquet(path: Path, span: Span) -> Iterator[RawRow]:
    """Read record batches of a Parquet file."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            groups = range(file.num_row_groups)[span.start : span.stop]
            yield from _number(file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=groups), span.first_row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}): write it again") from error


def read_arrow(path: Path, span: Span) -> Iterator[RawRow]:
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
            yield from _number(batches, span.first_row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error}): write it again") from error


def _number(batches: Iterator[Any], first_row: int) -> Iterator[RawRow]:
    """Turn record batches into numbered rows; maps become objects."""
    number = first_row - 1
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for row in batch.slice(start, ROWS_AT_ONCE).to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield RawRow(number, row)
