"""Reads conversations of a dataset in batches, and lays examples out as Arrow columns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from schemas.records import Conversations, Examples, Rejects, columns_of
from tasks.jsontext import parse
from tasks.tokenization.labels import ID_TYPE, Example, make_labels
from tasks.tokenization.masking import Conversation

_ROWS_PER_BATCH = 2500
EXAMPLE_SCHEMA = pa.schema(
    [
        ("example_id", pa.large_string()),
        ("question", pa.large_string()),
        ("reference", pa.large_string()),
        ("input_ids", pa.large_list(pa.int32())),
        ("labels", pa.large_list(pa.int32())),
        # Of the labels; null where each weighs 1.
        ("weights", pa.large_list(pa.float32())),
        # Of the same prompt with the answer that is not preferred; null where the row is no pair.
        ("rejected_ids", pa.large_list(pa.int32())),
        ("rejected_labels", pa.large_list(pa.int32())),
    ]
)
REJECT_SCHEMA = columns_of(Rejects)


class Row(NamedTuple):
    """A row of a dataset's table, with its conversation parsed."""

    example_id: str
    source: str
    line: int
    raw: str
    conversation: Conversation
    rejected: Conversation | None = None
    """With the answer that is not preferred, where the row is a pair."""


def read_rows(path: Path, row_group: int) -> Iterator[list[Row]]:
    """Read a row group of a part's table in batches, validated."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_PER_BATCH, row_groups=[row_group]):
        frame = pl.DataFrame(pa.Table.from_batches([batch]))
        Conversations.validate(frame)
        rows = []
        for example_id, source, line, messages, tools, rejected in frame.select(
            "example_id", "source", "line", "messages", "tools", "rejected"
        ).iter_rows():
            definitions = (parse(tools) if tools else None) or None
            conversation = Conversation(parse(messages), definitions)
            other = Conversation(parse(rejected), definitions) if rejected else None
            rows.append(Row(example_id, source, line, messages, conversation, other))
        yield rows


@contextmanager
def open_batches(path: Path, schema: Any) -> Iterator[Any]:
    """Open an Arrow file for writing, as what lies between two processes: quick to write and to read again."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
        yield writer


def join_batches(paths: Sequence[Path], schema: Any, target: Path) -> None:
    """Write the batches of Arrow files as row groups of one table, one at a time."""
    # Ids and texts hardly repeat as wholes: dictionaries would cost time and room.
    with pq.ParquetWriter(target, schema, compression="zstd", use_dictionary=False) as writer:
        for path in paths:
            with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as batches:
                for number in range(batches.num_record_batches):
                    writer.write_batch(batches.get_batch(number))


class Columns(NamedTuple):
    """Examples end to end: `N` of them, with `S` tokens together."""

    offsets: NDArray[np.int64]
    """[N + 1]"""
    input_ids: NDArray[np.int32]
    """[S]"""
    labels: NDArray[np.int32]
    """[S]"""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, [N]."""
        return np.diff(self.offsets)


def join_examples(examples: Sequence[Example]) -> Columns:
    """Put examples end to end, with their labels."""
    input_ids = np.frombuffer(b"".join([example.ids for example in examples]), ID_TYPE)
    lengths = np.fromiter((len(example.ids) // ID_TYPE.itemsize for example in examples), np.int64, len(examples))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    numbers = np.fromiter((len(example.spans) for example in examples), np.int64, len(examples))
    borders = chain.from_iterable(chain.from_iterable(example.spans for example in examples))
    spans = np.fromiter(borders, np.int64, 2 * int(numbers.sum())).reshape(-1, 2)
    spans += np.repeat(offsets[:-1], numbers)[:, None]
    return Columns(offsets, input_ids, make_labels(input_ids, spans))


def lay_out(
    rows: Sequence[Row],
    examples: Sequence[Example],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    end_of_turn: str,
    rejected: Sequence[Example] = (),
) -> pa.Table:
    """Lay examples out as Arrow columns.

    Args:
        rows: The row that each example is of.
        examples: In order.
        columns: Of the examples.
        tokenizer: Decodes answers that are not in their conversation as they are said.
        end_of_turn: As the template writes it.
        rejected: One for each example, where rows are pairs.
    """
    pairs = list(zip(rows, examples, strict=True))
    frame = pl.DataFrame(
        {
            "example_id": [row.example_id for row in rows],
            "question": [_question(row, example) for row, example in pairs],
            "reference": [_reference(row, example, tokenizer, end_of_turn) for row, example in pairs],
        },
        schema={"example_id": pl.String, "question": pl.String, "reference": pl.String},
    )
    Examples.validate(frame)
    others = _make_lists(join_examples(rejected)) if rejected else [pa.nulls(len(rows), pa.large_list(pa.int32()))] * 2
    texts = [frame[name].to_arrow() for name in frame.columns]
    arrays = [*texts, *_make_lists(columns), _weigh(pairs, columns), *others]
    return pa.Table.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, EXAMPLE_SCHEMA, strict=True)], schema=EXAMPLE_SCHEMA
    )


def _make_lists(columns: Columns) -> list[Any]:
    """Return ids and labels, a list of each for each example."""
    offsets = pa.array(columns.offsets)
    return [pa.LargeListArray.from_arrays(offsets, pa.array(ids)) for ids in (columns.input_ids, columns.labels)]


def _weigh(pairs: Sequence[tuple[Row, Example]], columns: Columns) -> Any:
    """Return the weights of the labels of each example, [N] lists; null where each weighs 1."""
    kind = EXAMPLE_SCHEMA.field("weights").type
    found = [[row.conversation.messages[turn].get("weight", 1.0) for turn in example.turns] for row, example in pairs]
    if all(weight == 1 for weights in found for weight in weights):
        return pa.nulls(len(pairs), kind)
    lists: list[NDArray[np.float32] | None] = []
    for (_, example), weights, length in zip(pairs, found, columns.lengths.tolist(), strict=True):
        if all(weight == 1 for weight in weights):
            lists.append(None)
            continue
        values = np.zeros(length, np.float32)
        # A span that is one for several turns, prompts and all, has one weight.
        for (start, stop), weight in zip(example.spans, weights, strict=len(example.spans) == len(weights)):
            values[start:stop] = weight
        lists.append(values)
    return pa.array(lists, kind)


def _question(row: Row, example: Example) -> str:
    """Return the last user message before the example's last answer."""
    for message in reversed(row.conversation.messages[: example.turns[-1]]):
        if message["role"] == "user":
            return str(message.get("content") or "")
    return ""


def _reference(row: Row, example: Example, tokenizer: PreTrainedTokenizerBase, end_of_turn: str) -> str:
    """Return the example's last answer; decoded where it is not in the conversation as it is said."""
    content = row.conversation.messages[example.turns[-1]].get("content")
    if isinstance(content, str) and example.target.startswith(content):
        rest = example.target[len(content) :]
        if not rest or rest == end_of_turn:
            return content
    start, stop = example.spans[-1]
    ids = example.input_ids[start:stop]
    text: Any = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
