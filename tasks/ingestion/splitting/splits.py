"""Which conversations are trained and which are held out, each exactly once.

Every row of the index gets one side, as a code (TRAIN, EVAL and so on); texts are not needed here. The held-out part is
chosen by rank: conversations are ordered by sha256 of seed and example_id, and the first ones are held out. So the
choice depends on the seed and the contents alone; neither the order of the rows, nor the number of copies of one,
matters, and a row added later moves at most one other row across the border.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.ingestion.splitting.index import Index, Mask, Places
from tasks.ingestion.splitting.ranks import Ranks, find_border, first_bits, rank_ids

TRAIN, EVAL, DUPLICATE, LEAKED, UNUSED = range(5)
"""UNUSED: of a separate held-out dataset beyond the most that are evaluated; neither evaluated nor trained."""
KEY_BYTES = 16
IDS_AT_ONCE = 2_000_000
"""example_ids that are compared with each other in memory: about 200 MB."""
RANKS_KEPT = 16_000_000
"""Where there are more, ranks are made twice: 16 bytes each."""
KEYS_AT_ONCE = 200_000
"""Held-out conversations that are looked for at once."""

Sides = NDArray[np.uint8]


def initial_sides(index: Index) -> Sides:
    """Train everything but the copies within a dataset."""
    sides = np.full(index.num_rows, TRAIN, dtype=np.uint8)
    for dataset in range(len(index.bounds) - 1):
        mark_copies(index, select(index, sides, TRAIN, dataset=dataset), sides)
    return sides


def select(index: Index, sides: Sides, *group: int, dataset: int | None = None) -> Mask:
    """Tell which rows are on these sides, of one dataset or of all."""
    rows = np.zeros(len(sides), dtype=np.bool_)
    for side in group:
        rows |= sides == side
    if dataset is not None:
        rows[: index.bounds[dataset]] = False
        rows[index.bounds[dataset + 1] :] = False
    return rows


def mark_copies(index: Index, rows: Mask, sides: Sides) -> None:
    """Mark those of the rows that are not the first of their example_id.

    Where there are more than IDS_AT_ONCE, the index is read several times, and each time those are compared whose ids
    are in one range of values.
    """
    num_ranges = -(-int(np.count_nonzero(rows)) // IDS_AT_ONCE)
    for number in range(num_ranges):
        all_ids, all_places = [np.zeros((0, 2), dtype=np.uint64)], [np.zeros(0, dtype=np.int64)]
        for places, frame in index.read("example_id", rows=rows):
            ids = _read_ids(frame["example_id"])
            own = (ids[:, 0] >> np.uint64(32)) * np.uint64(num_ranges) >> np.uint64(32) == number
            ids, places = ids[own], places[own]
            # Many copies of one row would else come together, in whatever range it is.
            first = find_first(ids)
            sides[places[~first]] = DUPLICATE
            all_ids.append(ids[first])
            all_places.append(places[first])
        sides[np.concatenate(all_places)[~find_first(np.concatenate(all_ids))]] = DUPLICATE


def _read_ids(ids: pl.Series) -> NDArray[np.uint64]:
    """Return the two halves of each example_id, as numbers."""
    halves = (ids.bin.head(8), ids.bin.tail(8))
    return np.stack([half.bin.reinterpret(dtype=pl.UInt64, endianness="big").to_numpy() for half in halves], axis=1)


def find_first(ids: NDArray[np.uint64]) -> Mask:
    """Tell which ids, two numbers each, occur for the first time."""
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: of equal ids the first one comes first
    same = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
    first = np.ones(len(ids), dtype=np.bool_)
    first[order[1:][same]] = False
    return first


def choose(index: Index, rows: Mask, num_rows: int, seed: int) -> Mask:
    """Tell which `num_rows` of these rows, of different example_ids, are chosen: those of the smallest ranks."""
    chosen = np.zeros(index.num_rows, dtype=np.bool_)
    if num_rows <= 0:
        return chosen
    read = partial(_read_ranks, index, rows, seed)
    kept = list(read()) if np.count_nonzero(rows) <= RANKS_KEPT else None
    border, left = find_border((ranks for _, ranks in kept or read()), num_rows)
    near_places, near_ranks = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
    for places, ranks in kept or read():
        bits = first_bits(ranks)
        chosen[places[bits < border]] = True
        near_places.append(places[bits == border])
        near_ranks.append(ranks[bits == border])
    nearest = np.argsort(np.concatenate(near_ranks), kind="stable")[:left]
    chosen[np.concatenate(near_places)[nearest]] = True
    return chosen


def _read_ranks(index: Index, rows: Mask, seed: int) -> Iterator[tuple[Places, Ranks]]:
    """Yield places and ranks of the rows."""
    for places, frame in index.read("example_id", rows=rows):
        yield places, rank_ids(frame["example_id"].bin.encode("hex").to_list(), str(seed))


def count_held_out(num_rows: int, fraction: float, max_rows: int) -> int:
    """Return how many of `num_rows` are held out: at least one, and one stays to be trained; with fraction 0 none."""
    if fraction == 0:
        return 0
    return max(0, min(max(1, round(fraction * num_rows)), max_rows, num_rows - 1))


def split_dataset(index: Index, sides: Sides, dataset: int, num_rows: int, seed: int) -> None:
    """Hold out a seeded part of one dataset's rows; its copies are gone, so that none is on both sides."""
    sides[choose(index, select(index, sides, TRAIN, dataset=dataset), num_rows, seed)] = EVAL


def hold_out(index: Index, sides: Sides, dataset: int, max_rows: int, seed: int) -> None:
    """Evaluate a separate held-out dataset: a seeded choice of at most `max_rows` conversations."""
    rows = select(index, sides, TRAIN, dataset=dataset)
    sides[rows] = UNUSED
    sides[choose(index, rows, max_rows, seed)] = EVAL


def remove_leaks(index: Index, sides: Sides) -> None:
    """Take out what is on both sides, and what several datasets have, so that it is in one place.

    What is held out of any dataset, evaluated or not, is a leak in the training part of each: also where it is the
    same only up to case and spaces. A conversation held out of two datasets, or trained from two, stays with the first
    one.
    """
    mark_leaks(index, sides)
    if len(index.bounds) > 2:
        for side in (EVAL, TRAIN):
            mark_copies(index, select(index, sides, side), sides)


def mark_leaks(index: Index, sides: Sides) -> None:
    """Mark the training rows with a held-out conversation in them, evaluated or not.

    A row leaks when it is a held-out conversation, or begins with one, up to case, width, spaces and system
    message.
    """
    for held_out in _read_held_out(index, select(index, sides, EVAL, UNUSED)):
        known = set(held_out.to_list())
        for places, frame in index.read("keys", "num_turns", rows=select(index, sides, TRAIN)):
            leaked = frame["keys"].is_in(held_out.implode()).to_numpy(writable=True)
            longer = np.flatnonzero(frame["num_turns"] > 1)
            for place, keys in zip(longer.tolist(), frame["keys"].gather(longer), strict=True):
                leaked[place] = not known.isdisjoint(split_keys(keys))
            sides[places[leaked]] = LEAKED


def _read_held_out(index: Index, rows: Mask) -> Iterator[pl.Series]:
    """Yield the keys of whole held-out conversations, about KEYS_AT_ONCE at a time."""
    waiting: list[pl.Series] = []
    for _, frame in index.read("keys", rows=rows):
        waiting.append(frame["keys"].bin.tail(KEY_BYTES))
        if sum(map(len, waiting)) >= KEYS_AT_ONCE:
            yield pl.concat(waiting).unique()
            waiting = []
    if waiting:
        yield pl.concat(waiting).unique()


def split_keys(keys: bytes) -> Iterable[bytes]:
    """Return the loose keys of a conversation, up to each answer."""
    return (keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))


def count_shared_prompts(index: Index, train: Mask, held_out: Mask) -> int:
    """Return how many held-out prompts a training row has too, with another answer."""
    prompts = pl.concat(
        [pl.Series(dtype=pl.Binary), *(frame["prompt_key"] for _, frame in index.read("prompt_key", rows=held_out))]
    )
    shared = np.zeros(len(prompts), dtype=np.bool_)
    for _, frame in index.read("prompt_key", rows=train):
        shared |= prompts.is_in(frame["prompt_key"].implode()).to_numpy()
    return int(np.count_nonzero(shared))
