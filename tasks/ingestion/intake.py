"""Reads a shard: every row becomes a conversation or a reject."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import polars as pl

from tasks.ingestion.errors import RowError
from tasks.ingestion.pieces import PIECE_ROWS, Compression, write_piece, write_summary
from tasks.ingestion.rejects import Reject, make_reject
from tasks.ingestion.rows.conversations import Converted, convert_row
from tasks.ingestion.rows.identity import UsableRow, make_conversation, make_plain_conversation
from tasks.ingestion.rows.layouts import Layout
from tasks.ingestion.rows.matching import ROWS_LOOKED_AT, find_layout
from tasks.ingestion.rows.messages import alternate_strictly
from tasks.ingestion.rows.quality import ODD
from tasks.ingestion.rows.screening import SUSPECT, Screen
from tasks.ingestion.shards import Shard, ShardPart
from tasks.ingestion.sources.columnar import RawRow
from tasks.ingestion.sources.readers import read_rows

BLOCK_ROWS = 2000


@dataclass
class FileStats:
    """What came out of a part of a file; num_rows = conversations + rejects."""

    dataset: int
    source: int
    name: str
    path: str
    divided: bool
    """It is not the whole file."""
    num_rows: int = 0
    num_rejects: int = 0
    first_broken: str = ""
    """What is wrong with the first line that is no JSON."""
    num_broken: int = 0
    layout: tuple[str, dict[str, str]] | None = None
    """The format and columns it was read by."""
    unused: Counter[str] = field(default_factory=Counter)
    """What the data has and nobody reads, with the number of its rows or messages."""
    num_odd_turns: int = 0
    """Conversations whose turns do not alternate strictly, where the reading asks for the number."""


def read_shard(
    shard: Shard, folder: Path, max_rows: int | None = None, *, compression: Compression = "uncompressed"
) -> int:
    """Read a shard's rows and write them to a folder, which is made; a finished one is left as it is.

    Args:
        shard: what is read.
        folder: where the rows are written.
        max_rows: at most so many are read; None for all.
        compression: of the rows.

    Returns:
        The number of rows that were read.

    Raises:
        DataError: a file cannot be read, or its columns fit no format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[FileStats] = []
    conversations: list[UsableRow] = []
    rejects: list[Reject] = []
    num_rows, num_pieces = 0, 0
    for part in shard.parts:
        left = None if max_rows is None else max_rows - num_rows
        if left == 0:
            break
        intake = FileStats(part.dataset, part.source, part.file.name, part.file.shown, part.layout is not None)
        parts.append(intake)
        for block in _take_in(intake, part, left, shard.screen):
            conversations += block[0]
            rejects += block[1]
            if len(conversations) + len(rejects) >= PIECE_ROWS:
                write_piece(folder, num_pieces, conversations, rejects, compression=compression)
                num_pieces += 1
                conversations, rejects = [], []
        num_rows += intake.num_rows
    if conversations or rejects:
        write_piece(folder, num_pieces, conversations, rejects, compression=compression)
        num_pieces += 1
    write_summary(folder, [vars(part) for part in parts], num_pieces)
    return num_rows


Block = tuple[list[UsableRow], list[Reject]]


def _take_in(intake: FileStats, part: ShardPart, max_rows: int | None, screen: Screen) -> Iterator[Block]:
    """Convert the rows of one part block by block, after finding its layout in the first ones."""
    where, name = part.file.shown, part.file.name
    rows: Iterator[RawRow] = islice(read_rows(part.file, part.span), max_rows)
    first: list[RawRow] = []
    layout = part.layout
    if layout is None:
        first = list(islice(rows, ROWS_LOOKED_AT))
        layout = find_layout([row.value for row in first if row.problem is None], part.reading, where)
    invented_nulls = part.file.kind in ("parquet", "arrow")
    strict = part.reading.strict_turns
    rows = chain(first, rows)
    while block := list(islice(rows, BLOCK_ROWS)):
        intake.num_rows += len(block)
        converted: list[ConvertedRow] = []
        rejects: list[Reject] = []
        for row in block:
            try:
                if row.problem is not None:
                    raise row.problem
                if layout is None:
                    layout = find_layout([row.value], part.reading, where)
                made = _convert(row.value, layout, invented_nulls, intake.unused)
                converted.append((row, made))
                intake.num_odd_turns += strict and not alternate_strictly(made.messages)
            except RowError as error:
                rejects.append(make_reject(name, row.line, error, row.value, screen))
        conversations, unwritable = identify_rows(converted, name, screen)
        rejects += [make_reject(name, row.line, error, row.value, screen) for row, error in unwritable]
        rejects.sort(key=lambda reject: reject.line)
        _count_rejects(intake, rejects)
        intake.layout = None if layout is None else (layout.format, layout.columns)
        yield conversations, rejects


ConvertedRow = tuple[RawRow, Converted]


def _convert(value: Any, layout: Layout | None, invented_nulls: bool, unused: Counter[str]) -> Converted:
    """Turn a row into messages and tools."""
    if layout is None:
        raise RowError("not_an_object", f"the row is of type {type(value).__name__}: an object is wanted")
    try:
        return convert_row(value, layout, invented_nulls=invented_nulls, unused=unused)
    except RecursionError:
        raise RowError("bad_message", "the row is nested too deeply") from None


def _count_rejects(intake: FileStats, rejects: Sequence[Reject]) -> None:
    """Count a block's rejects, and keep the first line that is no JSON."""
    intake.num_rejects += len(rejects)
    broken = [reject.detail for reject in rejects if reject.reason == "broken_json"]
    intake.num_broken += len(broken)
    if broken and not intake.first_broken:
        intake.first_broken = broken[0]


def identify_rows(
    rows: Sequence[ConvertedRow], source: str, screen: Screen
) -> tuple[list[UsableRow], list[tuple[RawRow, RowError]]]:
    """Do what make_conversation does, for many rows: those that nothing is in are looked at once, all together.

    Returns:
        The conversations, and the rows that cannot be written with the reason.
    """
    made: list[UsableRow | None] = [
        make_plain_conversation(found.messages, source, row.line) if found[1:] == (None, None) else None
        for row, found in rows
    ]
    pattern = ODD if screen == "off" else f"{SUSPECT}|{ODD}"
    texts = pl.Series([None if row is None else row.messages for row in made], dtype=pl.String)
    slow = texts.str.contains(pattern).fill_null(True).arg_true().to_list()
    unwritable = []
    for place in slow:
        row, (messages, tools, rejected) = rows[place]
        made[place] = None
        try:
            made[place] = make_conversation(messages, tools, source, row.line, screen, rejected)
        except RowError as error:
            unwritable.append((row, error))
    return [row for row in made if row is not None], unwritable
