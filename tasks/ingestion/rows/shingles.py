"""Texts as sets of hashed runs of three words: what near duplicates are found by.

A word is a run of letters, digits and underscores; in scripts that write no spaces a character is a word. Many texts
are hashed at once: their UTF-8 bytes lie one after the other, and a word is hashed eight bytes at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

RUN = 3
# Begins every text, so that the shortest ones have a run too.
START = b" _ _ _ "
# Chinese, Japanese, Korean, Thai, Lao, Burmese, Khmer.
_UNSPACED = r"\x{2e80}-\x{9fff}\x{ac00}-\x{d7af}\x{f900}-\x{faff}\x{0e00}-\x{0eff}\x{1000}-\x{109f}\x{1780}-\x{17ff}"
WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+"
# Odd multiplier (the fractional part of the golden ratio times 2**64).
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
HASH_BITS = np.uint64(32)
HASH_MASK = np.uint64(2**32 - 1)
CHARACTERS_AT_ONCE = 1 << 17
"""What these need fits into a core's cache."""
SPACE = 32
# Every ASCII character that belongs to no word becomes a space.
SPACED = bytes(byte if byte >= 128 or chr(byte).isalnum() or byte == ord("_") else SPACE for byte in range(256))
EIGHT = 8
# The bytes of a word among the eight that begin with it, by its length.
MASKS = np.array([(1 << 8 * length) - 1 for length in range(EIGHT + 1)], dtype=np.uint64)

U64 = NDArray[np.uint64]
Places = NDArray[np.int64]


class Shingles(NamedTuple):
    """The sets of some texts, one after the other; `bounds` has one more entry than there are texts."""

    hashes: NDArray[np.uint32]
    """Each set is sorted, and never empty."""
    bounds: Places

    @property
    def sizes(self) -> Places:
        """Hashes of each set."""
        return np.diff(self.bounds)


def hash_shingles(texts: Sequence[bytes]) -> Shingles:
    """Return the set of each text; texts are normalized and UTF-8."""
    parts: list[Shingles] = []
    texts = _space_words(texts)
    start, size = 0, 0
    for end, text in enumerate(texts, start=1):
        size += len(text)
        if size >= CHARACTERS_AT_ONCE or end == len(texts):
            parts.append(_hash_some(texts[start:end]))
            start, size = end, 0
    return join_shingles(parts)


def join_shingles(parts: Sequence[Shingles]) -> Shingles:
    """Put the sets of several parts in one sequence."""
    hashes = [np.zeros(0, dtype=np.uint32), *(part.hashes for part in parts)]
    return Shingles(np.concatenate(hashes), _bounds([part.sizes for part in parts]))


def select_shingles(runs: Shingles, chosen: NDArray[np.bool_]) -> Shingles:
    """Keep the sets of the chosen texts."""
    sizes = runs.sizes
    return Shingles(runs.hashes[np.repeat(chosen, sizes)], _bounds([sizes[chosen]]))


def _bounds(sizes: Sequence[Places]) -> Places:
    """Return where sets of these sizes begin, and where the last one ends."""
    return np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *sizes]))


def _hash_some(texts: Sequence[bytes]) -> Shingles:
    """Hash some texts together."""
    data = np.frombuffer(b"".join([*texts, b" " * (EIGHT + 1)]).translate(SPACED), dtype=np.uint8)
    inside = data != SPACE
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[0::2], edges[1::2]
    words = _hash_words(data, starts, ends)
    text_ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
    num_words = np.diff(np.searchsorted(starts, text_ends), prepend=0)
    owners = np.repeat(np.arange(len(texts), dtype=np.uint64), num_words)
    num_runs = len(words) - RUN + 1
    runs: U64 = np.zeros(num_runs, dtype=np.uint64)
    for offset in range(RUN):
        runs += words[offset : offset + num_runs]
        runs *= MULTIPLIER
    keyed = (owners[:num_runs] << HASH_BITS | runs >> HASH_BITS)[owners[:num_runs] == owners[RUN - 1 :]]
    keyed.sort()
    keyed = keyed[np.concatenate(([True], keyed[1:] != keyed[:-1]))]
    bounds = np.searchsorted(keyed, np.arange(len(texts) + 1, dtype=np.uint64) << HASH_BITS)
    return Shingles((keyed & HASH_MASK).astype(np.uint32), bounds.astype(np.int64))


def _space_words(texts: Sequence[bytes]) -> list[bytes]:
    """Return the texts after their START; where one is not ASCII, its words with spaces between them."""
    others = [text.decode() for text in texts if not text.isascii()]
    spaced = iter(pl.Series(others, dtype=pl.String).str.extract_all(WORD).list.join(" ").to_list())
    return [START + (text if text.isascii() else next(spaced).encode()) for text in texts]


def _hash_words(data: NDArray[np.uint8], starts: Places, ends: Places) -> U64:
    """Hash each word, eight bytes at a time; eight bytes more than the last word has must be there."""
    eights = np.lib.stride_tricks.as_strided(data[:EIGHT].view("<u8"), (len(data) - EIGHT + 1,), (1,), writeable=False)
    left = ends - starts
    hashes: U64 = (eights[starts] & MASKS[np.minimum(left, EIGHT)]) * MULTIPLIER
    hashes ^= hashes >> HASH_BITS
    longer = np.flatnonzero(left > EIGHT)
    offset = EIGHT
    while len(longer):
        more = eights[starts[longer] + offset] & MASKS[np.minimum(left[longer] - offset, EIGHT)]
        mixed = (hashes[longer] + np.uint64(offset) + more) * MULTIPLIER
        hashes[longer] = mixed ^ mixed >> HASH_BITS
        offset += EIGHT
        longer = longer[left[longer] > offset]
    return hashes
