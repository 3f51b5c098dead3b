"""A file that is one JSON list, read element by element, so that memory does not grow with the list."""

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from tasks.ingestion.sources.columnar import WHOLE, FileSpan
from tasks.ingestion.sources.encodings import UTF8_BOM
from tasks.jsontext import NotFast, parse_fast

READ_BYTES = 1 << 20
_SPACE = " \t\r\n"
# Where a value is cut off, json finds that out so near to the end, or within a string that does not end.
_LONGEST_LITERAL = len("-Infinity")
# A number that is cut off is one too, but for its last characters.
_LONGEST_REST = len("e+")


class ListError(ValueError):
    """What is wrong, with its place: `line` and `column` from 1, `near` the text around it."""

    def __init__(self, what: str, line: int, column: int, near: str) -> None:
        super().__init__(what, line, column, near)
        self.what, self.line, self.column, self.near = what, line, column, near


def parse_part(data: bytes, *, is_first: bool, is_last: bool) -> list[Any] | None:
    """Return the elements of a part of a list as `read_list` would give them; None where only that can tell.

    Args:
        data: one that is not the first begins behind a comma, and one that is not the last ends with one.
        is_first: it has the beginning of the list.
        is_last: it has the end.
    """
    front = data.removeprefix(UTF8_BOM) if is_first else b"[" + data
    try:
        values = parse_fast(front if is_last else front.removesuffix(b",") + b"]")
    except NotFast:
        return None
    # A part of none would be one between two commas, or behind the last one.
    return values if isinstance(values, list) and values else None


def read_list(file: BinaryIO, decode: Callable[[bytes, int, int], NoReturn], part: FileSpan = WHOLE) -> Iterator[Any]:
    """Yield the elements as json.loads would give them.

    Args:
        file: UTF-8 that begins with a list, after a byte order mark or none; or with a part of one.
        decode: raises the error of bytes that are not UTF-8, with their offset in the file and their line.
        part: which one; one that is not the first begins behind a comma, and one that is not the last ends with one.

    Raises:
        ListError: it is no JSON, or something comes after the list.
        RecursionError: an element is nested too deeply.
    """
    window = _Window(file, decode, part)
    if part.start == 0:
        window.expect("[")
    if part.start == 0 and window.peek() == "]":
        window.expect("]")
    else:
        while True:
            yield window.read_value()
            if window.peek() != ",":
                window.expect("]", "Expecting ',' delimiter")
                break
            window.expect(",")
            if part.stop is not None and not window.peek():
                break
    if window.peek():
        window.fail("Extra data", window.place)


class _Window:
    """The part of the text that is being looked at."""

    def __init__(self, file: BinaryIO, decode: Callable[[bytes, int, int], NoReturn], part: FileSpan) -> None:
        self.place = 0
        self._file = file
        self._explain = decode
        self._decoder = codecs.getincrementaldecoder("utf-8" if part.start else "utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text = ""
        self._line, self._column = part.first_line, part.first_column
        self._offset = part.start

    def peek(self) -> str:
        """Go to the next character that is no space, and return it; nothing at the end."""
        while True:
            while self.place < len(self._text) and self._text[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self._text):
                return self._text[self.place]
            if not self._fill():
                return ""

    def expect(self, character: str, otherwise: str = "Expecting value") -> None:
        """Go past a character."""
        if self.peek() != character:
            self.fail(otherwise, self.place)
        self.place += 1

    def read_value(self) -> Any:
        """Return the value that begins here, and go past it."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self.place)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - _LONGEST_LITERAL or error.msg.startswith("Unterminated string")
                length = error.pos - self.place
                if is_cut and self._fill():
                    continue
                self.fail(error.msg, self.place + length)
            is_cut, length = end >= len(self._text) - _LONGEST_REST, end - self.place
            if is_cut and self._fill():
                continue
            self.place += length
            return value

    def fail(self, what: str, place: int) -> NoReturn:
        """Say what is wrong at a place of the text."""
        line, column = self._locate(place)
        raise ListError(what, line, column, self._text[max(0, place - 30) : place + 30].replace("\n", "⏎"))

    def _locate(self, place: int) -> tuple[int, int]:
        """Return line and column of a place of the text, from 1."""
        num_lines = self._text.count("\n", 0, place)
        if not num_lines:
            return self._line, self._column + place
        return self._line + num_lines, place - self._text.rfind("\n", 0, place)

    def _fill(self) -> bool:
        """Forget what was gone past, and read as much again as is left, at least READ_BYTES; False at the end."""
        self._line, self._column = self._locate(self.place)
        self._text, self.place = self._text[self.place :], 0
        data = self._file.read(max(READ_BYTES, len(self._text)))
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # The decoder kept the beginning of a character of the last reading.
            held = len(error.object) - len(data)
            line, _ = self._locate(len(self._text))
            self._explain(error.object, self._offset - held, line)
        self._offset += len(data)
        return bool(data)
