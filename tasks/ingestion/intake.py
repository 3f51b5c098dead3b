"""Reading a dataset's files into conversations and rejects; every row becomes the one or the other."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from tasks.ingestion.conversations import convert_row
from tasks.ingestion.files import Source, SourceFile
from tasks.ingestion.formats import ROWS_LOOKED_AT, Layout, Reading, find_layout
from tasks.ingestion.identity import Conversation, make_conversation
from tasks.ingestion.messages import alternate_strictly
from tasks.ingestion.readers import RawRow, read_rows
from tasks.ingestion.rejects import DataError, Reject, RowError, make_reject
from tasks.ingestion.screening import Screen


@dataclass
class Intake:
    """What came out of a dataset's files; num_rows = conversations + rejects."""

    name: str = ""
    """The dataset's name for people, without the folders above it."""
    num_rows: int = 0
    conversations: list[Conversation] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    """By file: name, rows, and the format and columns it was read by."""
    unused: Counter[str] = field(default_factory=Counter)
    """What the data has and nobody reads, with the number of its rows or messages."""
    warnings: list[str] = field(default_factory=list)
    num_odd_turns: int = 0
    """Conversations whose turns do not alternate strictly, where the reading asks for the number."""


def take_in(
    sources: Sequence[Source],
    reading: Reading,
    max_rows: int | None = None,
    *,
    seed: int = 0,
    screen: Screen = "off",
) -> Intake:
    """Read the files of all sources in order, at most `max_rows` rows from the front.

    Args:
        sources: where the rows are; one may bring its own way of reading, and a number of rows to be chosen.
        reading: how rows are read otherwise.
        max_rows: no limit when None.
        seed: of the choice of `num_samples` rows.
        screen: what is done about personal data and secrets.

    Raises:
        DataError: a file cannot be read, its columns fit no format, or there is no row at all.
    """
    whole = Intake()
    for source in sources:
        left = None if max_rows is None else max_rows - whole.num_rows
        if left == 0:
            break
        intake = _take_in_source(source, source.reading or reading, left, screen)
        if source.num_samples is not None:
            _choose_samples(intake, source.num_samples, source.label, seed)
        whole.num_rows += intake.num_rows
        for name in ("conversations", "rejects", "files", "warnings"):
            getattr(whole, name).extend(getattr(intake, name))
        whole.unused.update(intake.unused)
    assert whole.num_rows == len(whole.conversations) + len(whole.rejects)
    return whole


def _take_in_source(source: Source, reading: Reading, max_rows: int | None, screen: Screen) -> Intake:
    """Read the files of one source."""
    intake = Intake(warnings=list(source.warnings))
    for file in source.files:
        left = None if max_rows is None else max_rows - intake.num_rows
        if left == 0:
            break
        rows = islice(read_rows(file), left)
        before = intake.num_rows
        layout = _take_in_file(intake, file, rows, reading, screen)
        intake.files.append(
            {
                "name": file.name,
                "num_rows": intake.num_rows - before,
                "format": layout.format if layout else None,
                "columns": layout.columns if layout else {},
            }
        )
    if not intake.num_rows:
        raise DataError(f"{source.label}: empty, there is no row in it: give a dataset with at least two rows")
    empty = [entry["name"] for entry in intake.files if not entry["num_rows"]]
    if empty:
        intake.warnings.append(f"{len(empty)} file(s) without a row: {', '.join(empty[:10])}")
    if intake.num_odd_turns:
        intake.warnings.append(
            f"{source.label}: {intake.num_odd_turns} row(s) whose turns do not alternate strictly are kept here; "
            "LLaMA-Factory would drop them without a word"
        )
    return intake


def _take_in_file(
    intake: Intake, file: SourceFile, rows: Iterator[RawRow], reading: Reading, screen: Screen
) -> Layout | None:
    """Convert the rows of one file, after finding its layout in the first ones."""
    first = list(islice(rows, ROWS_LOOKED_AT))
    layout = find_layout([row.value for row in first if row.problem is None], reading, str(file.path))
    invented_nulls = file.kind in ("parquet", "arrow")
    for row in chain(first, rows):
        intake.num_rows += 1
        try:
            if row.problem is not None:
                raise row.problem
            if layout is None:
                layout = find_layout([row.value], reading, str(file.path))
            if layout is None:
                raise RowError("not_an_object", f"the row is of type {type(row.value).__name__}: an object is wanted")
            messages, tools = convert_row(row.value, layout, invented_nulls=invented_nulls, unused=intake.unused)
            intake.conversations.append(make_conversation(messages, tools, file.name, row.line, screen))
            intake.num_odd_turns += reading.strict_turns and not alternate_strictly(messages)
        except RowError as error:
            intake.rejects.append(make_reject(file.name, row.line, error, row.value, screen))
    return layout


def _choose_samples(intake: Intake, num_samples: int, label: str, seed: int) -> None:
    """Keep `num_samples` of the rows, rejects included, by the rank of seed and place; the others were not read."""
    if num_samples > intake.num_rows:
        intake.warnings.append(
            f"{label}: num_samples is {num_samples} and there are {intake.num_rows} rows: each is taken once, "
            "no copies are made"
        )
        return

    def rank(row: Conversation | Reject) -> bytes:
        return hashlib.sha256(f"{seed}:{row.source}:{row.line}".encode()).digest()

    rows: list[Conversation | Reject] = [*intake.conversations, *intake.rejects]
    chosen = {rank(row) for row in sorted(rows, key=rank)[:num_samples]}
    intake.conversations = [row for row in intake.conversations if rank(row) in chosen]
    intake.rejects = [row for row in intake.rejects if rank(row) in chosen]
    intake.num_rows = num_samples
