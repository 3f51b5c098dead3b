"""Tables in and out: conversations of a dataset read in batches, examples laid out as Arrow columns."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from schemas.records import Conversations, Examples
from tasks.tokenization.errors import MaskError
from tasks.tokenization.masking import Conversation, Example, Masked
from tasks.tokenization.templates import PreparedTokenizer

_ROWS_PER_BATCH = 1000
EXAMPLE_SCHEMA = pa.schema(
    [
        ("example_id", pa.large_string()),
        ("question", pa.large_string()),
        ("reference", pa.large_string()),
        ("input_ids", pa.large_list(pa.int32())),
        ("labels", pa.large_list(pa.int32())),
    ]
)


class Row(NamedTuple):
    """A row of a dataset's table, with its conversation parsed."""

    example_id: str
    source: str
    line: int
    raw: str
    conversation: Conversation


def read_rows(path: Path) -> Iterator[list[Row]]:
    """Read a part's table in batches, validated."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_PER_BATCH):
        frame = pl.DataFrame(pa.Table.from_batches([batch]))
        Conversations.validate(frame)
        rows = []
        for example_id, source, line, messages, tools in frame.select(
            "example_id", "source", "line", "messages", "tools"
        ).iter_rows():
            definitions = json.loads(tools) if tools else None
            conversation = Conversation(json.loads(messages), definitions or None)
            rows.append(Row(example_id, source, line, messages, conversation))
        yield rows


def lay_out(rows: Sequence[Row], outcomes: Sequence[Masked | MaskError], prepared: PreparedTokenizer) -> pa.Table:
    """Lay a batch's examples out as Arrow columns."""
    made = [
        (row, example)
        for row, outcome in zip(rows, outcomes, strict=True)
        if isinstance(outcome, Masked)
        for example in outcome.examples
    ]
    references = [_reference(row, example, prepared) for row, example in made]
    frame = pl.DataFrame(
        {
            "example_id": [row.example_id for row, _ in made],
            "question": [_question(row, example) for row, example in made],
            "reference": references,
        },
        schema={"example_id": pl.String, "question": pl.String, "reference": pl.String},
    )
    Examples.validate(frame)
    offsets = np.cumsum([0, *(len(example.input_ids) for _, example in made)], dtype=np.int64)
    columns: list[Any] = [frame[name].to_arrow() for name in frame.columns]
    for lists in ([example.input_ids for _, example in made], [example.labels for _, example in made]):
        values = np.fromiter(chain.from_iterable(lists), dtype=np.int32, count=int(offsets[-1]))
        columns.append(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)))
    return pa.Table.from_arrays(
        [column.cast(field.type) for column, field in zip(columns, EXAMPLE_SCHEMA, strict=True)],
        schema=EXAMPLE_SCHEMA,
    )


def _question(row: Row, example: Example) -> str:
    """Return the last user message before the example's last answer."""
    for message in reversed(row.conversation.messages[: example.turns[-1]]):
        if message["role"] == "user":
            return str(message.get("content") or "")
    return ""


def _reference(row: Row, example: Example, prepared: PreparedTokenizer) -> str:
    """Return the example's last answer as a decoder without special tokens would give it."""
    content = row.conversation.messages[example.turns[-1]].get("content")
    if isinstance(content, str) and example.target.startswith(content):
        rest = example.target[len(content) :]
        if not rest or rest == prepared.end_of_turn:
            return content
    labels = example.labels
    start = len(labels)
    while start and labels[start - 1] >= 0:
        start -= 1
    text: Any = prepared.tokenizer.decode(labels[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
