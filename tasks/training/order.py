"""The order of an epoch: over all rows, or, of a large table, over its parts and then over the rows of some of them.

A table of more than GROUPS_PER_WINDOW examples whose tokens are in parts is gone through in windows. The parts are
drawn in a random order and taken a few at a time. The rows of such a window, in the order of its parts, are cut into
LANES of equal length; each is shuffled, and the window takes a row of each lane in turn. So a step has rows of all of
the window's parts, a lane has rows of one or two of them, and ranks that divide the lanes among themselves divide the
parts. It depends on seed and epoch alone: any number of ranks, and a training that goes on, have the same steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.tokenization.token_index import count_indexed
from tasks.training.records import TrainingError

GROUPS_PER_WINDOW = 400_000
"""Examples, or pairs, that are shuffled together: eight parts of 50,000 rows. A table of no more has one window, whose
order is the one over all of its rows."""
LANES = 8
_TOLERANCE = 0.05
"""Of a share's tokens, by which shares may differ so that a lane is not divided."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class RowParts:
    """Which rows are of which part."""

    bounds: Numbers
    """[P + 1] rows before each part, and all."""
    parts_per_window: int

    def find(self, rows: Numbers) -> Numbers:
        """Return the part of each row."""
        found: Numbers = np.searchsorted(self.bounds, rows, side="right") - 1
        return found


class EpochOrder(NamedTuple):
    """Rows in the order in which an epoch takes them."""

    rows: Numbers
    """[R]"""
    lanes: Numbers
    """[R] the lane of each of them, 0 to LANES - 1; all 0 where there are no windows."""


def is_windowed(tokens: Path) -> bool:
    """Say whether the training examples of a tokens folder are gone through in windows.

    Raises:
        TrainingError: their index is damaged.
    """
    try:
        return (count_indexed(tokens / "train.parquet") or 0) > GROUPS_PER_WINDOW
    except ValueError as error:
        raise TrainingError(str(error)) from error


def count_parts_per_window(num_groups: int, num_parts: int) -> int:
    """Return how many parts make a window: as many in each as possible, of at most GROUPS_PER_WINDOW on average."""
    num_windows = -(-num_groups // GROUPS_PER_WINDOW)
    return max(1, -(-num_parts // max(1, num_windows)))


def draw_order(num_rows: int, parts: RowParts | None, *, seed: int, epoch: int) -> EpochOrder:
    """Return the order of an epoch, drawn from (seed, epoch).

    Args:
        num_rows: R.
        parts: of a table that is gone through in windows.
        seed: of the order.
        epoch: counts from 0.
    """
    generator = np.random.default_rng([seed, epoch])
    if parts is None:
        return EpochOrder(generator.permutation(num_rows), np.zeros(num_rows, np.int64))
    drawn = generator.permutation(len(parts.bounds) - 1)
    windows = [
        _mix(parts, drawn[start : start + parts.parts_per_window], generator)
        for start in range(0, len(drawn), parts.parts_per_window)
    ]
    return EpochOrder(*(np.concatenate(each) for each in zip(*windows, strict=True)))


def _mix(parts: RowParts, chosen: Numbers, generator: np.random.Generator) -> EpochOrder:
    """Return the order of a window."""
    bounds = parts.bounds
    rows = [generator.permutation(np.arange(bounds[part], bounds[part + 1])) for part in chosen]
    # Lanes are as long as each other, or one row shorter: the first ones are the longer ones.
    lanes = [generator.permutation(lane) for lane in np.array_split(np.concatenate(rows), LANES)]
    turns = np.full((len(lanes[0]), LANES), -1, np.int64)
    for number, lane in enumerate(lanes):
        turns[: len(lane), number] = lane
    numbers = np.broadcast_to(np.arange(LANES), turns.shape)
    return EpochOrder(turns[turns >= 0], numbers[turns >= 0])


def deal_rows(lanes: Numbers, tokens: Sequence[int] | Numbers, num_shares: int) -> list[Numbers]:
    """Divide a step's rows, by their places in it: about as many tokens for each, and lanes together.

    Args:
        lanes: of the rows.
        tokens: of the rows.
        num_shares: at most as many as there are rows: each gets one at least.

    Returns:
        Places of each share, in their order in the step.
    """
    assert 1 <= num_shares <= len(lanes), (num_shares, len(lanes))
    by_lane = np.argsort(lanes, kind="stable")
    before = np.concatenate([np.zeros(1), np.cumsum(np.asarray(tokens, np.float64)[by_lane])])
    borders = np.flatnonzero(np.diff(lanes[by_lane])) + 1
    share, stops = before[-1] / num_shares, [0]
    for number in range(1, num_shares):
        distances = np.abs(before - share * number)
        stop = int(distances.argmin())
        if len(borders) and distances[near := borders[distances[borders].argmin()]] <= _TOLERANCE * share:
            stop = int(near)
        stops.append(min(max(stop, stops[-1] + 1), len(lanes) - num_shares + number))
    return [np.sort(by_lane[start:stop]) for start, stop in pairwise([*stops, len(lanes)])]
