"""Lays the examples of a tokens table end to end in a folder, and packs them; `token_table` maps what is there.

Examples are packed window by window, so that memory does not grow with their number; within a window of a hundred
thousand examples best fit leaves no more room than over all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tasks.partitions import list_parts
from tasks.tokenization.labels import IGNORE_INDEX
from tasks.training.packing import pack
from tasks.training.token_table import TYPES, WEIGHTS, Numbers, count_targets, open_array

EXAMPLES_PER_WINDOW = 100_000
REJECTED = ("rejected_ids", "rejected_labels")
"""The columns of pairs: ids and labels of the same prompt with the other answer."""
_EXAMPLES_AT_ONCE = 8192
_NAMED = 3
_NAMES_SCHEMA = pa.schema([("example_id", pa.large_string())])


def write_examples(tokens: Path, folder: Path, *, pairs: bool = False) -> None:
    """Lay the examples of a tokens table end to end in a folder, which is made; what is there is overwritten.

    Args:
        tokens: train.parquet or eval.parquet of a tokens folder.
        folder: gets all but `packs` and `bounds`.
        pairs: whether each row is two examples, the chosen and the rejected.

    Raises:
        ValueError: an example has nothing to learn, input_ids and labels differ in length, or a row is no pair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start, empty = 0, _Named()
    arrays = ["input_ids", "targets", "offsets"]
    (folder / WEIGHTS).unlink(missing_ok=True)
    if has_weights := not pairs and _has_values(tokens, WEIGHTS):
        arrays.append(WEIGHTS)
    read = _read_pairs(tokens) if pairs else _read_batches(tokens, has_weights=has_weights)
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in arrays}
        names = stack.enter_context(pa.ipc.new_file(str(folder / "example_ids.arrow"), _NAMES_SCHEMA))
        files["offsets"].write(np.zeros(1, "<i8").tobytes())
        for example_ids, input_ids, labels, *weights in read:
            ends = np.cumsum(_measure(tokens, example_ids, input_ids, labels, *weights))
            targets = _shift(labels.values.to_numpy(), ends, IGNORE_INDEX)
            empty.add(example_ids, count_targets(targets, ends) == 0)
            names.write_batch(pa.RecordBatch.from_arrays([example_ids], schema=_NAMES_SCHEMA))
            _append(files, input_ids=input_ids.values.to_numpy(), targets=targets, offsets=start + ends)
            if weights:
                _append(files, weights=_shift(weights[0].values.to_numpy(), ends, 0))
            start += int(ends[-1])
    if empty.count:
        raise ValueError(
            f"{tokens}: {empty}: no trained token (every label after the first token is {IGNORE_INDEX}): remove these "
            "rows, or give them an answer"
        )


def write_packs(
    folder: Path,
    tokens_per_pack: int | None,
    *,
    window: int = EXAMPLES_PER_WINDOW,
    group: int = 1,
    parts: Numbers | None = None,
) -> list[int]:
    """Pack the examples that `write_examples` wrote.

    Args:
        folder: gets `packs` and `bounds`.
        tokens_per_pack: token budget of a pack; None: every group is a pack of its own.
        window: groups that are packed together.
        group: examples that stay together.
        parts: [P + 1] groups before each part of the table, where those of a part are packed together instead.

    Returns:
        The packs before each window or part, and all.

    Raises:
        ValueError: a group has more tokens than a pack holds.
    """
    offsets = open_array(folder, "offsets", TYPES["offsets"])[::group]
    with (folder / "packs").open("wb") as packs, (folder / "bounds").open("wb") as bounds:
        files = {"packs": packs, "bounds": bounds}
        _append(files, bounds=np.zeros(1, np.int64))
        starts = parts[:-1].tolist() if parts is not None else range(0, len(offsets) - 1, window)
        stops = parts[1:].tolist() if parts is not None else [start + window for start in starts]
        num_packs = [0]
        for start, stop in zip(starts, stops, strict=True):
            lengths = np.diff(offsets[start : stop + 1])
            if not len(lengths):  # a part of which every row was rejected
                num_packs.append(num_packs[-1])
                continue
            if tokens_per_pack is None:
                order, ends = np.arange(len(lengths)), np.arange(1, len(lengths) + 1)
            else:
                packed = pack(lengths.tolist(), tokens_per_pack)
                order, ends = np.concatenate([np.asarray(one, np.int64) for one in packed]), _add_up(packed)
            examples = (start + order)[:, None] * group + np.arange(group)
            _append(files, packs=examples.ravel(), bounds=(start + ends) * group)
            num_packs.append(num_packs[-1] + len(ends))
    return num_packs


class _Named:
    """How many examples are wrong, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, example_ids: Any, wrong: NDArray[np.bool_]) -> None:
        places = np.flatnonzero(wrong)
        self.count += len(places)
        self.first += [example_ids[int(place)].as_py() for place in places[: _NAMED - len(self.first)]]

    def __str__(self) -> str:
        shown = ", ".join(self.first)
        return f"{self.count:,} examples, such as {shown}" if self.count > 1 else f"example {shown}"


def _read_batches(tokens: Path, *, has_weights: bool) -> Iterator[tuple[Any, ...]]:
    """Read a table a row group at a time and in one thread: reading ahead would take more memory than a group."""
    columns = ["example_id", "input_ids", "labels", *([WEIGHTS] if has_weights else [])]
    kinds = [pa.int32(), pa.int32(), pa.float32()]
    for table in _read_groups(tokens, columns):
        for batch in table.to_batches(max_chunksize=_EXAMPLES_AT_ONCE):
            example_ids, *lists = batch.columns
            lists = [each.cast(pa.large_list(kind)) for each, kind in zip(lists, kinds, strict=False)]
            # `values` of a sliced array still holds what its offsets leave out: take makes arrays of their own.
            everything = pa.array(np.arange(len(batch)))
            if has_weights:
                lists[2] = _fill_in(lists[2], lists[1])
            yield example_ids.cast(pa.large_string()), *(each.take(everything) for each in lists)


def _read_pairs(tokens: Path) -> Iterator[tuple[Any, ...]]:
    """Read a table a row group at a time, each row as two examples.

    Raises:
        ValueError: a row has one answer only.
    """
    names = ["example_id", "input_ids", "labels", *REJECTED]
    parts = [pq.ParquetFile(part) for part in list_parts(tokens)]
    has_pairs = any(part.num_row_groups for part in parts)
    has_pairs = has_pairs and all(set(REJECTED) <= set(part.schema_arrow.names) for part in parts)
    single = _Named()
    for table in _read_groups(tokens, names) if has_pairs else ():
        for batch in table.to_batches(max_chunksize=_EXAMPLES_AT_ONCE):
            example_ids, ids, labels, other_ids, other_labels = batch.columns
            missing = other_ids.is_null().to_numpy(zero_copy_only=False)
            single.add(example_ids, missing)
            if missing.any():
                continue
            turns = np.arange(2 * len(batch)).reshape(2, -1).T.ravel()  # the first of either half, the second, …
            kind = pa.large_list(pa.int32())
            both = [
                pa.concat_arrays([own.cast(kind), other.cast(kind)]).take(pa.array(turns))
                for own, other in ((ids, other_ids), (labels, other_labels))
            ]
            named = [name for own in example_ids.to_pylist() for name in (own, f"{own} (rejected)")]
            yield pa.array(named, pa.large_string()), *both
    if single.count or not has_pairs:
        what = f"{single}: no rejected answer" if single.count else "no row has a rejected answer"
        raise ValueError(
            f"{tokens}: {what}: training.objective dpo trains pairs: tokenize rows with chosen and rejected"
        )


def _read_groups(tokens: Path, columns: list[str]) -> Iterator[Any]:
    """Yield columns of the row groups of a table, one part after the other."""
    for part in list_parts(tokens):
        with pq.ParquetFile(part) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns=columns, use_threads=False).select(columns)


def _has_values(tokens: Path, column_name: str) -> bool:
    """Say whether a table has a column of lists with anything in it."""
    for part in list_parts(tokens):
        metadata = pq.read_metadata(part)
        for number in range(metadata.num_row_groups if column_name in pq.read_schema(part).names else 0):
            group = metadata.row_group(number)
            columns = [group.column(place) for place in range(group.num_columns)]
            known = [column.statistics for column in columns if column.path_in_schema.split(".")[0] == column_name]
            if any(statistics is None or statistics.num_values for statistics in known):
                return True
    return False


def _fill_in(weights: Any, labels: Any) -> Any:
    """Return the weights with ones where an example has none."""
    lengths = np.diff(labels.offsets.to_numpy()).tolist()
    given = (each.values.to_numpy() if each.is_valid else None for each in weights)
    filled = [np.ones(length, np.float32) if one is None else one for one, length in zip(given, lengths, strict=True)]
    return pa.array(filled, weights.type)


def _measure(tokens: Path, example_ids: Any, input_ids: Any, *others: Any) -> Numbers:
    """Return the lengths of the examples of a batch."""
    lengths, *further = (np.diff(each.offsets.to_numpy()) for each in (input_ids, *others))
    wrong = _Named()
    wrong.add(example_ids, np.any([lengths != each for each in further], axis=0))
    if wrong.count:
        raise ValueError(f"{tokens}: {wrong}: as many labels as input_ids are wanted, and as many weights, if any")
    return lengths


def _shift(values: NDArray[Any], ends: Numbers, last: int) -> NDArray[Any]:
    """Return labels, or what belongs to them, one to the left within each example."""
    shifted = np.full_like(values, last)
    shifted[:-1] = values[1:]
    shifted[ends[ends > 0] - 1] = last
    return shifted


def _add_up(packs: Sequence[Sequence[int]]) -> Numbers:
    """Return where each pack ends."""
    return np.cumsum([len(one) for one in packs])


def _append(files: dict[str, Any], **arrays: NDArray[Any]) -> None:
    """Write arrays at the end of the files of their names."""
    for name, values in arrays.items():
        files[name].write(values.astype(TYPES[name]).tobytes())
