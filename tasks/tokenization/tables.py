"""Tables in and out: conversations of a dataset read in batches, examples laid out as Arrow columns."""

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
from tasks.tokenization.masking import IGNORE_INDEX, Conversation, Example

_ROWS_PER_BATCH = 2500
EXAMPLE_SCHEMA = pa.schema(
    [
        ("example_id", pa.large_string()),
        ("question", pa.large_string()),
        ("reference", pa.large_string()),
        ("input_ids", pa.large_list(pa.int32())),
        ("labels", pa.large_list(pa.int32())),
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


def read_rows(path: Path, row_group: int) -> Iterator[list[Row]]:
    """Read a row group of a part's table in batches, validated."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_PER_BATCH, row_groups=[row_group]):
        frame = pl.DataFrame(pa.Table.from_batches([batch]))
        Conversations.validate(frame)
        rows = []
        for example_id, source, line, messages, tools in frame.select(
            "example_id", "source", "line", "messages", "tools"
        ).iter_rows():
            definitions = parse(tools) if tools else None
            conversation = Conversation(parse(messages), definitions or None)
            rows.append(Row(example_id, source, line, messages, conversation))
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


class Line(NamedTuple):
    """An example as it is written."""

    ids: bytes
    """input_ids, as int32."""
    runs: list[int]
    """Tokens of the runs without and with labels in turn, the first without."""
    question: str
    reference: str | None
    """None where it is what the labels of the last answer decode to."""
    truncated: bool = False
    closed: bool = True
    """Whether the template writes the end of turn; if not, eos was appended."""

    def normal(self) -> tuple[Any, ...]:
        """Return what two lines of one example share, however their runs are cut."""
        return *self._replace(runs=[]), join_lines([self]).labels.tobytes()


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


def to_line(row: Row, example: Example, end_of_turn: str) -> Line:
    """Write an example as a line."""
    is_trained = np.asarray(example.labels) != IGNORE_INDEX
    borders = np.flatnonzero(np.diff(is_trained, prepend=False)).tolist()
    runs = np.diff([0, *borders, len(is_trained)]).tolist()
    ids = np.asarray(example.input_ids, np.int32).tobytes()
    return Line(
        ids, runs, _question(row, example), _reference(row, example, end_of_turn), example.truncated, example.closed
    )


def join_lines(lines: Sequence[Line]) -> Columns:
    """Put examples end to end, with their labels."""
    input_ids = np.frombuffer(b"".join([line.ids for line in lines]), np.int32)
    lengths = np.fromiter((len(line.ids) // 4 for line in lines), np.int64, len(lines))
    runs = np.fromiter(chain.from_iterable(line.runs for line in lines), np.int64)
    numbers = np.fromiter((len(line.runs) for line in lines), np.int64, len(lines))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    # Runs alternate within an example and begin anew with each.
    starts = np.repeat(np.cumsum(numbers) - numbers, numbers)
    is_trained = np.repeat((np.arange(runs.size) - starts) % 2 == 1, runs)
    assert is_trained.size == input_ids.size == offsets[-1]
    return Columns(offsets, input_ids, np.where(is_trained, input_ids, np.int32(IGNORE_INDEX)))


def lay_out(
    example_ids: Sequence[str], lines: Sequence[Line], columns: Columns, tokenizer: PreTrainedTokenizerBase
) -> pa.Table:
    """Lay examples out as Arrow columns."""
    references = [line.reference if line.reference is not None else _decode_last(line, tokenizer) for line in lines]
    frame = pl.DataFrame(
        {"example_id": example_ids, "question": [line.question for line in lines], "reference": references},
        schema={"example_id": pl.String, "question": pl.String, "reference": pl.String},
    )
    Examples.validate(frame)
    offsets = pa.array(columns.offsets)
    lists = [pa.LargeListArray.from_arrays(offsets, pa.array(ids)) for ids in (columns.input_ids, columns.labels)]
    arrays = [*(frame[name].to_arrow() for name in frame.columns), *lists]
    return pa.Table.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, EXAMPLE_SCHEMA, strict=True)], schema=EXAMPLE_SCHEMA
    )


def _question(row: Row, example: Example) -> str:
    """Return the last user message before the example's last answer."""
    for message in reversed(row.conversation.messages[: example.turns[-1]]):
        if message["role"] == "user":
            return str(message.get("content") or "")
    return ""


def _reference(row: Row, example: Example, end_of_turn: str) -> str | None:
    """Return the example's last answer, or None where it is not in the conversation as it is said."""
    content = row.conversation.messages[example.turns[-1]].get("content")
    if isinstance(content, str) and example.target.startswith(content):
        rest = example.target[len(content) :]
        if not rest or rest == end_of_turn:
            return content
    return None


def _decode_last(line: Line, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the last run with labels as a decoder without special tokens would give it."""
    borders = np.cumsum(line.runs)
    number = len(line.runs) - 1 - len(line.runs) % 2
    ids = np.frombuffer(line.ids, np.int32)[borders[number - 1] : borders[number]].tolist()
    text: Any = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
