"""Rows out of files, one at a time: JSON, JSONL, CSV, TSV, Parquet and Arrow.

JSON is never parsed through Arrow, which would merge the objects of all rows into one struct and give each the
others' keys as nulls. Every error is `json`'s.
"""

from collections.abc import Iterator
from pathlib import Path

from tasks.ingestion.errors import DataError
from tasks.ingestion.sources.columnar import BYTE_KINDS, WHOLE, FileSpan, RawRow, read_arrow, read_parquet
from tasks.ingestion.sources.csv_files import read_csv
from tasks.ingestion.sources.files import STREAMS, SourceFile
from tasks.ingestion.sources.json_files import read_json, read_json_lines, read_json_list, read_stream
from tasks.ingestion.sources.remote import brought
from tasks.ingestion.sources.remote_files import RemoteFile
from tasks.parcels import find


def read_rows(file: SourceFile, span: FileSpan = WHOLE) -> Iterator[RawRow]:
    """Yield the rows of a file; a row that cannot be parsed comes with its problem and its text as value.

    Raises:
        DataError: the file as a whole cannot be read: its encoding, its syntax, no row that parses.
    """
    assert span == WHOLE or file.kind in (*BYTE_KINDS, "parquet", "arrow"), f"{file.path}: {span} of a {file.kind} file"
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
            return read_json(path) if span == WHOLE else read_json_list(path, span)
        case "jsonl":
            return read_json_lines(path, span)
        case "jsonl.gz" | "jsonl.zst":
            return read_stream(path, STREAMS[path.suffix.lower()])
        case "csv":
            return read_csv(path, ",", span)
        case "tsv":
            return read_csv(path, "\t", span)
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
