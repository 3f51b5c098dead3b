"""Packs on disk: one Arrow IPC file that training maps into memory, a pack a row.

Examples are packed window by window, so that memory does not grow with their number; within a window of a hundred
thousand examples best fit leaves no more room than over all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tasks.storage import digest_file
from tasks.tokenization.packing import pack

EXAMPLES_PER_WINDOW = 100_000
# Where examples are long, a window ends here: ids and labels of this many tokens take 64 MB.
_TOKENS_PER_WINDOW = 1 << 23
_PACKS_PER_BATCH = 1024
PACK_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("labels", pa.large_list(pa.int32()), nullable=False),
        pa.field("lengths", pa.large_list(pa.int32()), nullable=False),
        pa.field("examples", pa.large_list(pa.int64()), nullable=False),
    ]
)


@dataclass(frozen=True)
class PackCounts:
    """What a file of packs holds."""

    num_packs: int
    num_examples: int
    num_tokens: int
    packing_efficiency: float
    """Tokens / (packs * tokens_per_pack); `nan` without packs."""
    digest: str
    """sha256 of the file."""


def write_packs(
    tokens: Path, tokens_per_pack: int, target: Path, *, examples_per_window: int = EXAMPLES_PER_WINDOW
) -> PackCounts:
    """Pack the examples of a tokens table and write them as an Arrow IPC file.

    A pack has the ids and labels of its examples end to end, their lengths, and their numbers in the table (from 0).

    Args:
        tokens: train.parquet of a tokens folder.
        tokens_per_pack: Token budget of a pack.
        target: The file to write.
        examples_per_window: Examples that are packed together.

    Raises:
        ValueError: an example has more tokens than a pack holds.
    """
    num_packs = num_examples = num_tokens = 0
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, PACK_SCHEMA) as writer:
        for lists in _read_windows(tokens, examples_per_window):
            offsets = lists[0].offsets.to_numpy()
            lengths = np.diff(offsets)
            packs = pack(lengths.tolist(), tokens_per_pack)
            for start in range(0, len(packs), _PACKS_PER_BATCH):
                some = packs[start : start + _PACKS_PER_BATCH]
                writer.write_batch(_lay_out(some, lists, offsets, lengths, first=num_examples))
            num_packs += len(packs)
            num_examples += len(lengths)
            num_tokens += int(lengths.sum())
            del lists, some  # before the next window is read
            pa.default_memory_pool().release_unused()
    filled = num_tokens / (num_packs * tokens_per_pack) if num_packs else float("nan")
    return PackCounts(num_packs, num_examples, num_tokens, filled, digest_file(target))


def open_packs(path: Path) -> pa.Table:
    """Map a file of packs into memory; what is not read takes none."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _read_windows(tokens: Path, size: int) -> Iterator[list[Any]]:
    """Read a table's ids and labels in windows of at most so many examples, each column as one array."""
    waiting: tuple[list[Any], ...] = ([], [])
    num_examples = num_tokens = 0
    for batch in _read_batches(tokens, size):
        while num_examples + len(batch) >= size or num_tokens >= _TOKENS_PER_WINDOW:
            cut = min(size - num_examples, len(batch)) if num_tokens < _TOKENS_PER_WINDOW else 0
            yield _join_columns(waiting, batch.slice(0, cut))
            batch, num_examples, num_tokens = batch.slice(cut), 0, 0
        if len(batch):
            for chunks, column in zip(waiting, batch.columns, strict=True):
                chunks.append(column)
            num_examples += len(batch)
            num_tokens += int(batch.column(0).value_lengths().sum().as_py())
    if num_examples:
        yield _join_columns(waiting, None)


def _read_batches(tokens: Path, size: int) -> Iterator[pa.RecordBatch]:
    """Read a table a row group at a time and in one thread: reading ahead would take more memory than a window."""
    file = pq.ParquetFile(tokens)
    for number in range(file.num_row_groups):
        table = file.read_row_group(number, columns=["input_ids", "labels"], use_threads=False)
        yield from table.to_batches(max_chunksize=min(size, 8192))


def _join_columns(waiting: tuple[list[Any], ...], last: Any) -> list[Any]:
    """Put the chunks of each column together, and forget them column by column."""
    joined = []
    for number, chunks in enumerate(waiting):
        joined.append(pa.concat_arrays([*chunks, *([] if last is None else [last.column(number)])]))
        chunks.clear()
    return joined


def _lay_out(
    packs: list[list[int]], lists: list[Any], offsets: NDArray[np.int64], lengths: NDArray[np.int64], *, first: int
) -> pa.RecordBatch:
    """Gather the examples of some packs."""
    order = np.concatenate([np.asarray(one, np.int64) for one in packs])
    numbers = np.concatenate([[0], np.cumsum([len(one) for one in packs])])
    sizes = lengths[order]
    ends = np.cumsum(sizes)
    places = np.arange(ends[-1]) + np.repeat(offsets[order] - (ends - sizes), sizes)
    borders = np.concatenate([[0], ends])[numbers]
    # `values` of a sliced list array still holds what its offsets leave out: they are absolute.
    columns = [pa.LargeListArray.from_arrays(borders, pa.array(each.values.to_numpy()[places])) for each in lists]
    columns.append(pa.LargeListArray.from_arrays(numbers, pa.array(sizes.astype(np.int32))))
    columns.append(pa.LargeListArray.from_arrays(numbers, pa.array(order + first)))
    return pa.RecordBatch.from_arrays(columns, schema=PACK_SCHEMA)
