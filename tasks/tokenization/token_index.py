"""The index of a tokens table in parts: of each row what packs, order, counts and checks want, and no tokens.

`train.index` stands beside the table `train.parquet`. It is an Arrow file with one batch for each part, in their order,
and some twelve bytes a row: with it a training knows all packs before it has read a part.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tasks.tokenization.labels import IGNORE_INDEX

INDEX_SCHEMA = pa.schema(
    [
        # Tokens of the row's example.
        ("length", pa.int32()),
        # Its labels that count: the first one never does, as nothing predicts it.
        ("trained", pa.int32()),
        # Its highest token id.
        ("highest", pa.int32()),
        # The sum of these labels' weights; null where each weighs 1.
        ("weight", pa.float64()),
        # Of the same prompt with the answer that is not preferred; null where the row is no pair.
        ("rejected_length", pa.int32()),
        ("rejected_trained", pa.int32()),
        ("rejected_highest", pa.int32()),
    ]
)
_SUFFIX = ".index"


def name_index(table: Path) -> Path:
    """Return the file of a table's index."""
    return table.with_suffix(_SUFFIX)


def index_part(part: Path) -> Any:
    """Return the index of a part of a table, a record batch of INDEX_SCHEMA.

    Raises:
        ValueError: an example has not as many labels, or weights, as tokens.
    """
    with pq.ParquetFile(part) as file:
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        groups = [
            _index_rows(file.read_row_group(number, columns=names, use_threads=False), part)
            for number in range(file.num_row_groups)
        ]
    table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *groups]).combine_chunks()
    return next(iter(table.to_batches()), pa.RecordBatch.from_pylist([], schema=INDEX_SCHEMA))


def write_index(path: Path, batches: Iterable[Any]) -> None:
    """Write the batches of a table's parts, in their order."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, INDEX_SCHEMA, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_index(path: Path) -> Iterator[Any]:
    """Yield the batches of an index, one for each part.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as batches:
            if batches.schema != INDEX_SCHEMA:
                raise ValueError("it has other columns")
            for number in range(batches.num_record_batches):
                yield batches.get_batch(number)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): start the run again, which makes it again") from error


def count_indexed(table: Path) -> int | None:
    """Return the rows in the index of a table, where it has one."""
    path = name_index(table)
    return sum(len(batch) for batch in read_index(path)) if path.is_file() else None


_COLUMNS = ("input_ids", "labels", "weights", "rejected_ids", "rejected_labels")


def _index_rows(rows: Any, part: Path) -> Any:
    """Return the index of some rows."""
    nothing = pa.nulls(len(rows), pa.int32())
    length, trained, highest, chosen = _count(rows, "input_ids", "labels", part)
    others: list[Any] = [nothing] * 3
    if "rejected_ids" in rows.column_names and rows["rejected_ids"].null_count < len(rows):
        *others, _ = _count(rows, "rejected_ids", "rejected_labels", part)
    weight = _weigh(rows, length, chosen, part)
    arrays = [length, trained, highest, weight, *others]
    return pa.table(arrays, schema=INDEX_SCHEMA)


def _count(rows: Any, ids_name: str, labels_name: str, part: Path) -> tuple[Any, Any, Any, NDArray[np.bool_]]:
    """Return length, trained labels and highest id of each row, null where it has none; and which labels count [S]."""
    ids, labels = (_join(rows[name]) for name in (ids_name, labels_name))
    missing = ids.is_null().to_numpy(zero_copy_only=False)
    lengths, others = (_measure(each) for each in (ids, labels))
    if not np.array_equal(lengths, others):
        raise ValueError(f"{part}: row {int(np.flatnonzero(lengths != others)[0])} has not as many {labels_name} as "
                         f"{ids_name}: tokenize again")  # fmt: skip
    starts = np.cumsum(lengths) - lengths
    flat, chosen = ids.flatten().to_numpy(), labels.flatten().to_numpy() != IGNORE_INDEX
    chosen[starts[lengths > 0]] = False
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)])
    highest = np.full(len(lengths), -1, np.int64)
    if len(flat):  # what begins where the next one does has nothing of its own: `reduceat` would give it that one's
        highest[lengths > 0] = np.maximum.reduceat(flat, starts[lengths > 0])
    found = (lengths, before[starts + lengths] - before[starts], highest)
    counts = [pa.array(each.astype(np.int32), mask=missing) for each in found]
    return counts[0], counts[1], counts[2], chosen


def _weigh(rows: Any, length: Any, chosen: NDArray[np.bool_], part: Path) -> Any:
    """Return the sum of the weights of each row's trained labels, null where each weighs 1."""
    if "weights" not in rows.column_names or rows["weights"].null_count == len(rows):
        return pa.nulls(len(rows), pa.float64())
    weights, lengths = _join(rows["weights"]), length.to_numpy()
    own, missing = _measure(weights), weights.is_null().to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero((own != lengths) & ~missing)
    if len(wrong):
        raise ValueError(f"{part}: row {int(wrong[0])} has not as many weights as input_ids: tokenize again")
    values = weights.flatten().to_numpy()
    counted = np.where(chosen[np.repeat(~missing, lengths)], values, np.float32(0)).astype(np.float64)
    starts = np.cumsum(own) - own
    sums = np.zeros(len(own))
    if len(counted):
        sums[own > 0] = np.add.reduceat(counted, starts[own > 0])
    return pa.array(sums, mask=missing)


def _join(column: Any) -> Any:
    """Return a column's lists as one array."""
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _measure(lists: Any) -> NDArray[np.int64]:
    """Return how many values each list has; none where there is no list."""
    found: NDArray[np.int64] = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return found
