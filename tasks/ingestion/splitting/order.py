"""Writes the chosen rows in their order, the dataset's own or a seeded mix of several, in parts that nobody joins.

Which rows are taken and where each comes is decided on the index; the texts are read, ordered and written by workers,
each a part by itself. Where the rows of a part come from everywhere (a mix, a few rows of many), workers first scatter
the rows of some pieces each, part by part, so that no text is read more than twice.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.records import Conversations
from tasks import execution
from tasks.ingestion import tables
from tasks.ingestion.pieces import CONVERSATION_SCHEMA, name_rows
from tasks.ingestion.splitting.index import Index, Piece, Places, read_taken
from tasks.ingestion.splitting.mixture import Repeats
from tasks.ingestion.splitting.ranks import rank_ids
from tasks.parcels import Enclosure, Parcel, find
from tasks.partitions import name_part
from tasks.stored_files import StoredFile, put_file, read_span

SCATTERED_ROWS = 200_000
"""Rows that a worker looks through at once, of which those of a table are scattered, or a part is written directly."""
PLACE = "place"
_PART, _SCATTERED = "part.parquet", "rows.arrows"


class Taken(NamedTuple):
    """Rows of one piece that a table has."""

    piece: Piece
    rows: NDArray[np.unsignedinteger]
    """Which of the piece's, one entry for each time that a row is taken."""
    start: int
    """Where the first one comes in the table, and the others behind it; unless `places` says so."""
    places: Places | None = None
    """Where each comes in the table."""


class Scattered(NamedTuple):
    """Rows of one part, from some pieces."""

    path: Path
    start: int
    stop: int
    """The bytes of the file that hold them."""
    sha256: str
    """Of these bytes."""
    address: str | None = None
    """Where the file is, if it is in a store."""


@dataclass(frozen=True)
class TablePlan:
    """Which rows a table has, and in which parts."""

    table: Path
    num_rows: int
    part_rows: int
    taken: Sequence[Taken]
    """In the order of the index."""
    is_mixed: bool

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each part begins and ends; a table without rows has one part."""
        return list(pairwise([*range(0, max(1, self.num_rows), self.part_rows), self.num_rows]))

    def name_file(self, part: int) -> str:
        """Return the name of the file of a part, below the folder that the table is in."""
        file = name_part(self.table, part) if len(self.bounds) > 1 else self.table
        return file.relative_to(self.table.parent).as_posix()

    @property
    def is_scattered(self) -> bool:
        """Whether a part's rows come from more pieces than one worker should read."""
        if self.is_mixed and len(self.bounds) > 1:
            return True
        read = sum(each.piece.num_rows for each in self.taken) / len(self.bounds)
        return read > SCATTERED_ROWS


def plan_table(index: Index, repeats: Repeats, table: Path) -> TablePlan:
    """Decide where the rows of a table come.

    One dataset's rows come in their order; those of several are mixed by the rank of seed, copy and content. Whoever
    takes rows from the front (an evaluation of the first ones, a preview) then sees every dataset.

    Args:
        index: of all datasets' rows.
        repeats: how often each is taken.
        table: the file or the folder that is to be written.
    """
    is_mixed = sum(bool(repeats[low:high].any()) for low, high in pairwise(index.bounds)) > 1
    taken: list[Taken] = []
    ranks: list[NDArray[np.uint64]] = []
    num_rows = 0
    for piece in index.pieces:
        own = repeats[piece.start : piece.start + piece.num_rows]
        if not own.any():
            continue
        rows = np.repeat(np.arange(len(own), dtype=np.min_scalar_type(len(own))), own)
        taken.append(Taken(piece, rows, num_rows))
        num_rows += len(rows)
        if is_mixed:
            before = np.cumsum(own, dtype=np.int64) - own
            ids = read_taken(piece, "index", index.seed, ("example_id",))["example_id"].bin.encode("hex")
            ranks.append(rank_copies(ids.gather(rows), np.arange(1, len(rows) + 1) - before[rows], index.seed))
    if is_mixed:
        places = np.empty(num_rows, np.int64)
        places[np.argsort(np.concatenate(ranks), kind="stable")] = np.arange(num_rows)
        taken = [each._replace(places=places[each.start : each.start + len(each.rows)]) for each in taken]
    return TablePlan(table, num_rows, tables.count_part_rows(num_rows), taken, is_mixed)


def rank_copies(ids: pl.Series, copies: Places, seed: int) -> NDArray[np.uint64]:
    """Return by what rows are mixed: ranks by seed, copy and example_id."""
    ranks = np.empty(len(ids), dtype=np.uint64)
    for copy in np.unique(copies).tolist():
        own = np.flatnonzero(copies == copy)
        ranks[own] = rank_ids(ids.gather(own), f"mix:{seed}:{copy}")
    return ranks


@dataclass(frozen=True)
class Store:
    """Addresses of folders in an object store, into which workers put what they make."""

    tables: str
    """For the tables, which stay."""
    scratch: str
    """For the shards' rows and what is scattered of them, which do not."""


def write_tables(
    index: Index, wanted: Mapping[Path, Repeats], scratch: Path, store: Store | None = None
) -> dict[str, StoredFile]:
    """Write tables of conversations: a file each of few rows, a folder of parts of more (see partitions).

    Args:
        index: of all datasets' rows.
        wanted: for each table how often it takes each row.
        scratch: folder for files that are deleted again.
        store: where workers put the tables; None: they are written where `wanted` says.

    Returns:
        The files in the store, by their names below it; few rows are written here.
    """
    plans = [plan_table(index, repeats, table) for table, repeats in wanted.items()]
    small = [plan for plan in plans if len(plan.bounds) == 1 and not plan.is_scattered]
    for plan in plans if len(small) == len(plans) else ():  # not worth a worker's start
        num_rows = tables.write_table(
            read_rows(plan.taken, index.seed), CONVERSATION_SCHEMA, Conversations, plan.table, tables.GROUP_ROWS
        )
        _check_rows(plan, [num_rows])
    if len(small) == len(plans):
        return {}
    scratch.mkdir(parents=True, exist_ok=True)
    scattered = _scatter_tables([plan for plan in plans if plan.is_scattered], index.seed, scratch, store)
    calls: list[tuple[Sequence[Taken] | Sequence[Scattered], int, int, Path, str | None]] = []
    for number, plan in enumerate(plans):
        for part, (low, high) in enumerate(plan.bounds):
            rows = scattered[plan.table][part] if plan.is_scattered else _slice(plan.taken, low, high)
            address = None if store is None else f"{store.tables}/{plan.name_file(part)}"
            calls.append((rows, index.seed, tables.GROUP_ROWS, scratch / f"table-{number}-{part}", address))
    written = iter(zip(execution.map(write_part, calls, parcel=enclose_part), calls, strict=True))
    stored: dict[str, StoredFile] = {}
    for plan in plans:
        made = [next(written) for _ in plan.bounds]
        _check_rows(plan, [num_rows for (num_rows, _), _ in made])
        for part, ((_, file), call) in enumerate(made):
            if file is not None:
                stored[plan.name_file(part)] = file
                continue
            target = plan.table.parent / plan.name_file(part)
            target.parent.mkdir(exist_ok=True)
            (call[3] / _PART).rename(target)
    return stored


def _check_rows(plan: TablePlan, found: Sequence[int]) -> None:
    """Compare the rows of each part with those that it was to have."""
    wanted = [high - low for low, high in plan.bounds]
    assert list(found) == wanted, f"{plan.table}: parts of {found} rows were written, and not of {wanted}"


def _slice(taken: Sequence[Taken], low: int, high: int) -> tuple[Taken, ...]:
    """Return the rows whose numbers in the order of the index are in a range."""
    parts = []
    for each in taken:
        first, last = max(low - each.start, 0), min(high - each.start, len(each.rows))
        if first < last:
            places = None if each.places is None else each.places[first:last]
            parts.append(Taken(each.piece, each.rows[first:last], each.start + first, places))
    return tuple(parts)


def _scatter_tables(
    plans: Sequence[TablePlan], seed: int, scratch: Path, store: Store | None
) -> dict[Path, list[tuple[Scattered, ...]]]:
    """Divide the rows of tables among their parts; return what each part has, in the order of the index."""
    calls: list[tuple[tuple[Taken, ...], int, int, Path, str | None]] = []
    owners: list[TablePlan] = []
    for plan in plans:
        for group in _group(plan.taken):
            address = None if store is None else f"{store.scratch}/scattered-{len(calls)}"
            calls.append((group, seed, plan.part_rows, scratch / f"scattered-{len(calls)}", address))
            owners.append(plan)
    found: dict[Path, list[list[Scattered]]] = {plan.table: [[] for _ in plan.bounds] for plan in plans}
    spans = execution.map(scatter_rows, calls, parcel=enclose_part)
    for plan, call, own in zip(owners, calls, spans, strict=True):
        for part, start, stop, sha256 in own:
            found[plan.table][part].append(Scattered(call[3] / _SCATTERED, start, stop, sha256, address=call[4]))
    return {table: [tuple(part) for part in parts] for table, parts in found.items()}


def _group(taken: Sequence[Taken]) -> Iterator[tuple[Taken, ...]]:
    """Cut pieces into groups of about SCATTERED_ROWS rows of theirs, or of those that are taken, if they are more."""
    waiting: list[Taken] = []
    size = 0
    for each in taken:
        waiting.append(each)
        size += max(each.piece.num_rows, len(each.rows))
        if size >= SCATTERED_ROWS:
            yield tuple(waiting)
            waiting, size = [], 0
    if waiting:
        yield tuple(waiting)


def enclose_part(
    rows: Sequence[Taken | Scattered], seed: int, number: int, folder: Path, address: str | None
) -> Parcel:
    """Return what `scatter_rows` or `write_part` reads and makes; workers read a store themselves."""
    reads = []
    for each in rows:
        if isinstance(each, Scattered):
            if each.address is None:
                reads.append(Enclosure(each.path, ((each.start, each.stop),)))
        elif each.piece.stored is None:
            reads.append(Enclosure(name_rows(each.piece.folder, each.piece.number)))
    return Parcel(tuple(reads), folder)


def scatter_rows(
    taken: Sequence[Taken], seed: int, part_rows: int, folder: Path, address: str | None
) -> list[tuple[int, int, int, str]]:
    """Write rows part by part to one file, each part a stream of its own, with their places.

    Args:
        taken: the rows.
        seed: of the choice of rows, where a source takes only some.
        part_rows: of the table.
        folder: gets the file; made when missing.
        address: where it is put instead, if anywhere.

    Returns:
        The number of each part that has some of them, from and up to which byte of the file they are, and the sha256
        of these bytes.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    folder.mkdir(parents=True, exist_ok=True)
    rows = pl.concat(list(_read_placed(taken, seed))).sort(PLACE)
    parts = rows[PLACE].to_numpy() // part_rows
    # Texts in one buffer: views would bring the texts of all the rows from which these were taken.
    table = rows.to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
    options = pa.ipc.IpcWriteOptions(compression=None if address is None else "zstd")
    spans = []
    with (folder / _SCATTERED).open("wb") as file:
        for part in np.unique(parts).tolist():
            low, high = np.searchsorted(parts, [part, part + 1]).tolist()
            stream = pa.BufferOutputStream()
            with pa.ipc.new_stream(stream, table.schema, options=options) as writer:
                writer.write_table(table.slice(low, high - low))
            content = stream.getvalue()
            spans.append((part, file.tell(), file.tell() + content.size, hashlib.sha256(content).hexdigest()))
            file.write(content)
    if address is not None:
        put_file(folder / _SCATTERED, address)
        (folder / _SCATTERED).unlink()
    return spans


def write_part(
    rows: Sequence[Taken] | Sequence[Scattered], seed: int, group_rows: int, folder: Path, address: str | None
) -> tuple[int, StoredFile | None]:
    """Write a part of a table into a folder, or put it at an address; return its rows, and the file in the store."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = read_rows(rows, seed)
    num_rows = tables.write_table(frames, CONVERSATION_SCHEMA, Conversations, folder / _PART, group_rows)
    if address is None:
        return num_rows, None
    file = put_file(folder / _PART, address, num_rows)
    (folder / _PART).unlink()
    return num_rows, file


def read_rows(rows: Sequence[Taken] | Sequence[Scattered], seed: int) -> Iterator[pl.DataFrame]:
    """Yield the rows of a part in their order, some at a time."""
    taken = [each for each in rows if isinstance(each, Taken)]
    scattered = [each for each in rows if isinstance(each, Scattered)]
    if scattered or any(each.places is not None for each in taken):
        frames = [*_read_placed(taken, seed), *map(_read_scattered, scattered)]
        yield pl.concat(frames).sort(PLACE).drop(PLACE)
        return
    for each in taken:
        yield tables.copy_rows(read_taken(each.piece, "rows", seed)[each.rows])


def _read_placed(taken: Sequence[Taken], seed: int) -> Iterator[pl.DataFrame]:
    """Yield rows with their places in the table."""
    for each in taken:
        places = np.arange(each.start, each.start + len(each.rows)) if each.places is None else each.places
        rows = tables.copy_rows(read_taken(each.piece, "rows", seed)[each.rows])
        yield rows.with_columns(pl.Series(PLACE, places, dtype=pl.Int64))


def _read_scattered(part: Scattered) -> pl.DataFrame:
    """Return the rows of a part that one file holds, with their places."""
    if part.address is not None:
        return pl.read_ipc_stream(read_span(part.address, part.start, part.stop, part.sha256))
    with find(part.path).open("rb") as file:
        file.seek(part.start)
        return pl.read_ipc_stream(file.read(part.stop - part.start))
