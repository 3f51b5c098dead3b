"""The search for near duplicates where the sets of words are in a store: workers read them there, each some pieces'."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks import execution
from tasks.ingestion.pieces import StoredContent, read_stored_shingles
from tasks.ingestion.rows.shingles import Shingles, join_shingles, select_shingles
from tasks.ingestion.splitting.index import Index, Mask, Piece, Places, find_taken
from tasks.ingestion.splitting.near_duplicates import BestMatch, find_near_duplicates, keep_best
from tasks.parcels import Enclosure, Parcel, find

SEARCHED_ROWS = 200_000
"""Rows of the pieces that a worker looks through in a call."""


class ChosenRows(NamedTuple):
    """Rows of a piece of which the sets are wanted."""

    stored: StoredContent
    start: int
    """Where the piece's rows begin in the index."""
    num_rows: int
    """Of the piece in the store."""
    rows: NDArray[np.uint8]
    """Which of these are meant, a bit each."""
    num_taken: int
    places: NDArray[np.uint8]
    """Which of the taken rows, a bit each: the places of the same rows in the index, from `start`."""


def search_store(index: Index, train: Mask, held_out: Mask, scratch: Path) -> list[BestMatch]:
    """Do what find_near_duplicates does, by workers; the held-out rows are numbered as they come in the index.

    Args:
        index: of rows whose sets are in a store.
        train: rows that are looked through.
        held_out: rows that are looked for.
        scratch: folder for a file that is deleted again.
    """
    calls = [(group,) for group in _choose(index, held_out)]
    parts: list[Shingles] = execution.map(read_chosen, calls, parcel=lambda *_: Parcel(()))
    runs = join_shingles(parts)
    if not len(runs.hashes):
        return []
    scratch.mkdir(parents=True, exist_ok=True)
    known = scratch / "held-out.npz"
    np.savez(known, hashes=runs.hashes, bounds=runs.bounds)
    looked = [(group, known) for group in _choose(index, train)]
    found = execution.map(search_chosen, looked, parcel=lambda _, path: Parcel((Enclosure(path, is_common=True),)))
    known.unlink()
    return keep_best(pair for pairs in found for pair in pairs)  # rows rise from group to group


def _choose(index: Index, rows: Mask) -> Iterator[tuple[ChosenRows, ...]]:
    """Yield the pieces that have some of these rows, in groups of about SEARCHED_ROWS rows."""
    waiting: list[ChosenRows] = []
    for piece in index.pieces:
        own = rows[piece.start : piece.start + piece.num_rows]
        if not own.any():
            continue
        waiting.append(_choose_rows(piece, own, index.seed))
        if sum(each.num_rows for each in waiting) >= SEARCHED_ROWS:
            yield tuple(waiting)
            waiting = []
    if waiting:
        yield tuple(waiting)


def _choose_rows(piece: Piece, own: Mask, seed: int) -> ChosenRows:
    assert piece.stored_shingles is not None, piece
    taken = find_taken(piece, seed)
    rows = own if taken is None else taken.copy()
    if taken is not None:
        rows[taken] = own
    return ChosenRows(piece.stored_shingles, piece.start, len(rows), np.packbits(rows), len(own), np.packbits(own))


def _read(chosen: ChosenRows) -> tuple[Places, Shingles]:
    """Return the places of the rows in the index, and their sets."""
    rows, places = (
        np.unpackbits(bits, count=count).view(np.bool_)
        for bits, count in ((chosen.rows, chosen.num_rows), (chosen.places, chosen.num_taken))
    )
    return chosen.start + np.flatnonzero(places), select_shingles(read_stored_shingles(chosen.stored), rows)


def read_chosen(pieces: Sequence[ChosenRows]) -> Shingles:
    """Return the sets of the chosen rows of some pieces."""
    return join_shingles([_read(piece)[1] for piece in pieces])


def search_chosen(pieces: Sequence[ChosenRows], known: Path) -> list[BestMatch]:
    """Return the held-out rows that the chosen rows of some pieces nearly repeat, each with the one most like it."""
    with np.load(find(known)) as values:
        held_out = Shingles(values["hashes"], values["bounds"])
    return find_near_duplicates(map(_read, pieces), held_out)
