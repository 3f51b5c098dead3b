"""Rows out of files, one at a time: JSON, JSONL, CSV, TSV, Parquet and Arrow.

JSON is never parsed through Arrow, which would merge the objects of all rows into one struct and give each the
others' keys as nulls. Every error is `json`'s.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tasks.ingestion.columnar import WHOLE, RawRow, Span, read_arrow, read_parquet
from tasks.ingestion.files import SourceFile
from tasks.ingestion.rejects import DataError, RowError
from tasks.jsontext import NotFast, parse_fast

UTF8_BOM = b"\xef\xbb\xbf"
# UTF-32 first: its little-endian mark begins with UTF-16's.
OTHER_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_rows(file: SourceFile, span: Span = WHOLE) -> Iterator[RawRow]:
    """Yield the rows of a file; a row that cannot be parsed comes with its problem and its text as value.

    Raises:
        DataError: the file as a whole cannot be read: its encoding, its syntax, no row that parses.
    """
    assert span == WHOLE or file.kind in ("jsonl", "parquet", "arrow"), f"{file.path}: {span} of a {file.kind} file"
    match file.kind:
        case "json":
            return _read_json(file.path)
        case "jsonl":
            return _read_json_lines(file.path, span)
        case "csv":
            return _read_csv(file.path, ",")
        case "tsv":
            return _read_csv(file.path, "\t")
        case "parquet":
            return read_parquet(file.path, span)
        case _:
            return read_arrow(file.path, span)


def _check_start(path: Path, head: bytes) -> None:
    """Refuse the byte order marks of other encodings, and the zero bytes of UTF-16 without one."""
    for mark, encoding in OTHER_BOMS.items():
        if head.startswith(mark):
            raise DataError(
                f"{path}: not UTF-8: byte 1 (offset 0) is 0x{head[0]:02X}, which begins {encoding}: save it as UTF-8"
            )
    if b"\0" in head[:64]:
        offset = head.index(b"\0")
        raise DataError(
            f"{path}: not UTF-8: byte {offset + 1} (offset {offset}) is 0x00: save it as UTF-8 (is it UTF-16?)"
        )


def _decode(path: Path, data: bytes, offset: int, line: int) -> str:
    """Decode UTF-8; name the byte, its offset in the file and its line when that is not possible."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        place = offset + error.start
        raise DataError(
            f"{path}: not UTF-8: byte {place + 1} (offset {place}) is 0x{data[error.start]:02X}, on line {line}: "
            "save the file as UTF-8, such as by iconv -f GB18030 -t UTF-8 (with the encoding it has)"
        ) from None


def _read_text(path: Path) -> str:
    """Read a whole UTF-8 file, without its byte order mark."""
    data = path.read_bytes()
    _check_start(path, data[:64])
    start = len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0
    return _decode(path, data[start:], start, 1)


def _read_json(path: Path) -> Iterator[RawRow]:
    """Read a list of rows, one object (a single row), or in truth one object a line."""
    data = path.read_bytes()
    try:
        value = parse_fast(data)
    except NotFast:
        del data
        value = _parse_exactly(path)
    if value is NOT_ONE_VALUE:
        yield from _read_json_lines(path, WHOLE)
    elif value is not NO_VALUE:
        for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
            yield RawRow(number, row)


NO_VALUE, NOT_ONE_VALUE = object(), object()


def _parse_exactly(path: Path) -> Any:
    """Parse a whole JSON file, or tell that it holds nothing, or several values."""
    text = _read_text(path)
    if not text.strip():
        return NO_VALUE
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{path}: the JSON is nested too deeply to be read: flatten it") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _parses(text.lstrip().split("\n", 1)[0]):
            return NOT_ONE_VALUE
        near = text[max(0, error.pos - 30) : error.pos + 30].replace("\n", "⏎")
        raise DataError(
            f"{path}: broken JSON on line {error.lineno}, column {error.colno} ({error.msg}) near {near!r}: "
            "repair the file; where one row may be lost, save one object a line as .jsonl"
        ) from None


def _parses(line: str) -> bool:
    """Tell whether the line alone is JSON."""
    try:
        json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _read_json_lines(path: Path, span: Span) -> Iterator[RawRow]:
    """Read one JSON value a line; blank lines are no rows. Only line feeds end a line."""
    offset, num_rows, num_broken, first = span.start, 0, 0, ""
    with path.open("rb") as handle:
        handle.seek(span.start)
        for line, data in enumerate(handle, start=span.first_row):
            if span.stop is not None and offset >= span.stop:
                break
            start = offset
            offset += len(data)
            if start == 0:
                _check_start(path, data[:64])
                start += len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0
                data = data.removeprefix(UTF8_BOM)
            try:
                yield RawRow(line, parse_fast(data))
                num_rows += 1
                continue
            except NotFast:
                text = _decode(path, data, start, line).strip()
            if not text:
                continue
            num_rows += 1
            try:
                yield RawRow(line, json.loads(text))
            except (json.JSONDecodeError, RecursionError) as error:
                num_broken += 1
                where = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
                first = first or f"broken JSON on line {line}, {where}"
                yield RawRow(line, text, RowError("broken_json", f"broken JSON on line {line}, {where}"))
    if span == WHOLE and num_rows and num_broken == num_rows:
        raise_no_json(path, first)


def raise_no_json(path: Path, first: str) -> NoReturn:
    """Refuse a file of lines none of which is JSON; `first` says what is wrong with the first one."""
    raise DataError(
        f"{path}: no line is JSON ({first}): one JSON object a line is wanted; "
        "a file that is one JSON list must be named .json"
    )


def _read_csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    """Read rows under a header; values stay text, and quoted ones may go over several lines."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than a long answer
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
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
