"""Rows out of files, one at a time: JSON, JSONL, CSV, TSV, Parquet and Arrow.

JSON is never parsed through Arrow, which would merge the objects of all rows into one struct and give each the
others' keys as nulls. Every error is `json`'s.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from tasks.ingestion.errors import DataError, RowError
from tasks.ingestion.sources.columnar import WHOLE, FileSpan, RawRow, read_arrow, read_parquet
from tasks.ingestion.sources.encodings import read_text_lines
from tasks.ingestion.sources.files import STREAMS, SourceFile
from tasks.ingestion.sources.json_files import read_json, read_json_lines, read_stream
from tasks.ingestion.sources.remote import brought
from tasks.ingestion.sources.remote_files import RemoteFile
from tasks.parcels import find


def read_rows(file: SourceFile, span: FileSpan = WHOLE) -> Iterator[RawRow]:
    """Yield the rows of a file; a row that cannot be parsed comes with its problem and its text as value.

    Raises:
        DataError: the file as a whole cannot be read: its encoding, its syntax, no row that parses.
    """
    assert span == WHOLE or file.kind in ("jsonl", "parquet", "arrow"), f"{file.path}: {span} of a {file.kind} file"
    if file.remote is not None:
        return _read_remote(file, file.remote, span)
    path = find(file.path)
    rows = _read(path, file.kind, span)
    return rows if path == file.path else _name_in_errors(rows, path, file.shown)


def _read_remote(file: SourceFile, remote: RemoteFile, span: FileSpan) -> Iterator[RawRow]:
    """Read rows from a copy of the part of a file that has them."""
    with brought(remote, file.kind, span) as path:
        yield from _name_in_errors(_read(path, file.kind, span), path, file.shown)


def _read(path: Path, kind: str, span: FileSpan) -> Iterator[RawRow]:
    try:
        yield from _choose(path, kind, span)
    except MemoryError:
        raise DataError(
            f"{path}: no memory is left for its rows: cut the largest ones up, or give this process more memory"
        ) from None


def _choose(path: Path, kind: str, span: FileSpan) -> Iterator[RawRow]:
    match kind:
        case "json":
            return read_json(path)
        case "jsonl":
            return read_json_lines(path, span)
        case "jsonl.gz" | "jsonl.zst":
            return read_stream(path, STREAMS[path.suffix.lower()])
        case "csv":
            return _read_csv(path, ",")
        case "tsv":
            return _read_csv(path, "\t")
        case "parquet":
            return read_parquet(path, span)
        case _:
            return read_arrow(path, span)


def _name_in_errors(rows: Iterator[RawRow], path: Path, known: str) -> Iterator[RawRow]:
    """Yield the rows; name the file that people know where what is wrong with its copy is said."""
    try:
        yield from rows
    except DataError as error:
        raise DataError(str(error).replace(str(path), known)) from error


def _read_csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    """Read rows under a header; values stay text, and quoted ones may go over several lines."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than a long answer
    reader = csv.reader(read_text_lines(path), delimiter=delimiter, strict=True)
    number, start = 0, 1
    header: list[str] | None = None
    try:
        for values in reader:
            start, at = reader.line_num + 1, start
            if not values:
                continue
            if header is None:
                header = _check_header(path, values)
                continue
            number += 1
            if len(values) == len(header):
                yield RawRow(number, dict(zip(header, values, strict=True)))
            else:
                detail = f"{len(values)} values under a header of {len(header)}, at line {at} of the file"
                yield RawRow(number, values, RowError("wrong_column_count", detail))
    except csv.Error as error:
        raise DataError(
            f"{path}: broken CSV in the row that begins on line {start} ({error}): close its quotes, "
            'and write a quote inside a value as ""'
        ) from None


def _check_header(path: Path, values: list[str]) -> list[str]:
    """Refuse a header that names a column twice: one of the two would be lost."""
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise DataError(f"{path}: the header names {', '.join(map(repr, repeated))} more than once: rename the columns")
    return values
