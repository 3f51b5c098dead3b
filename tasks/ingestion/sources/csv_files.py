"""Rows out of CSV and TSV files, or out of a part of one, under the file's header."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tasks.ingestion.errors import DataError, RowError
from tasks.ingestion.sources.columnar import WHOLE, FileSpan, RawRow
from tasks.ingestion.sources.encodings import check_start, decode, read_text_lines


def read_csv(path: Path, delimiter: str, span: FileSpan) -> Iterator[RawRow]:
    """Read rows under a header; values stay text, and quoted ones may go over several lines."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than a long answer
    header = _read_header(path, delimiter, span.header_bytes) if span.header_bytes else None
    lines = read_text_lines(path) if span == WHOLE else _read_part_lines(path, span)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number, start = span.first_row - 1, span.first_line
    try:
        for values in reader:
            start, at = span.first_line + reader.line_num, start
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


def _read_header(path: Path, delimiter: str, num_bytes: int) -> list[str]:
    """Read the header, which the first bytes of a file have."""
    lines = _read_part_lines(path, FileSpan(0, num_bytes))
    return _check_header(path, next(filter(None, csv.reader(lines, delimiter=delimiter, strict=True))))


def _read_part_lines(path: Path, span: FileSpan) -> Iterator[str]:
    """Read the lines of a part with their ends, as `read_text_lines` does those of a file."""
    with path.open("rb") as handle:
        handle.seek(span.start)
        # The last part may be long, where a quote is not closed.
        part: BinaryIO = handle if span.stop is None else io.BytesIO(handle.read(span.stop - span.start))
        if span.start == 0:
            check_start(path, part.read(64))
            part.seek(0)
        try:
            with io.TextIOWrapper(part, encoding="utf-8" if span.start else "utf-8-sig", newline="") as lines:
                yield from lines
        except UnicodeDecodeError:
            offset = span.start
            with path.open("rb") as again:
                again.seek(offset)
                for line, data in enumerate(again, start=span.first_line):
                    decode(path, data, offset, line)
                    offset += len(data)
            raise
