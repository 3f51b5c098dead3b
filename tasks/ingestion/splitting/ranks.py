"""Ranks: numbers by which rows are chosen and ordered, that depend on a seed and the rows alone.

A rank is the first 64 bits of a sha256. The rows of the smallest ranks are found without keeping all ranks: they are
counted by their first bits, and kept only where they begin with those in which the wanted number is reached.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

COUNTED_BITS = 16

Ranks = NDArray[np.uint64]


def rank_ids(ids: Iterable[str], salt: str) -> Ranks:
    """Rank example_ids, in hexadecimal, by salt and id."""
    return _rank([f"{salt}:{text}" for text in ids])


def rank_places(frame: pl.DataFrame, seed: int) -> Ranks:
    """Rank rows by seed, source and line."""
    return _rank([f"{seed}:{source}:{line}" for source, line in frame.select("source", "line").iter_rows()])


def _rank(texts: Sequence[str]) -> Ranks:
    """Return the first 64 bits of each text's sha256."""
    digests = b"".join([hashlib.sha256(text.encode(), usedforsecurity=False).digest()[:8] for text in texts])
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def find_border(ranks: Iterable[Ranks], num_rows: int) -> tuple[int, int]:
    """Return the first bits of the `num_rows`-th smallest rank, and how many ranks with these bits are up to it."""
    numbers = np.zeros(1 << COUNTED_BITS, dtype=np.int64)
    for some in ranks:
        numbers += np.bincount(first_bits(some), minlength=len(numbers))
    totals = np.cumsum(numbers)
    border = int(np.searchsorted(totals, num_rows))
    return border, num_rows - (int(totals[border - 1]) if border else 0)


def first_bits(ranks: Ranks) -> NDArray[np.int64]:
    """Return the bits by which ranks are counted."""
    return (ranks >> np.uint64(64 - COUNTED_BITS)).astype(np.int64)
