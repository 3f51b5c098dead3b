"""Held-out conversations that a training row nearly repeats: found and measured exactly, and reported.

A conversation is the set of its runs of three words (see shingles.py); likeness is the Jaccard index of two sets. No
pair is missed, and few are compared, by two bounds. Where J(A, B) is at least t, at least t of A lies in B, and so in
the union of all held-out sets: most training rows end there. And where the members of all sets are put in one order,
the first len(A) - ceil(t * len(A)) + 1 of A and the first as many of B have one in common (prefix filtering; Chaudhuri
et al. 2006, Bayardo et al. 2007): in the order of rarity, few pairs do.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.ingestion.rows.shingles import HASH_BITS, Shingles, select_shingles

THRESHOLD = 0.8
# How much of a hash is looked at first.
TABLE_BITS = 24
# Hashes, where every row is like every held-out one: what they need stays below 200 MB.
COMPARED_AT_ONCE = 4_000_000
# Products of a threshold and a size are rounded.
TOLERANCE = 1e-9

Numbers = NDArray[np.int64]


class HeldOutShingles(NamedTuple):
    """Held-out sets, and who has a hash."""

    sizes: Numbers
    keyed: NDArray[np.uint64]
    """Sorted: number of the set in the upper half, hash in the lower."""
    union: NDArray[np.uint32]
    """Sorted hashes of all sets."""
    num_owners: Numbers
    """How many sets have each hash of the union."""
    bounds: Numbers
    """Where the owners of each hash of the union begin, of those that have it among their rarest."""
    owners: Numbers
    table: NDArray[np.bool_]
    """Whether a hash of the union begins with these bits: an answer at the price of one look."""


class BestMatch(NamedTuple):
    """The training row most like a held-out row."""

    held_out: int
    train: int
    jaccard: float


def find_near_duplicates(
    train: Iterable[tuple[Numbers, Shingles]], held_out: Shingles, threshold: float = THRESHOLD
) -> list[BestMatch]:
    """Return the held-out sets with a training set of a Jaccard index of at least `threshold`.

    Args:
        train: the training sets with their numbers, some at a time; numbers rise.
        held_out: all held-out sets.
        threshold: above 0.

    Returns:
        Pairs of numbers, the nearest first; of equally like training sets the first one.
    """
    if not len(held_out.hashes):
        return []
    return keep_best(_find_pairs(train, index_held_out(held_out, threshold), threshold))


def keep_best(pairs: Iterable[BestMatch]) -> list[BestMatch]:
    """Keep for each held-out row the pair of the largest index, the nearest first; of equally like ones the first."""
    best: dict[int, BestMatch] = {}
    for pair in pairs:
        if pair.held_out not in best or pair.jaccard > best[pair.held_out].jaccard:
            best[pair.held_out] = pair
    return sorted(best.values(), key=lambda pair: (-pair.jaccard, pair.held_out))


def _find_pairs(
    train: Iterable[tuple[Numbers, Shingles]], known: HeldOutShingles, threshold: float
) -> Iterator[BestMatch]:
    """Yield all pairs that are alike enough; the rows rise."""
    for numbers, runs in train:
        inside = _find_inside(runs, known, threshold)
        if not inside.any():
            continue
        own = numbers[inside]
        for rows, others, jaccard in _compare_all(select_shingles(runs, inside), known, threshold):
            for row, other, index in zip(own[rows].tolist(), others.tolist(), jaccard.tolist(), strict=True):
                yield BestMatch(other, row, index)


def index_held_out(runs: Shingles, threshold: float) -> HeldOutShingles:
    """Make the tables by which training sets are compared with all held-out sets at once."""
    union, places, num_owners = np.unique(runs.hashes, return_inverse=True, return_counts=True)
    rarest = _find_rarest(runs, num_owners[places], threshold)
    owners = np.repeat(np.arange(len(runs.sizes)), runs.sizes)
    by_hash = rarest[np.argsort(places[rarest], kind="stable")]
    table = np.zeros(1 << TABLE_BITS, dtype=np.bool_)
    table[union >> (32 - TABLE_BITS)] = True
    return HeldOutShingles(
        sizes=runs.sizes,
        keyed=owners.astype(np.uint64) << HASH_BITS | runs.hashes.astype(np.uint64),
        union=union,
        num_owners=num_owners,
        bounds=np.searchsorted(places[by_hash], np.arange(len(union) + 1)),
        owners=owners[by_hash],
        table=table,
    )


def _find_rarest(runs: Shingles, num_owners: Numbers, threshold: float) -> Numbers:
    """Return the places of each set's rarest hashes, as many as must hold one of every set that is alike enough.

    Rarity is the number of held-out sets that have a hash; of two with the same number the smaller hash comes first.
    """
    sizes = runs.sizes
    owners = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((num_owners, owners))  # stable: hashes of a set are sorted
    rarity = np.arange(len(owners)) - np.repeat(runs.bounds[:-1], sizes)
    num_rarest = sizes - np.ceil(threshold * sizes - TOLERANCE).astype(np.int64) + 1
    return order[rarity < num_rarest[owners]]


def _find_inside(runs: Shingles, known: HeldOutShingles, threshold: float) -> NDArray[np.bool_]:
    """Tell of which sets at least `threshold` lies in the union."""
    if not len(runs.sizes):
        return np.zeros(0, dtype=np.bool_)
    likely = known.table[runs.hashes >> (32 - TABLE_BITS)]
    # What the table lets pass may still be unknown; the few rows that have enough of it are looked up.
    inside = np.add.reduceat(likely, runs.bounds[:-1], dtype=np.int64) >= threshold * runs.sizes - TOLERANCE
    rest = select_shingles(runs, inside)
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


def _compare_all(
    runs: Shingles, known: HeldOutShingles, threshold: float
) -> Iterator[tuple[Numbers, Numbers, NDArray[np.float64]]]:
    """Yield pairs of a row and a held-out set that are alike enough, with their Jaccard index."""
    for rows, others in _find_candidates(runs, known, threshold):
        for some in _cut(runs.sizes[rows]):
            jaccard = _measure(runs, known, rows[some], others[some])
            alike = jaccard >= threshold
            yield rows[some][alike], others[some][alike], jaccard[alike]


def _measure(runs: Shingles, known: HeldOutShingles, rows: Numbers, others: Numbers) -> NDArray[np.float64]:
    """Return the Jaccard index of each pair."""
    # The row's hashes, once for each of its candidates, under the candidate's number.
    sizes = runs.sizes[rows]
    hashes = runs.hashes[_count_up(runs.bounds[rows], sizes)].astype(np.uint64)
    found, _ = _look_up(np.repeat(others.astype(np.uint64), sizes) << HASH_BITS | hashes, known.keyed)
    common = np.add.reduceat(found, np.cumsum(sizes) - sizes, dtype=np.int64)
    jaccard: NDArray[np.float64] = common / (sizes + known.sizes[others] - common)
    return jaccard


def _find_candidates(runs: Shingles, known: HeldOutShingles, threshold: float) -> Iterator[tuple[Numbers, Numbers]]:
    """Yield pairs of a row and a held-out set that share one of the rarest hashes of both, and are alike in size."""
    sizes = runs.sizes
    owners = np.repeat(np.arange(len(sizes)), sizes)
    found, places = _look_up(runs.hashes, known.union)
    rarest = _find_rarest(runs, np.where(found, known.num_owners[places], 0), threshold)
    rarest = rarest[found[rarest]]
    starts, counts = known.bounds[places[rarest]], np.diff(known.bounds)[places[rarest]]
    for some in _cut(counts):
        others = known.owners[_count_up(starts[some], counts[some])]
        pairs = np.unique(np.repeat(owners[rarest[some]], counts[some]) * len(known.sizes) + others)
        rows, others = pairs // len(known.sizes), pairs % len(known.sizes)
        small, large = np.minimum(sizes[rows], known.sizes[others]), np.maximum(sizes[rows], known.sizes[others])
        possible = small >= threshold * large - TOLERANCE
        yield rows[possible], others[possible]


def _cut(amounts: Numbers) -> Iterator[slice]:
    """Yield slices of about COMPARED_AT_ONCE in sum."""
    borders = np.flatnonzero(np.diff(np.cumsum(amounts) // COMPARED_AT_ONCE)) + 1
    ends = [*borders.tolist(), len(amounts)]
    return (slice(start, end) for start, end in zip([0, *ends], ends, strict=False) if start < end)


def _count_up(starts: Numbers, counts: Numbers) -> Numbers:
    """Return start, start + 1, … for each start, as many as its count."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
