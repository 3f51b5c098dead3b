"""The index of all rows: on disk, and read piece by piece, so that memory does not grow with the rows.

In memory are a few bytes a row (its side, its number of copies). Other columns are read from disk piece by piece when
they are needed, several times where they do not fit at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.ingestion.errors import name_place
from tasks.ingestion.pieces import StoredContent, read_frame, read_shingles, read_stored
from tasks.ingestion.rows.shingles import Shingles, select_shingles
from tasks.ingestion.splitting.ranks import rank_places

Mask = NDArray[np.bool_]
"""One entry for each row of the index."""
Places = NDArray[np.int64]


class Piece(NamedTuple):
    """A piece of a shard."""

    folder: Path
    number: int
    start: int
    """Where its rows begin in the index."""
    num_rows: int
    """Rows of it that are taken."""
    limit: int | None
    """The largest rank that is taken, where a source takes only some of its rows."""
    stored: StoredContent | None = None
    """Where its rows are, if not in the folder."""
    stored_shingles: StoredContent | None = None
    """Where the sets are by which near duplicates are found, if not in the folder."""


@dataclass(frozen=True)
class Index:
    """What is known of all datasets' rows without their texts; one dataset's rows after the other's."""

    pieces: Sequence[Piece]
    """In the order of the rows; none holds rows of two datasets."""
    bounds: Sequence[int]
    """Where each dataset's rows begin, and where the last one's end."""
    seed: int
    """Of the choice of rows, where a source takes only some."""

    @property
    def num_rows(self) -> int:
        """Rows of all datasets."""
        return self.bounds[-1]

    def read(self, *columns: str, rows: Mask) -> Iterator[tuple[Places, pl.DataFrame]]:
        """Yield columns (see pieces.INDEX_SCHEMA) of some rows, piece by piece, with the rows' places.

        Which rows of a piece are meant is looked up when it is read.
        """
        for piece, own in self._divide(rows):
            yield piece.start + np.flatnonzero(own), read_taken(piece, "index", self.seed, columns).filter(own)

    def read_shingles(self, rows: Mask) -> Iterator[tuple[Places, Shingles]]:
        """Yield the sets by which near duplicates are found of some rows, piece by piece, with the rows' places."""
        for piece, own in self._divide(rows):
            runs = read_shingles(piece.folder, piece.number)
            if (taken := find_taken(piece, self.seed)) is not None:
                runs = select_shingles(runs, taken)
            yield piece.start + np.flatnonzero(own), select_shingles(runs, own)

    def name(self, places: Iterable[int]) -> list[str]:
        """Return source and line of a few rows."""
        places = list(places)
        starts = [piece.start for piece in self.pieces]
        owners = np.searchsorted(starts, places, side="right") - 1
        names: dict[int, str] = {}
        for owner in np.unique(owners).tolist():
            piece = self.pieces[owner]
            frame = read_taken(piece, "index", self.seed, ("source", "line"))
            for place, own in zip(places, owners.tolist(), strict=True):
                if own == owner:
                    source, line = frame.row(place - piece.start)
                    names[place] = name_place(source, line)
        return [names[place] for place in places]

    def find(self, rows: Mask, number: int) -> list[int]:
        """Return the places of the first so many of these rows."""
        places = (piece.start + place for piece, own in self._divide(rows) for place in np.flatnonzero(own).tolist())
        return list(islice(places, number))

    def _divide(self, rows: Mask) -> Iterator[tuple[Piece, Mask]]:
        """Yield the pieces that hold some of these rows, and which of theirs these are."""
        for piece in self.pieces:
            own = rows[piece.start : piece.start + piece.num_rows]
            if own.any():
                yield piece, own


def find_taken(piece: Piece, seed: int) -> Mask | None:
    """Tell which rows of a piece are taken; None for all."""
    if piece.limit is None:
        return None
    ranks = rank_places(read_frame(piece.folder, "index", piece.number, ("source", "line")), seed)
    taken: Mask = ranks <= piece.limit
    return taken


def read_taken(piece: Piece, name: str, seed: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Return the rows, index or rejects of a piece, without those that are not taken; all columns for None."""
    chosen = columns if piece.limit is None else None
    if name == "rows" and piece.stored is not None:
        frame = read_stored(piece.stored, chosen)
    else:
        frame = read_frame(piece.folder, name, piece.number, chosen)
    if piece.limit is None:
        return frame
    taken = frame.filter(rank_places(frame, seed) <= piece.limit)
    return taken if columns is None else taken.select(columns)
