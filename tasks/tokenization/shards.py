"""Shards: parts of a dataset's tables, or ranges of row groups, that any process or machine makes into examples.

A shard is a folder with one of each of its row groups, so that what is put together from shards does not depend on
where they begin and end. A worker keeps the tokenizer, and all that was found out about it, for its next shard.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from schemas.config import TokenizationConfig
from tasks import garbage, storage
from tasks.parcels import Enclosure, Parcel, list_bytes
from tasks.partitions import count_rows, list_row_groups
from tasks.stored_files import StoredFile, put_file, read_file
from tasks.tokenization.contradictions import read_pairs
from tasks.tokenization.groups import EXAMPLES, Fast, tokenize_group
from tasks.tokenization.saving import Probe, probe
from tasks.tokenization.tables import EXAMPLE_SCHEMA, join_batches
from tasks.tokenization.templates import PreparedTokenizer, TemplateArgument, prepare_tokenizer
from tasks.tokenization.token_index import index_part, write_index

# A shard is a task with a result of its own: few rows keep all cores busy, many keep the tasks few.
FEWEST_ROWS_PER_SHARD = 10_000
MOST_ROWS_PER_SHARD = 50_000
_SHARDS_WANTED = 16


PART = "part.parquet"
"""In a shard of all row groups of a file: their examples."""
PAIRS = "pairs.arrow"
INDEX = "index.arrow"
"""Beside PART: the index of its rows."""


class TableShare(NamedTuple):
    """Row groups of one file of a table."""

    file: Path
    row_groups: list[int]


def plan_shards(table: Path, rows_per_shard: int | None = None) -> list[TableShare]:
    """Divide a table into shards of at most so many rows, or of one row group; at least one shard.

    A part of a table that has several is a shard, where `rows_per_shard` does not want smaller ones: the examples of a
    part are a part of the tokens, and are joined with nothing.

    Args:
        table: train.parquet or eval.parquet of a dataset.
        rows_per_shard: None chooses by the table's size.
    """
    found = list(list_row_groups(table))
    if rows_per_shard is None:
        wanted = sum(group.num_rows for group in found) // _SHARDS_WANTED
        rows_per_shard = min(max(wanted, FEWEST_ROWS_PER_SHARD), MOST_ROWS_PER_SHARD)
    shards: list[TableShare] = []
    for file, groups in groupby(found, key=lambda group: group.part):
        num_rows = 0
        shards.append(TableShare(file, []))
        for group in groups:
            if shards[-1].row_groups and num_rows + group.num_rows > rows_per_shard:
                shards.append(TableShare(file, []))
                num_rows = 0
            shards[-1].row_groups.append(group.number)
            num_rows += group.num_rows
    return shards or [TableShare(table, [])]


def tokenize_shard(
    table: Path, row_groups: Sequence[int], prepared: PreparedTokenizer, config: TokenizationConfig, folder: Path
) -> None:
    """Make the examples of a range of row groups, each into a folder of its own.

    Where they are all of the file's, their examples are joined to a table at once, by whoever has made them.

    Args:
        table: a file of train.parquet or eval.parquet of a dataset.
        row_groups: By number; a table without rows may have none.
        prepared: The tokenizer.
        config: Masks and limits.
        folder: Where the row groups' folders are made; made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fast = _open_fast(prepared, config)
    for number in row_groups:
        tokenize_group(table, number, prepared, config, fast, folder / f"{number:06}")
    if len(row_groups) == pq.read_metadata(table).num_row_groups:
        examples = [folder / f"{number:06}" / EXAMPLES for number in row_groups]
        join_batches(examples, EXAMPLE_SCHEMA, folder / PART)
        for path in examples:
            path.unlink()
        write_index(folder / INDEX, [index_part(folder / PART)])


def _open_fast(prepared: PreparedTokenizer, config: TokenizationConfig) -> Fast | None:
    """Return the fast way; None where the tokenizer has none, or the folder `fast` was taken out."""
    if find_spec("tasks.tokenization.fast") is None:
        return None
    from tasks.tokenization.fast.encoder import open_fast

    return open_fast(prepared.tokenizer, config)


def work_on_shard(
    table: Path,
    row_groups: Sequence[int],
    tokenizer_folder: Path,
    chat_template: str | None,
    config: TokenizationConfig,
    folder: Path,
) -> None:
    """Make a shard as `tokenize_shard` does, in a process that may have no tokenizer yet."""
    # A folder that was saved has its arguments already; they are written once.
    arguments = tuple(sorted(config.template_arguments.items()))
    tokenize_shard(table, row_groups, _open(tokenizer_folder, chat_template, arguments), config, folder)


def work_on_stored_part(
    address: str, file: StoredFile, target: str, tokenizer_folder: Path, config: TokenizationConfig, folder: Path
) -> tuple[StoredFile, Probe]:
    """Make the examples of a part of a table that is in a store, and put them there.

    Args:
        address: of the part.
        file: what it has to be.
        target: address of its examples.
        tokenizer_folder: a saved one, which has its template.
        config: masks and limits.
        folder: gets counts and rejects of the row groups, the index, and digests of pairs; made when missing.

    Returns:
        The examples in the store, and what the tokenizer, as it is there, makes of a message.
    """
    with storage.new_folder() as place:
        table = place / PART
        table.write_bytes(read_file(address, file))
        num_groups = pq.read_metadata(table).num_row_groups
        work_on_shard(table, range(num_groups), tokenizer_folder, None, config, folder)
    read_pairs(folder / PART).write_ipc(folder / PAIRS)
    stored = put_file(folder / PART, target, count_rows(folder / PART))
    (folder / PART).unlink()
    return stored, _probe(tokenizer_folder, tuple(_find_states(tokenizer_folder, None)))


def enclose_stored_part(
    address: str, file: StoredFile, target: str, tokenizer_folder: Path, config: TokenizationConfig, folder: Path
) -> Parcel:
    """Return what `work_on_stored_part` reads and makes, besides what is in the store."""
    return Parcel((Enclosure(tokenizer_folder, is_common=True),), folder)


def enclose(
    table: Path,
    row_groups: Sequence[int],
    tokenizer_folder: Path,
    chat_template: str | None,
    config: TokenizationConfig,
    folder: Path,
) -> Parcel:
    """Return what `work_on_shard` reads and makes; its tokenizer is a saved one, which has its template."""
    assert chat_template is None, chat_template
    with table.open("rb") as file:
        spans = list_bytes(file, row_groups[0], row_groups[-1] + 1) if row_groups else None
    return Parcel((Enclosure(table, spans), Enclosure(tokenizer_folder, is_common=True)), folder)


def probe_tokenizer(folder: Path, chat_template: str | None) -> Probe:
    """Load a tokenizer in a process that may have none yet, and return what it makes of a message."""
    return probe(_open(folder, chat_template, ()).tokenizer)


def find_groups(shards: Sequence[Path]) -> list[Path]:
    """Return the folders of all row groups of some shards, in order."""
    return [group for shard in shards for group in sorted(shard.iterdir()) if group.is_dir()]


def _open(
    folder: Path, chat_template: str | None, arguments: tuple[tuple[str, TemplateArgument], ...]
) -> PreparedTokenizer:
    return _prepare(folder, chat_template, arguments, tuple(_find_states(folder, chat_template)))


@lru_cache(maxsize=1)
def _probe(folder: Path, states: tuple[tuple[str, int, int], ...]) -> Probe:
    """Return what a saved tokenizer makes of a message; a process finds it out once."""
    return probe(_prepare(folder, None, (), states).tokenizer)


@lru_cache(maxsize=1)
def _prepare(
    folder: Path,
    chat_template: str | None,
    arguments: tuple[tuple[str, TemplateArgument], ...],
    states: tuple[tuple[str, int, int], ...],
) -> PreparedTokenizer:
    """Open a tokenizer; `states` are there for the cache: a folder's files may change under their names."""
    prepared = prepare_tokenizer(folder, chat_template, dict(arguments))
    garbage.freeze_heap()
    return prepared


def _find_states(folder: Path, chat_template: str | None) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and time of each file that a tokenizer may be made from."""
    template = [Path(chat_template)] if chat_template and Path(chat_template).is_file() else []
    for path in sorted(folder.iterdir()) + template:
        state = path.stat()
        yield path.name, state.st_size, state.st_mtime_ns
