"""Puts the chosen rows in the order in which they are written: the dataset's own, or a seeded mix of several ones."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.ingestion.splitting.index import Index, Places, read_taken
from tasks.ingestion.splitting.mixture import Repeats
from tasks.ingestion.splitting.ranks import rank_ids
from tasks.ingestion.tables import copy_rows

BUCKET_ROWS = 50_000
"""Rows that are sorted at once."""
RANK = "rank"


def read_chosen(index: Index, repeats: Repeats, scratch: Path) -> Iterator[pl.DataFrame]:
    """Yield rows of the tables, each as often as it is taken, some at a time.

    One dataset's rows come in their order; those of several are mixed by the rank of seed, copy and content. Whoever
    takes rows from the front (an evaluation of the first ones, a preview) then sees every dataset.

    Args:
        index: of all datasets' rows.
        repeats: how often each is taken.
        scratch: folder for files that are deleted again.
    """
    frames = _read_repeated(index, repeats)
    if sum(bool(repeats[low:high].any()) for low, high in pairwise(index.bounds)) < 2:
        yield from (frame for frame, _ in frames)
        return
    num_buckets = max(1, round(int(repeats.sum(dtype=np.int64)) / BUCKET_ROWS))
    scratch.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    waiting: list[pl.DataFrame] = []
    for frame, copies in frames:
        waiting.append(frame.with_columns(pl.Series(RANK, rank_copies(frame["example_id"], copies, index.seed))))
        if sum(map(len, waiting)) >= BUCKET_ROWS:
            paths.append(_scatter(waiting, num_buckets, scratch / f"{len(paths):06d}.arrow"))
    if waiting:
        paths.append(_scatter(waiting, num_buckets, scratch / f"{len(paths):06d}.arrow"))
    for number in range(num_buckets):
        yield pl.concat([_read_bucket(path, number) for path in paths]).sort(RANK, maintain_order=True).drop(RANK)
    for path in paths:
        path.unlink()


def _read_repeated(index: Index, repeats: Repeats) -> Iterator[tuple[pl.DataFrame, Places]]:
    """Yield the taken rows in their order, piece by piece, with the number of the copy that each is, from 1."""
    for piece in index.pieces:
        own = repeats[piece.start : piece.start + piece.num_rows]
        if own.any():
            rows = np.repeat(np.arange(len(own)), own)
            before = np.cumsum(own, dtype=np.int64) - own
            yield copy_rows(read_taken(piece, "rows", index.seed)[rows]), np.arange(1, len(rows) + 1) - before[rows]


def rank_copies(ids: pl.Series, copies: Places, seed: int) -> NDArray[np.uint64]:
    """Return by what rows are mixed: ranks by seed, copy and example_id."""
    ranks = np.empty(len(ids), dtype=np.uint64)
    for copy in np.unique(copies).tolist():
        own = np.flatnonzero(copies == copy)
        ranks[own] = rank_ids(ids.gather(own), f"mix:{seed}:{copy}")
    return ranks


def _scatter(waiting: list[pl.DataFrame], num_buckets: int, path: Path) -> Path:
    """Write ranked rows to a file of one record batch for each bucket, a range of ranks; they wait no longer."""
    import pyarrow as pa  # type: ignore[import-untyped]

    rows = pl.concat(waiting)
    waiting.clear()
    buckets = (rows[RANK].to_numpy() >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)
    # Texts in one buffer: views would bring the texts of all the rows from which these were taken.
    table = rows[np.argsort(buckets, kind="stable")].to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
    bounds = np.cumsum(np.bincount(buckets.astype(np.int64), minlength=num_buckets)).tolist()
    with pa.ipc.new_file(str(path), table.schema) as writer:
        for low, high in pairwise([0, *bounds]):
            batches = table.slice(low, high - low).to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema))
    return path


def _read_bucket(path: Path, number: int) -> pl.DataFrame:
    """Return the rows of a bucket that one file holds, in memory of their own."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        return pl.DataFrame(pa.ipc.open_file(file).get_batch(number))
