"""A large tokens table by its index: packs, counts and checks without a token, and the tokens in parts when needed.

A folder as `token_table` has it, but for names and tokens; in their place `trained` and `highest` (int32) and
`total_weights` (float64) of each example, and `part_examples` and `part_rows` (int64): how many come before each part,
and how many there are.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from schemas.config import TrainingConfig
from tasks.partitions import name_part
from tasks.tokenization.token_index import name_index, read_index
from tasks.training.distributed import rank, run_on_rank0
from tasks.training.order import RowParts, count_parts_per_window
from tasks.training.records import TrainingError
from tasks.training.rows import choose_pack_tokens, count_group
from tasks.training.table_writer import write_packs
from tasks.training.token_parts import PartNames, PartValues, TokenParts, find_parts
from tasks.training.token_table import Numbers, Packs, TableIndex, TokenTable, open_array, open_packs

_NUM_HEAD = 2
_HAS_WEIGHTS = "has_weights"


def lay_out_index(table: Path, folder: Path, config: TrainingConfig, address: str | None) -> None:
    """Write what is known of the examples of a table in parts, and what stands in each row.

    Args:
        table: train.parquet of a tokens folder, with its index beside it; it need not be there itself.
        folder: for `open_indexed`; made when missing.
        config: whether a row is a pack, and of how many tokens.
        address: of the tokens folder in the store.

    Raises:
        TrainingError: the index is damaged, the table has other parts, or an example has nothing to learn, is longer
            than a pack, or is no pair.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = count_group(config)
    try:
        batches = list(read_index(name_index(table)))
    except ValueError as error:
        raise TrainingError(str(error)) from error
    find_parts(table, len(batches), address)
    index = pa.Table.from_batches(batches).combine_chunks()
    parts = np.cumsum([0, *(len(batch) for batch in batches)])
    _check_pairs(table, index, parts, group)
    columns = {name: _join(index, name, group) for name in ("length", "trained", "highest")}
    lengths, trained = columns["length"].astype(np.int64), columns["trained"]
    _check_trained(table, trained, parts, group)
    has_weights = group == 1 and index["weight"].null_count < len(index)
    weights = index["weight"].to_numpy() if has_weights else np.zeros(0)
    total_weights = np.where(np.isnan(weights), trained, weights) if has_weights else trained.astype(np.float64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens_per_pack = None
    if config.packing:
        tokens_per_pack = choose_pack_tokens(lengths.reshape(-1, group).sum(axis=1), config)
        _check_longest(table, lengths.reshape(-1, group).sum(axis=1), parts, tokens_per_pack)
    _write(folder, offsets=offsets, trained=trained, highest=columns["highest"], total_weights=total_weights)
    num_rows = write_packs(folder, tokens_per_pack, group=group, parts=parts)
    _write(folder, part_examples=parts * group, part_rows=np.asarray(num_rows, np.int64))
    (folder / _HAS_WEIGHTS).write_text(str(int(has_weights)), encoding="utf-8")


def open_indexed(
    table: Path, folder: Path, place: Path, config: TrainingConfig, address: str | None
) -> tuple[TokenTable, Packs]:
    """Map what `lay_out_index` wrote; names and tokens come from the parts when they are asked for.

    Args:
        table: of the tokens folder, whose parts may be in a store.
        folder: may be deleted then.
        place: where parts are laid out, for all ranks of this machine.
        config: the training section.
        address: of the tokens folder in the store.

    Raises:
        TrainingError: the table has not the parts that its index has.
    """
    group, offsets = count_group(config), open_array(folder, "offsets", "<i8")
    part_examples = np.array(open_array(folder, "part_examples", "<i8"))
    has_weights = (folder / _HAS_WEIGHTS).read_text(encoding="utf-8") == "1"
    source = find_parts(table, len(part_examples) - 1, address)
    parts = TokenParts(source, place, offsets, part_examples, group=group, rank=rank())
    index = TableIndex(
        open_array(folder, "trained", "<i4"),
        open_array(folder, "highest", "<i4"),
        open_array(folder, "total_weights", "<f8"),
    )
    values: dict[str, Any] = {
        name: PartValues(parts, name, int(offsets[-1]))
        for name in ("input_ids", "targets", *(["weights"] if has_weights else []))
    }
    names: Any = PartNames(parts)
    found = TokenTable(names, offsets, **values, group=group, index=index, parts=parts)
    num_groups = (len(offsets) - 1) // group
    per_window = count_parts_per_window(num_groups, len(part_examples) - 1)
    bounds: Numbers = np.array(open_array(folder, "part_rows", "<i8"))
    packs = open_packs(folder, RowParts(bounds, per_window))
    return replace(found, head=run_on_rank0(lambda: _take_head(found))), packs


def _take_head(table: TokenTable) -> TokenTable:
    """Return the first examples as a table of their own: all ranks try the model out on the same."""
    numbers = range(min(_NUM_HEAD, len(table.lengths)))
    spans = [slice(int(table.offsets[number]), int(table.offsets[number + 1])) for number in numbers]
    return TokenTable(
        [table.example_ids[number] for number in numbers],
        np.array(table.offsets[: len(numbers) + 1]),
        np.concatenate([table.input_ids[span] for span in spans]),
        np.concatenate([table.targets[span] for span in spans]),
    )


def _join(index: Any, name: str, group: int) -> NDArray[np.int32]:
    """Return a column of each example: of both answers in turn, where rows are pairs."""
    names = [name, f"rejected_{name}"][:group]
    found: NDArray[np.int32] = np.stack([index[each].to_numpy() for each in names], axis=1).ravel()
    return found.astype(np.int32)


def _check_pairs(table: Path, index: Any, parts: Numbers, group: int) -> None:
    if group == 1 or not index["rejected_length"].null_count:
        return
    wrong = np.flatnonzero(index["rejected_length"].is_null().to_numpy())
    raise TrainingError(
        f"{table}: {_name(table, wrong, parts)}: no rejected answer: training.objective dpo trains pairs: tokenize "
        "rows with chosen and rejected"
    )


def _check_trained(table: Path, trained: NDArray[np.int32], parts: Numbers, group: int) -> None:
    wrong = np.flatnonzero(trained == 0) // group
    if len(wrong):
        raise TrainingError(
            f"{table}: {_name(table, wrong, parts)}: no trained token: remove these rows, or give them an answer"
        )


def _check_longest(table: Path, lengths: Numbers, parts: Numbers, tokens_per_pack: int) -> None:
    longest = int(lengths.max(initial=0))
    if longest > tokens_per_pack:
        name = _name(table, np.flatnonzero(lengths == longest)[:1], parts)
        raise TrainingError(
            f"training.tokens_per_pack is {tokens_per_pack}, but {name} has {longest} tokens: raise tokens_per_pack, "
            "or lower tokenization.max_length"
        )


def _name(table: Path, rows: Numbers, parts: Numbers) -> str:
    """Name rows by the first of them: its part, and its number there."""
    part = int(np.searchsorted(parts, rows[0], side="right")) - 1
    first = f"row {int(rows[0] - parts[part])} of {table.name}/{name_part(table, part).name}"
    return f"{len(rows)} rows, such as {first}" if len(rows) > 1 else first


def _write(folder: Path, **arrays: NDArray[Any]) -> None:
    for name, values in arrays.items():
        values.astype(values.dtype.newbyteorder("<")).tofile(folder / name)
