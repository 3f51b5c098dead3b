"""Finds where elements of a JSON list and rows of a CSV file begin, without parsing them, in one pass over the bytes.

Up to the first error of the syntax the places are those where a parser would be, so that what parses a part finds there
what it would find in the whole file, that error included. The oracle is a state machine of one byte after the other, in
the tests.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.ingestion.sources.encodings import UTF8_BOM

_Places = npt.NDArray[np.int64]
_QUOTE, _BACKSLASH, _COMMA, _FEED, _RETURN = b'"\\,\n\r'
# By how much a byte changes the depth.
_STEPS = np.zeros(256, np.int64)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_IS_MARK = _STEPS != 0
_IS_MARK[_COMMA] = True


class Start(NamedTuple):
    """Where a part of a file may begin."""

    place: int
    """Its first byte in the file."""
    row: int
    """Number of its first element or row, from 1."""
    line: int
    """Of its first character, from 1, as is `column`."""
    column: int
    header_bytes: int = 0
    """Those at the front of the file that have the header of its rows."""


def find_list_starts(blocks: Iterable[bytes], targets: Sequence[int], size: int) -> list[Start]:
    """Return the first element behind the first one that begins at or behind each target; each once.

    Args:
        blocks: the bytes of a file that begins with a list, after spaces and a byte order mark or none.
        targets: places in the file, ascending.
        size: the file's.
    """
    choice, line, column = _Choice(targets, size), 1, 1
    depth, in_string, row = 0, False, 2
    for block, base in _cut(blocks, b"\\", hold_all=True):
        data = np.frombuffer(block, np.uint8)
        quotes = _find_quotes(data)
        marks = np.flatnonzero(_IS_MARK[data])
        marks = marks[(np.searchsorted(quotes, marks) + in_string) % 2 == 0]
        depths = depth + np.cumsum(_STEPS[data[marks]])
        ends = np.flatnonzero(depths <= 0)
        is_separator = (data[marks] == _COMMA) & (depths == 1)
        is_separator[ends[0] if len(ends) else len(marks) :] = False
        places = marks[is_separator] + 1

        def locate(place: int, block: bytes = block, line: int = line, column: int = column) -> tuple[int, int, int]:
            return (*_go_on(block[:place], line, column), 0)

        choice.take(base, places, row + np.arange(len(places)), locate)
        if len(ends) or not choice.targets:
            break
        line, column = _go_on(block, line, column)
        row += len(places)
        in_string ^= len(quotes) % 2 == 1
        depth = int(depths[-1]) if len(depths) else depth
    return choice.starts


def _find_quotes(data: npt.NDArray[np.uint8]) -> _Places:
    """Return the places of the quotes that no backslash stands before, or an even number of them."""
    is_quote = data == _QUOTE
    backslashes = np.flatnonzero(data == _BACKSLASH)
    if len(backslashes):
        breaks = np.flatnonzero(np.diff(backslashes) > 1)
        first, last = backslashes[np.r_[0, breaks + 1]], backslashes[np.r_[breaks, len(backslashes) - 1]]
        escaped = last[(last - first) % 2 == 0] + 1
        is_quote[escaped[escaped < len(data)]] = False
    return np.flatnonzero(is_quote)


def _go_on(block: bytes, line: int, column: int) -> tuple[int, int]:
    """Return line and column of the character behind a block."""
    last = block.rfind(b"\n")
    bytes_ = np.frombuffer(block, np.uint8)[last + 1 :]
    length = int(np.count_nonzero((bytes_ & 0xC0) != 0x80))  # a character's further bytes begin with the bits 10
    return (line, column + length) if last < 0 else (line + block.count(b"\n"), 1 + length)


def find_csv_starts(blocks: Iterable[bytes], targets: Sequence[int], size: int, delimiter: str) -> list[Start]:
    r"""Return the first row behind the first one that begins at or behind each target, and after \n; each once.

    Args:
        blocks: the bytes of a file with a header.
        targets: places in the file, ascending.
        size: the file's.
        delimiter: between values; a byte.
    """
    choice, quotation, lines = _Choice(targets, size), _Quotation(ord(delimiter)), 1
    row_start, num_rows, header_bytes = None, 0, 0
    for block, base in _cut(blocks, b"\r"):
        row_start = base if row_start is None else row_start
        was_inside = quotation.is_open
        quotes = quotation.take(block)
        starts, stops, is_feed = _find_line_ends(np.frombuffer(block, np.uint8))
        outside = (np.searchsorted(quotes, stops - 1) + was_inside) % 2 == 0
        starts, stops, is_feed = starts[outside], stops[outside], is_feed[outside]
        is_row = starts > np.r_[row_start - base, stops[:-1]][: len(stops)]  # an empty line is none
        rows = num_rows + np.cumsum(is_row)
        if not header_bytes and len(rows) and rows[-1]:
            header_bytes = base + int(stops[np.flatnonzero(is_row)[0]])
        may_begin = is_feed & (rows >= 2)  # behind the header and a row

        def locate(
            place: int, block: bytes = block, lines: int = lines, header: int = header_bytes
        ) -> tuple[int, int, int]:
            return lines + _count_line_ends(block[:place]), 1, header

        choice.take(base, stops[may_begin], rows[may_begin], locate)
        if not choice.targets:
            break
        lines += _count_line_ends(block)
        if len(stops):
            row_start, num_rows = base + int(stops[-1]), int(rows[-1])
    return choice.starts


class _Quotation:
    """Follows the quotes of CSV, block by block."""

    def __init__(self, delimiter: int) -> None:
        self.is_open = False
        self._openers = frozenset((delimiter, _FEED, _RETURN))
        self._before = _FEED
        self._closed_at_end = False

    def take(self, block: bytes) -> _Places:
        """Return the places of the quotes that open or close a value, or are half of a doubled one.

        In a value that began without a quote, one is a character as any other.
        """
        quotes: list[int] = []
        closed = -1 if self._closed_at_end else -2
        for place in np.flatnonzero(np.frombuffer(block, np.uint8) == _QUOTE).tolist():
            before = block[place - 1] if place else self._before
            if self.is_open:
                self.is_open, closed = False, place
            elif before in self._openers or closed == place - 1:
                self.is_open = True
            else:
                continue
            quotes.append(place)
        self._before, self._closed_at_end = block[-1], closed == len(block) - 1
        return np.array(quotes, np.int64)


def _find_line_ends(data: npt.NDArray[np.uint8]) -> tuple[_Places, _Places, npt.NDArray[np.bool_]]:
    r"""Return where ends of lines (\n, \r\n, \r) begin and stop, and which of them have a line feed."""
    feeds, returns = np.flatnonzero(data == _FEED), np.flatnonzero(data == _RETURN)
    if not len(returns):
        return feeds, feeds + 1, np.ones(len(feeds), bool)
    has_return = np.isin(feeds - 1, returns, assume_unique=True)
    alone = np.setdiff1d(returns, feeds - 1, assume_unique=True)
    starts, stops = np.r_[feeds - has_return, alone], np.r_[feeds, alone] + 1
    order = np.argsort(stops)
    return starts[order], stops[order], order < len(feeds)


def _count_line_ends(block: bytes) -> int:
    return block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")


class _Choice:
    """The first of the places at or behind each target."""

    def __init__(self, targets: Sequence[int], size: int) -> None:
        self.targets, self.starts = list(targets), list[Start]()
        self._size = size

    def take(self, base: int, places: _Places, rows: _Places, locate: Callable[[int], tuple[int, int, int]]) -> None:
        """Choose among the places of a block that begins at `base`; `locate` gives the rest of a start."""
        while self.targets:
            found = int(np.searchsorted(places, self.targets[0] - base))
            if found == len(places) or base + places[found] >= self._size:  # nothing begins at the file's end
                return
            place = int(places[found])
            self.starts.append(Start(base + place, int(rows[found]), *locate(place)))
            self.targets = [target for target in self.targets if target > base + place]


def _cut(blocks: Iterable[bytes], held: bytes, *, hold_all: bool = False) -> Iterator[tuple[bytes, int]]:
    """Yield the blocks with their places, without a byte order mark; a byte at the end goes to the next block.

    Args:
        blocks: of any size.
        held: the byte that is not seen without what comes behind it.
        hold_all: all of them at the end, not only the last one.
    """
    kept, base, is_front = b"", 0, True
    for block in blocks:
        joined = kept + block
        if is_front and len(joined) < len(UTF8_BOM):
            kept = joined
            continue
        if is_front and joined.startswith(UTF8_BOM):
            joined, base = joined[len(UTF8_BOM) :], len(UTF8_BOM)
        is_front = False
        whole = joined.rstrip(held) if hold_all else joined.removesuffix(held)
        kept = joined[len(whole) :]
        if whole:
            yield whole, base
            base += len(whole)
    if kept:
        yield kept, base
