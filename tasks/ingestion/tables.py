"""Tables on disk, written as a stream of row groups, every row of them validated."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandera.errors
import pandera.polars as pa
import polars as pl
from numpy.typing import NDArray

from tasks.ingestion.takings import Piece, read_taken

GROUP_ROWS = 10_000
BUCKET_ROWS = 50_000
POSITION = "position"

Places = NDArray[np.int64]


def write_table(frames: Iterable[pl.DataFrame], schema: Any, model: type[pa.DataFrameModel], path: Path) -> None:
    """Validate every row, and write the table in row groups of GROUP_ROWS; where a row is wrong, no table is left."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetWriter(path, pl.DataFrame(schema=schema).to_arrow().schema, compression="zstd") as writer:
            for frame in _regroup(frames):
                try:
                    # An eager frame: of a lazy one pandera checks types only.
                    model.validate(frame, lazy=True)
                except pandera.errors.SchemaErrors as error:
                    raise AssertionError(f"{path.name} breaks its schema: {error.failure_cases}") from error
                writer.write_table(frame.to_arrow(), row_group_size=GROUP_ROWS)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _regroup(frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Cut frames of any size into groups of GROUP_ROWS, the last one excepted."""
    waiting: list[pl.DataFrame] = []
    num_rows = 0
    for frame in frames:
        waiting.append(frame)
        num_rows += frame.height
        if num_rows >= GROUP_ROWS:
            whole = pl.concat(waiting)
            full = num_rows - num_rows % GROUP_ROWS
            yield from (whole[start : start + GROUP_ROWS] for start in range(0, full, GROUP_ROWS))
            waiting, num_rows = [_copy(whole[full:])], num_rows - full
    if num_rows:
        yield pl.concat(waiting)


def read_in_order(pieces: Sequence[Piece], order: Places, seed: int, scratch: Path) -> Iterator[pl.DataFrame]:
    """Yield the rows with these places in the index, in this order, some at a time.

    Where the order is not that of the pieces, rows go through one file for each BUCKET_ROWS of the result.

    Args:
        pieces: of the index.
        order: places in the index; they may repeat.
        seed: of the choice of rows.
        scratch: folder for files that are deleted again.
    """
    if len(order) < 2 or bool(np.all(order[1:] >= order[:-1])):
        yield from (frame for frame, _ in _read_sorted(pieces, order, seed))
        return
    by_place = np.argsort(order, kind="stable")
    done = 0
    parts: list[tuple[pl.DataFrame, Places]] = []
    for frame, num_rows in _read_sorted(pieces, order[by_place], seed):
        parts.append((frame, by_place[done : done + num_rows]))
        done += num_rows
        if sum(len(part) for _, part in parts) >= BUCKET_ROWS or done == len(order):
            _scatter(parts, scratch)
            parts = []
    for path in sorted(scratch.glob("bucket-*"), key=lambda path: path.name):
        frames = [pl.read_ipc(file.read_bytes()) for file in sorted(path.iterdir())]
        yield pl.concat(frames).sort(POSITION).drop(POSITION)
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def _read_sorted(pieces: Sequence[Piece], places: Places, seed: int) -> Iterator[tuple[pl.DataFrame, int]]:
    """Yield the rows with these places, which rise, piece by piece, and their number."""
    for piece in pieces:
        low, high = np.searchsorted(places, (piece.start, piece.start + piece.num_rows))
        if low < high:
            yield _copy(read_taken(piece, "rows", seed)[places[low:high] - piece.start]), int(high - low)


def _copy(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows without the texts of the others from which they were taken, as a slice would keep them."""
    return pl.DataFrame(rows.to_arrow())


def _scatter(parts: Sequence[tuple[pl.DataFrame, Places]], scratch: Path) -> None:
    """Write rows to the buckets of their positions, a file more in each."""
    frame = pl.concat([part.with_columns(pl.Series(POSITION, positions)) for part, positions in parts])
    buckets: list[int] = np.unique(frame[POSITION].to_numpy() // BUCKET_ROWS).tolist()
    for bucket in buckets:
        rows = frame.filter(pl.col(POSITION) // BUCKET_ROWS == bucket)
        folder = scratch / f"bucket-{bucket:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        # Texts in one buffer: views would bring the texts of all the rows from which these were taken.
        rows.write_ipc(folder / f"{len(list(folder.iterdir())):06d}.arrow", compat_level=pl.CompatLevel.oldest())
