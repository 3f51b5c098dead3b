"""Statistics of rows (lengths, turns, findings), counted piece by piece: their size does not grow with the rows."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.ingestion.pieces import PROBLEM_BITS
from tasks.ingestion.rows.screening import KINDS
from tasks.ingestion.splitting.index import Index, Mask, Places

PLACES_SHOWN = 10
MIN_ROWS_FOR_OUTLIERS = 20
# Tukey's outer fences: quartiles and three interquartile ranges beyond, here of the logarithm of the length.
FENCE = 3.0
PERCENTILES = (10, 50, 90, 99)
# The columns of which the distribution is reported, by their names there.
MEASURES = {"prompt_characters": "prompt_characters", "answer_characters": "answer_characters", "turns": "num_turns"}
COLUMNS = ("num_turns", "prompt_characters", "answer_characters", "problems", "found", "has_tools")

Lengths = NDArray[np.int64]


@dataclass
class Flagged:
    """How many rows have something, and the places of the first ones."""

    num_rows: int = 0
    places: list[int] = field(default_factory=list)

    def add(self, places: Places) -> None:
        """Count further rows."""
        self.num_rows += len(places)
        self.places += places[: PLACES_SHOWN - len(self.places)].tolist()

    def __add__(self, other: "Flagged") -> "Flagged":
        return Flagged(self.num_rows + other.num_rows, (self.places + other.places)[:PLACES_SHOWN])


@dataclass
class RowStatistics:
    """What the rows of one side of the split are like."""

    num_rows: int = 0
    num_with_tools: int = 0
    num_multi_turn: int = 0
    measures: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in MEASURES})
    """By measure: rows by value."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Rows by characters in all."""
    problems: dict[str, Flagged] = field(default_factory=lambda: {code: Flagged() for code in PROBLEM_BITS})
    """By code of quality.TEXT_PROBLEMS."""
    found: dict[str, Flagged] = field(default_factory=lambda: {kind: Flagged() for kind in KINDS})
    """By kind of personal data and secrets."""
    num_found: Counter[str] = field(default_factory=Counter)
    """By kind: how often, several in one row included."""

    def add(self, places: Places, rows: pl.DataFrame) -> None:
        """Count the rows of a piece, of which COLUMNS are needed."""
        self.num_rows += rows.height
        self.num_with_tools += int(rows["has_tools"].sum())
        self.num_multi_turn += int((rows["num_turns"] > 1).sum())
        for name, column in MEASURES.items():
            self.measures[name].update(_count(rows[column].to_numpy()))
        self.lengths.update(_count(_add_up(rows)))
        problems = rows["problems"].to_numpy()
        for code, bit in PROBLEM_BITS.items():
            self.problems[code].add(places[(problems & bit).astype(np.bool_)])
        holding = np.flatnonzero(rows["found"] != "")
        kinds_by_row = [text.split(",") for text in rows["found"].gather(holding)]
        for kinds in kinds_by_row:
            self.num_found.update(kinds)
        for kind, flagged in self.found.items():
            flagged.add(places[holding[[kind in kinds for kinds in kinds_by_row]]])

    def describe(self) -> dict[str, Any]:
        """Return the statistics as plain data: turns, tools and lengths in characters."""
        counts = {
            "num_rows": self.num_rows,
            "num_with_tools": self.num_with_tools,
            "num_multi_turn": self.num_multi_turn,
        }
        return counts | {name: describe_counts(numbers) for name, numbers in self.measures.items()}


def gather_statistics(index: Index, rows: Mask) -> RowStatistics:
    """Return what some rows of the index are like."""
    statistics = RowStatistics()
    for places, frame in index.read(*COLUMNS, rows=rows):
        statistics.add(places, frame)
    return statistics


def find_outliers(index: Index, train: Mask, held_out: Mask, lengths: Counter[int]) -> Flagged:
    """Return the rows with a length in characters outside the outer fences, the trained ones first.

    Args:
        index: of all rows.
        train: the training rows.
        held_out: the held-out ones.
        lengths: rows of both by characters in all.
    """
    low, high = find_fences(lengths)
    outliers = Flagged()
    if not any(_is_outside(np.array(list(lengths)), low, high)):
        return outliers
    for side in (train, held_out):
        for places, frame in index.read("prompt_characters", "answer_characters", rows=side):
            outliers.add(places[_is_outside(_add_up(frame), low, high)])
    return outliers


def find_fences(lengths: Counter[int]) -> tuple[float, float]:
    """Return between which logarithms of length rows are no outliers: everything, where rows are few."""
    if lengths.total() < MIN_ROWS_FOR_OUTLIERS:
        return -math.inf, math.inf
    low, high = (_interpolate(lengths, part) for part in (0.25, 0.75))
    # Rows of nearly one length have no spread to measure by: a factor of two is allowed at least.
    reach = max(FENCE * (high - low), math.log(2.0))
    return low - reach, high + reach


def describe_counts(numbers: Counter[int]) -> dict[str, int | None]:
    """Return the extremes, percentiles and sum of values, given with how often they occur."""
    names = ["min", *(f"p{part}" for part in PERCENTILES), "max"]
    if not numbers:
        return {**dict.fromkeys(names), "total": 0}
    values, ends = _sort(numbers)
    last = int(ends[-1]) - 1
    # The value nearest to the percentile: a row has it.
    ranks = [0, *(math.floor(part / 100 * last + 0.5) for part in PERCENTILES), last]
    found = values[np.searchsorted(ends, ranks, side="right")].tolist()
    return {**dict(zip(names, found, strict=True)), "total": sum(value * number for value, number in numbers.items())}


def _interpolate(lengths: Counter[int], part: float) -> float:
    """Return a quantile of the logarithms of lengths, between two rows in proportion."""
    values, ends = _sort(lengths)
    rank = part * (int(ends[-1]) - 1)
    low, high = np.log1p(values[np.searchsorted(ends, [math.floor(rank), math.ceil(rank)], side="right")])
    return float(low + (high - low) * (rank % 1))


def _sort(numbers: Counter[int]) -> tuple[Lengths, Lengths]:
    """Return the values that occur, rising, and how many rows have one up to each."""
    values = np.array(sorted(numbers), dtype=np.int64)
    return values, np.cumsum([numbers[value] for value in values.tolist()])


def _is_outside(lengths: Lengths, low: float, high: float) -> NDArray[np.bool_]:
    """Tell which lengths are beyond the fences."""
    logarithms = np.log1p(lengths)
    return (logarithms < low) | (logarithms > high)


def _add_up(rows: pl.DataFrame) -> Lengths:
    """Return the characters of each row."""
    return (rows["prompt_characters"].cast(pl.Int64) + rows["answer_characters"].cast(pl.Int64)).to_numpy()


def _count(values: NDArray[np.integer[Any]]) -> dict[int, int]:
    """Return how often each value occurs."""
    distinct, numbers = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), numbers.tolist(), strict=True))
