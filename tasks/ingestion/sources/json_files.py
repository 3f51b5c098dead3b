"""Rows out of JSON: a list, one object, or a value a line; every error is `json`'s."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tasks.ingestion.errors import DataError, RowError
from tasks.ingestion.sources.columnar import WHOLE, FileSpan, RawRow
from tasks.ingestion.sources.encodings import UTF8_BOM, check_start, decode, read_text
from tasks.ingestion.sources.json_lists import READ_BYTES, ListError, parse_part, read_list
from tasks.jsontext import NotFast, parse_fast

PARSED_WHOLE_BYTES = 16 << 20
"""A JSON file above this is read some rows at a time, which takes longer."""
MOST_LINE_BYTES = 256 << 20
"""Of a row: no model reads so much, and parsers die where no memory is left for a longer one."""
_SHOWN_BYTES = 1000


def read_json(path: Path) -> Iterator[RawRow]:
    """Read a list of rows, one object (a single row), or in truth one object a line."""
    if path.stat().st_size > PARSED_WHOLE_BYTES and (read := _choose_reading(path)) is not None:
        yield from read
        return
    data = path.read_bytes()
    try:
        value = parse_fast(data)
    except NotFast:
        del data
        value = _parse_exactly(path)
    if value is NOT_ONE_VALUE:
        yield from read_json_lines(path, WHOLE)
    elif value is not NO_VALUE:
        for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
            yield RawRow(number, row)


def _choose_reading(path: Path) -> Iterator[RawRow] | None:
    """Return the rows of a list or of lines, read some at a time; None for what is neither."""
    with path.open("rb") as handle:
        head = handle.read(READ_BYTES)
    check_start(path, head)
    if _begins_lines(head):
        return read_json_lines(path, WHOLE)
    return read_json_list(path, WHOLE) if begins_list(head) else None


def begins_list(head: bytes) -> bool:
    """Tell by a file's first READ_BYTES whether it is one list, of rows that need not be parsed at once."""
    return not _begins_lines(head) and head.removeprefix(UTF8_BOM).lstrip().startswith(b"[")


def _begins_lines(head: bytes) -> bool:
    """Tell whether the first line is a value, and not the last one."""
    line, _, rest = head.removeprefix(UTF8_BOM).lstrip().partition(b"\n")
    return bool(rest.strip()) and _parses(line.decode("utf-8", "replace"))


def read_json_list(path: Path, span: FileSpan) -> Iterator[RawRow]:
    """Read a list of rows or a part of one, some at a time; a part of usual size at once, which is faster."""

    def explain(data: bytes, offset: int, line: int) -> NoReturn:
        decode(path, data, offset, line)
        raise AssertionError(f"{path}: {data!r} is UTF-8")

    try:
        with path.open("rb") as handle:
            if span.start == 0:
                check_start(path, handle.read(64))
            handle.seek(span.start)
            source: BinaryIO = handle
            rows: Iterable[Any] | None = None
            if span.stop is not None or (span.start and path.stat().st_size - span.start <= 2 * PARSED_WHOLE_BYTES):
                data = handle.read(-1 if span.stop is None else span.stop - span.start)
                rows = parse_part(data, is_first=span.start == 0, is_last=span.stop is None)
                source = io.BytesIO(data)
            rows = read_list(source, explain, span) if rows is None else rows
            yield from (RawRow(number, row) for number, row in enumerate(rows, start=span.first_row))
    except RecursionError:
        raise _describe_nesting(path) from None
    except ListError as error:
        raise _describe_broken(path, error) from None
    except DataError:
        raise
    except ValueError as error:
        raise _describe_number(path, error) from None


NO_VALUE, NOT_ONE_VALUE = object(), object()


def _parse_exactly(path: Path) -> Any:
    """Parse a whole JSON file, or tell that it holds nothing, or several values."""
    text = read_text(path)
    if not text.strip():
        return NO_VALUE
    try:
        return json.loads(text)
    except RecursionError:
        raise _describe_nesting(path) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _parses(text.lstrip().split("\n", 1)[0]):
            return NOT_ONE_VALUE
        near = text[max(0, error.pos - 30) : error.pos + 30].replace("\n", "⏎")
        raise _describe_broken(path, ListError(error.msg, error.lineno, error.colno, near)) from None
    except ValueError as error:
        raise _describe_number(path, error) from None


def _describe_nesting(path: Path) -> DataError:
    return DataError(f"{path}: the JSON is nested too deeply to be read: flatten it")


def _describe_number(path: Path, error: ValueError) -> DataError:
    return DataError(
        f"{path}: a number that cannot be read ({error}): write it as text; where one row may be lost, save one "
        "object a line as .jsonl"
    )


def _describe_broken(path: Path, error: ListError) -> DataError:
    return DataError(
        f"{path}: broken JSON on line {error.line}, column {error.column} ({error.what}) near {error.near!r}: "
        "repair the file; where one row may be lost, save one object a line as .jsonl"
    )


def _parses(line: str) -> bool:
    """Tell whether the line alone is JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_stream(path: Path, compression: str) -> Iterator[RawRow]:
    """Read one JSON value a line of a compressed file; places are those of its content."""
    import pyarrow as pa  # type: ignore[import-untyped]

    try:
        with pa.input_stream(str(path), compression=compression) as stream:
            yield from _read_lines(io.BufferedReader(stream, READ_BYTES), path, WHOLE)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut short ({error}): write it again") from None


def read_json_lines(path: Path, span: FileSpan) -> Iterator[RawRow]:
    """Read one JSON value a line; blank lines are no rows. Only line feeds end a line."""
    with path.open("rb") as handle:
        handle.seek(span.start)
        yield from _read_lines(handle, path, span)


def _read_lines(handle: BinaryIO, path: Path, span: FileSpan) -> Iterator[RawRow]:
    offset, num_rows, num_broken, first = span.start, 0, 0, ""
    for line, (data, num_bytes) in enumerate(_list_lines(handle), start=span.first_row):
        if span.stop is not None and offset >= span.stop:
            break
        start = offset
        offset += num_bytes
        if start == 0:
            check_start(path, data[:64])
            start += len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0
            data = data.removeprefix(UTF8_BOM)
        if num_bytes > MOST_LINE_BYTES and b"\0" not in data:
            num_rows += 1
            told = f"line {line} has {num_bytes:,} bytes, and {MOST_LINE_BYTES:,} are read at most: cut the row up"
            yield RawRow(line, data[:_SHOWN_BYTES].decode("utf-8", "replace"), RowError("too_large", told))
            continue
        try:
            yield RawRow(line, parse_fast(data))
            num_rows += 1
            continue
        except NotFast:
            if b"\0" in data:  # no JSON: a hole that a crash left, and it may be gigabytes long
                data = data[: data.index(b"\0") + 1]
            text = decode(path, data, start, line).strip()
        if not text:
            continue
        num_rows += 1
        try:
            yield RawRow(line, json.loads(text))
        except (ValueError, RecursionError) as error:  # ValueError alone: an integer of too many digits
            num_broken += 1
            where = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
            first = first or f"broken JSON on line {line}, {where}"
            yield RawRow(line, text, RowError("broken_json", f"broken JSON on line {line}, {where}"))
    if span == WHOLE and num_rows and num_broken == num_rows:
        raise_no_json(path, first)


def _list_lines(handle: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Give each line with its size in bytes; of one that is longer than is read, its beginning."""
    while data := handle.readline(MOST_LINE_BYTES):
        num_bytes = len(data)
        while num_bytes >= MOST_LINE_BYTES and not data.endswith(b"\n") and (rest := handle.readline(READ_BYTES)):
            num_bytes += len(rest)
            if rest.endswith(b"\n"):
                break
        yield data, num_bytes


def raise_no_json(path: Path, first: str) -> NoReturn:
    """Refuse a file of lines none of which is JSON; `first` says what is wrong with the first one."""
    raise DataError(
        f"{path}: no line is JSON ({first}): one JSON object a line is wanted; "
        "a file that is one JSON list must be named .json"
    )
