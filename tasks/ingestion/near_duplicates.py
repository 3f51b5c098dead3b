"""Held-out conversations that a training row nearly repeats: found and measured exactly, and reported.

A conversation is the set of its runs of three words (see runs.py); likeness is the Jaccard index of two sets. No pair
is missed, and few are compared, by two bounds. Where J(A, B) is at least t, at least t of A lies in B, and so in the
union of all held-out sets: most training rows end there. And of A, any len(A) - ceil(t * len(A)) + 1 members hold one
of B (prefix filtering; Chaudhuri et al. 2006, Bayardo et al. 2007): the rarest ones of A are looked up, which few
held-out rows have.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.ingestion.runs import HASH_BITS, Runs, cut_runs, select_runs

THRESHOLD = 0.8
# How much of a hash is looked at first.
TABLE_BITS = 24
# Hashes, where every row is like every held-out one: what they need stays below 200 MB.
COMPARED_AT_ONCE = 5_000_000
# Products of a threshold and a size are rounded.
TOLERANCE = 1e-9

Numbers = NDArray[np.int64]


class HeldOut(NamedTuple):
    """Held-out sets, and who has a hash."""

    sizes: Numbers
    keyed: NDArray[np.uint64]
    """Sorted: number of the set in the upper half, hash in the lower."""
    union: NDArray[np.uint32]
    """Sorted hashes of all sets."""
    bounds: Numbers
    """Where the owners of each hash of the union begin."""
    owners: Numbers
    table: NDArray[np.bool_]
    """Whether a hash of the union begins with these bits: an answer at the price of one look."""


class Likest(NamedTuple):
    """The training row most like a held-out row."""

    held_out: int
    train: int
    jaccard: float


def find_near_duplicates(
    train: Iterable[tuple[Numbers, Runs]], held_out: Runs, threshold: float = THRESHOLD
) -> list[Likest]:
    """Return the held-out sets with a training set of a Jaccard index of at least `threshold`.

    Args:
        train: the training sets with their numbers, some at a time; numbers rise.
        held_out: all held-out sets.
        threshold: above 0.

    Returns:
        Pairs of numbers, the likest first; of equally like training sets the first one.
    """
    if not len(held_out.hashes):
        return []
    known = index_held_out(held_out)
    best: dict[int, Likest] = {}
    for numbers, runs in train:
        inside = _find_inside(runs, known, threshold)
        if not inside.any():
            continue
        likely, own = select_runs(runs, inside), numbers[inside]
        step = max(1, COMPARED_AT_ONCE // max(1, len(known.sizes) * int(likely.sizes.max())))
        for start in range(0, len(own), step):
            rows, others, jaccard = _compare_all(cut_runs(likely, start, start + step), known, threshold)
            for row, other, index in zip(own[start + rows].tolist(), others.tolist(), jaccard.tolist(), strict=True):
                if other not in best or index > best[other].jaccard:
                    best[other] = Likest(other, row, index)
    return sorted(best.values(), key=lambda pair: (-pair.jaccard, pair.held_out))


def index_held_out(runs: Runs) -> HeldOut:
    """Make the tables by which training sets are compared with all held-out sets at once."""
    owners = np.repeat(np.arange(len(runs.sizes), dtype=np.uint64), runs.sizes)
    hashes = runs.hashes.astype(np.uint64)
    by_hash = np.sort(hashes << HASH_BITS | owners)
    union, counts = np.unique((by_hash >> HASH_BITS).astype(np.uint32), return_counts=True)
    table = np.zeros(1 << TABLE_BITS, dtype=np.bool_)
    table[union >> (32 - TABLE_BITS)] = True
    return HeldOut(
        sizes=runs.sizes,
        keyed=owners << HASH_BITS | hashes,
        union=union,
        bounds=np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts))),
        owners=(by_hash & np.uint64(2**32 - 1)).astype(np.int64),
        table=table,
    )


def _find_inside(runs: Runs, known: HeldOut, threshold: float) -> NDArray[np.bool_]:
    """Tell of which sets at least `threshold` lies in the union."""
    if not len(runs.sizes):
        return np.zeros(0, dtype=np.bool_)
    likely = known.table[runs.hashes >> (32 - TABLE_BITS)]
    # What the table lets pass may still be unknown; the few rows that have enough of it are looked up.
    inside = np.add.reduceat(likely, runs.bounds[:-1], dtype=np.int64) >= threshold * runs.sizes - TOLERANCE
    rest = select_runs(runs, inside)
    if len(rest.sizes):
        found, _ = _look_up(rest.hashes, known.union)
        inside[inside] = np.add.reduceat(found, rest.bounds[:-1], dtype=np.int64) >= threshold * rest.sizes - TOLERANCE
    return inside


def _look_up(
    values: NDArray[np.unsignedinteger], table: NDArray[np.unsignedinteger]
) -> tuple[NDArray[np.bool_], Numbers]:
    """Tell which values are in a sorted table, and where."""
    places = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return table[places] == values, places


def _compare_all(runs: Runs, known: HeldOut, threshold: float) -> tuple[Numbers, Numbers, NDArray[np.float64]]:
    """Return the pairs of a row and a held-out set that are alike enough, with their Jaccard index."""
    rows, others = _find_candidates(runs, known, threshold)
    # The row's hashes, once for each of its candidates, under the candidate's number.
    sizes = runs.sizes[rows]
    places = _count_up(runs.bounds[rows], sizes)
    keys = np.repeat(others.astype(np.uint64), sizes) << HASH_BITS | runs.hashes[places].astype(np.uint64)
    found, _ = _look_up(keys, known.keyed)
    common = np.add.reduceat(found, np.cumsum(sizes) - sizes, dtype=np.int64) if len(rows) else sizes
    jaccard = common / (sizes + known.sizes[others] - common)
    alike = jaccard >= threshold
    return rows[alike], others[alike], jaccard[alike]


def _find_candidates(runs: Runs, known: HeldOut, threshold: float) -> tuple[Numbers, Numbers]:
    """Return pairs of a row and a held-out set that share one of the row's rarest hashes."""
    sizes = runs.sizes
    owners = np.repeat(np.arange(len(sizes)), sizes)
    found, places = _look_up(runs.hashes, known.union)
    num_owners = np.where(found, known.bounds[places + 1] - known.bounds[places], 0)
    order = np.lexsort((num_owners, owners))
    rarity = np.arange(len(owners)) - np.repeat(runs.bounds[:-1], sizes)
    num_rarest = sizes - np.ceil(threshold * sizes - TOLERANCE).astype(np.int64) + 1
    chosen = order[rarity < num_rarest[owners]]
    counts = num_owners[chosen]
    others = known.owners[_count_up(known.bounds[places[chosen]], counts)]
    pairs = np.unique(np.repeat(owners[chosen], counts) * len(known.sizes) + others)
    return pairs // len(known.sizes), pairs % len(known.sizes)


def _count_up(starts: Numbers, counts: Numbers) -> Numbers:
    """Return start, start + 1, … for each start, as many as its count."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
