"""Held-out conversations that a training row nearly repeats: found by MinHash, measured exactly, reported.

A conversation is the set of its runs of three words, after normalization; likeness is the Jaccard index of two
sets. In scripts that write no spaces a character is a word. Every training row is first compared with the union U of
all held-out sets: where J(A, B) is at least t, at least t of A lies in B, and so in U. That bound loses nothing, and
spares most rows their MinHash.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.ingestion.identity import Conversation, normalize_text

RUN = 3
# Begins every conversation, so that the shortest ones have a run too.
START = "_ _ _ "
# Chinese, Japanese, Korean, Thai, Lao, Burmese, Khmer.
_UNSPACED = r"\x{2e80}-\x{9fff}\x{ac00}-\x{d7af}\x{f900}-\x{faff}\x{0e00}-\x{0eff}\x{1000}-\x{109f}\x{1780}-\x{17ff}"
WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"
THRESHOLD = 0.8
NUM_PERMUTATIONS = 128
# Bands and rows of a band: a pair is a candidate with probability 1 - (1 - J**8)**16, which is 0.95 at a Jaccard
# index of 0.8, 0.9999 at 0.9 and 0.06 at 0.5.
BANDS = (16, 8)
# Odd multiplier of the polynomial that hashes a run (the fractional part of the golden ratio times 2**64).
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
HASH_BITS = np.uint64(32)
ROWS_AT_ONCE = 5000

Hashes = NDArray[np.uint64]


class NearDuplicate(NamedTuple):
    """A held-out row and the training row most like it."""

    eval_place: str
    train_place: str
    jaccard: float


def find_near_duplicates(
    train: Sequence[Conversation], held_out: Sequence[Conversation], threshold: float = THRESHOLD
) -> list[NearDuplicate]:
    """Return the held-out rows with a training row of a Jaccard index of at least `threshold`, the likest first.

    Candidates come from MinHash with banding (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3),
    which may miss a pair near the threshold (see BANDS); each candidate's index is then computed exactly.
    """
    if not train or not held_out:
        return []
    import datasketch  # two seconds of import that a plain look at rows need not pay

    eval_sets = _make_sets(held_out)
    union = _sort_unique(np.concatenate(eval_sets))
    index = datasketch.MinHashLSH(num_perm=NUM_PERMUTATIONS, params=BANDS)
    sketch = datasketch.MinHash(num_perm=NUM_PERMUTATIONS, hashfunc=int)
    for number, hashes in enumerate(eval_sets):
        index.insert(number, _sketch(sketch, hashes))
    best: dict[int, NearDuplicate] = {}
    for start in range(0, len(train), ROWS_AT_ONCE):
        sets = _make_sets(train[start : start + ROWS_AT_ONCE])
        for place in _find_inside(sets, union, threshold):
            row, hashes = train[start + place], sets[place]
            for number in index.query(_sketch(sketch, hashes)):
                jaccard = _compare(hashes, eval_sets[number])
                if jaccard >= threshold and (number not in best or jaccard > best[number].jaccard):
                    other = held_out[number]
                    best[number] = NearDuplicate(f"{other.source}:{other.line}", f"{row.source}:{row.line}", jaccard)
    return sorted(best.values(), key=lambda pair: (-pair.jaccard, pair.eval_place))


def _make_sets(rows: Sequence[Conversation]) -> list[Hashes]:
    """Return the sorted 32-bit hashes of each conversation's runs; no set is empty."""
    words = pl.Series([START + _join_text(row) for row in rows]).str.extract_all(WORD)
    codes = words.explode().hash(seed=0).to_numpy()
    owners = np.repeat(np.arange(len(rows), dtype=np.uint64), words.list.len().to_numpy())
    num_runs = len(codes) - RUN + 1
    runs: Hashes = np.zeros(num_runs, dtype=np.uint64)
    for offset in range(RUN):
        runs = (runs + codes[offset : offset + num_runs]) * MULTIPLIER
    inside = owners[:num_runs] == owners[RUN - 1 :]
    keyed = _sort_unique((owners[:num_runs] << HASH_BITS | runs >> HASH_BITS)[inside])
    borders = np.searchsorted(keyed, np.arange(1, len(rows), dtype=np.uint64) << HASH_BITS)
    return np.split(keyed & np.uint64(2**32 - 1), borders)


def _sort_unique(values: Hashes) -> Hashes:
    """Sort in place and drop repetitions; np.unique hashes first and takes five times as long."""
    values.sort()
    return values[np.concatenate(([True], values[1:] != values[:-1]))]


def _join_text(row: Conversation) -> str:
    """Return the normalized text of all messages but the system's."""
    messages: list[dict[str, Any]] = json.loads(row.messages)
    return normalize_text("\n".join(message["content"] for message in messages if message["role"] != "system"))


def _find_inside(sets: list[Hashes], union: Hashes, threshold: float) -> list[int]:
    """Return the places of the sets of which at least `threshold` lies in the union."""
    sizes = np.array([len(hashes) for hashes in sets])
    known = _find_common(np.concatenate(sets), union)
    counts = np.add.reduceat(known, np.concatenate(([0], np.cumsum(sizes)[:-1])), dtype=np.int64)
    return np.flatnonzero(counts >= threshold * sizes).tolist()


def _find_common(hashes: Hashes, others: Hashes) -> NDArray[np.bool_]:
    """Tell which of `hashes` are in the sorted `others`."""
    places = np.minimum(np.searchsorted(others, hashes), len(others) - 1)
    return others[places] == hashes


def _compare(hashes: Hashes, others: Hashes) -> float:
    """Return the Jaccard index of two sets."""
    common = int(np.count_nonzero(_find_common(hashes, others)))
    return common / (len(hashes) + len(others) - common)


def _sketch(sketch: Any, hashes: Hashes) -> Any:
    """Fill the MinHash with a set; it is used again for the next one."""
    sketch.clear()
    sketch.update_batch(hashes.tolist())
    return sketch
