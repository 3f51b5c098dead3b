"""Which conversations are trained and which are held out, each exactly once.

Rows are an index (see pieces.INDEX_SCHEMA), and a split says for every row its one side, as a code; texts are not
needed here. The held-out part is chosen by rank: conversations are ordered by sha256 of seed and example_id, and the
first ones are held out. So the choice depends on the seed and the contents alone; neither the order of the rows, nor
the number of copies of one, matters, and a row added later moves at most one other row across the border.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

TRAIN, EVAL, DUPLICATE, LEAKED, UNUSED = range(5)
"""UNUSED: of a separate held-out dataset beyond the most that are evaluated; neither evaluated nor trained."""
KEY_BYTES = 16
IDS_AT_ONCE = 100_000

Sides = NDArray[np.uint8]


def find_first(rows: pl.DataFrame) -> NDArray[np.bool_]:
    """Tell which rows are the first of their example_id."""
    return rows["example_id"].is_first_distinct().to_numpy()


def rank(ids: pl.Series, salt: str) -> NDArray[np.uint64]:
    """Return the first 64 bits of the sha256 of salt and each example_id."""
    ranks = np.empty(len(ids), dtype=np.uint64)
    for start in range(0, len(ids), IDS_AT_ONCE):
        texts = ids.slice(start, IDS_AT_ONCE).bin.encode("hex").to_list()
        digests = b"".join([hashlib.sha256(f"{salt}:{text}".encode()).digest()[:8] for text in texts])
        ranks[start : start + len(texts)] = np.frombuffer(digests, dtype=">u8")
    return ranks


def choose(ids: pl.Series, num_rows: int, seed: int) -> NDArray[np.bool_]:
    """Tell which `num_rows` of different example_ids are chosen by seed and content."""
    chosen = np.zeros(len(ids), dtype=np.bool_)
    if num_rows > 0:
        chosen[np.argsort(rank(ids, str(seed)), kind="stable")[:num_rows]] = True
    return chosen


def count_held_out(num_rows: int, fraction: float, max_rows: int) -> int:
    """Return how many of `num_rows` are held out: at least one, and one stays to be trained."""
    return max(0, min(max(1, round(fraction * num_rows)), max_rows, num_rows - 1))


def split_rows(rows: pl.DataFrame, fraction: float, max_rows: int, seed: int) -> Sides:
    """Hold out a seeded part of one dataset.

    Duplicates go first, so that no conversation can be on both sides; what is left in training that a held-out
    conversation equals up to case and spaces is a leak, and goes too.
    """
    sides = keep_all(rows)
    kept = np.flatnonzero(sides == TRAIN)
    num_rows = count_held_out(len(kept), fraction, max_rows)
    sides[kept[choose(rows["example_id"].gather(kept), num_rows, seed)]] = EVAL
    drop_leaks(rows, sides)
    return sides


def keep_all(rows: pl.DataFrame) -> Sides:
    """Train all of a dataset but its duplicates."""
    return np.where(find_first(rows), TRAIN, DUPLICATE).astype(np.uint8)


def hold_out(rows: pl.DataFrame, max_rows: int, seed: int) -> Sides:
    """Evaluate a separate held-out dataset: a seeded choice of at most `max_rows` conversations."""
    sides = keep_all(rows)
    kept = np.flatnonzero(sides == TRAIN)
    sides[kept] = np.where(choose(rows["example_id"].gather(kept), max_rows, seed), EVAL, UNUSED)
    return sides


def separate(rows: pl.DataFrame, splits: Sequence[Sides]) -> Sides:
    """Take out what several datasets have, so that it is in one place.

    A conversation held out of two datasets, or trained from two, stays with the first one. What is held out of any
    dataset, evaluated or not, is a leak in the training part of every other.

    Args:
        rows: of all datasets, one after the other.
        splits: each dataset's sides.
    """
    sides = np.concatenate(splits)
    drop_leaks(rows, sides)
    for group in ((EVAL, UNUSED), (TRAIN,)):
        places = np.flatnonzero(np.isin(sides, group))
        sides[places[~find_first(rows[places])]] = DUPLICATE
    return sides


def drop_leaks(rows: pl.DataFrame, sides: Sides) -> None:
    """Mark the training rows with a held-out conversation in them, evaluated or not.

    A row leaks when it is a held-out conversation, or begins with one, up to case, width, spaces and system
    message.
    """
    held_out = rows["keys"].filter(np.isin(sides, (EVAL, UNUSED))).bin.tail(KEY_BYTES).unique()
    train = sides == TRAIN
    leaked = rows["keys"].is_in(held_out.implode()).to_numpy()
    longer = np.flatnonzero(train & (rows["num_turns"] > 1).to_numpy())
    known = set(held_out.to_list())
    for place, keys in zip(longer.tolist(), rows["keys"].gather(longer), strict=True):
        leaked[place] = not known.isdisjoint(split_keys(keys))
    sides[train & leaked] = LEAKED


def split_keys(keys: bytes) -> Iterable[bytes]:
    """Return the loose keys of a conversation, up to each answer."""
    return (keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))


def count_shared_prompts(train: pl.DataFrame, held_out: pl.DataFrame) -> int:
    """Return how many held-out prompts a training row has too, with another answer."""
    return int(held_out["prompt_key"].is_in(train["prompt_key"].implode()).sum())
