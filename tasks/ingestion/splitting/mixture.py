"""Splits each dataset of a run by itself, and then takes its training rows by weight or number.

The order matters. Were the datasets mixed before the split, a copy that a weight makes could stand on both sides of
it. Split by itself, a dataset holds out the same rows alone and in every mixture (as long as data.max_eval_rows does
not bind), so that runs with different mixtures can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from schemas.config import DataConfig, DatasetConfig
from tasks.ingestion.errors import DataError
from tasks.ingestion.splitting.index import Index, Mask
from tasks.ingestion.splitting.splits import (
    DUPLICATE,
    EVAL,
    LEAKED,
    TRAIN,
    UNUSED,
    Sides,
    choose,
    count_held_out,
    hold_out,
    initial_sides,
    remove_leaks,
    select,
    split_dataset,
)

Repeats = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Division:
    """Where each row of all datasets went, and how often the training rows are taken."""

    datasets: tuple[DatasetConfig, ...]
    """A held-out one is the last."""
    bounds: Sequence[int]
    """Where each dataset's rows begin; one entry more than there are datasets."""
    sides: Sides
    repeats: Repeats
    """How often a row is trained."""

    def count(self, dataset: int | None = None) -> dict[str, int]:
        """Return the rows of each side, of one dataset or of all."""
        rows = slice(None) if dataset is None else slice(*self.bounds[dataset : dataset + 2])
        sides, repeats = self.sides[rows], self.repeats[rows]
        taken, total = int(np.count_nonzero(repeats)), int(repeats.sum(dtype=np.int64))
        num_rows = {side: int(np.count_nonzero(sides == side)) for side in (TRAIN, EVAL, DUPLICATE, LEAKED, UNUSED)}
        return {
            "rows_train": total,
            "rows_eval": num_rows[EVAL],
            "rows_duplicate": num_rows[DUPLICATE],
            "rows_leaked": num_rows[LEAKED],
            # Read, and neither used nor wrong.
            "rows_left_out": num_rows[TRAIN] - taken + num_rows[UNUSED],
            # Copies that a weight above 1 made.
            "rows_repeated": total - taken,
            "rows_unused": num_rows[UNUSED],
        }


def divide(index: Index, config: DataConfig) -> Division:
    """Split each dataset by itself, keep them apart, and take the training rows.

    Args:
        index: of all datasets' rows; its seed is that of the split and of the choice of training rows.
        config: held-out part, weights and numbers.

    Raises:
        DataError: a dataset has fewer training rows than `num_rows` wants.
    """
    datasets = list(config.datasets)
    sides = initial_sides(index)
    if config.held_out_dataset is not None:
        hold_out(index, sides, len(datasets), config.max_eval_rows, index.seed)
        datasets.append(config.held_out_dataset)
    else:
        sizes = [int(np.count_nonzero(select(index, sides, TRAIN, dataset=number))) for number in range(len(datasets))]
        for number, num_rows in enumerate(_share_out(sizes, config)):
            split_dataset(index, sides, number, num_rows, index.seed)
    remove_leaks(index, sides)
    repeats: Repeats = np.zeros(index.num_rows, dtype=np.uint8)
    for number, dataset in enumerate(datasets):
        repeats = repeats + take(index, select(index, sides, TRAIN, dataset=number), dataset, index.seed)
    return Division(tuple(datasets), index.bounds, sides, repeats)


def _share_out(sizes: Sequence[int], config: DataConfig) -> list[int]:
    """Return how many rows each dataset holds out: its share of data.max_eval_rows where all want more.

    Args:
        sizes: rows of each dataset, without copies.
        config: the part that is held out, and the most rows.
    """
    wanted = [count_held_out(size, config.eval_fraction, size) for size in sizes]
    total = sum(wanted)
    if total <= config.max_eval_rows:
        return wanted
    # Rounding the running sums, and not the shares, makes them add up to the limit.
    bounds = [round(config.max_eval_rows * part / total) for part in accumulate(wanted, initial=0)]
    return [high - low for low, high in pairwise(bounds)]


def take(index: Index, rows: Mask, dataset: DatasetConfig, seed: int) -> Repeats:
    """Return how often each row of the index is taken by the weight or number of the dataset with these rows.

    A weight w takes round(w * n) of n rows, at least one: each floor(w) times, and a seeded choice once more. The
    choice goes by the rank of the split, so that a larger weight takes what a smaller one takes, and more.

    Raises:
        DataError: there are fewer rows than `num_rows`.
    """
    num_rows, size = dataset.num_rows, int(np.count_nonzero(rows))
    if num_rows is not None and num_rows > size:
        raise DataError(_describe_shortage(dataset, size))
    if not size:
        return np.zeros(len(rows), dtype=np.uint8)
    wanted = num_rows if num_rows is not None else max(1, round(dataset.weight * size))
    repeats, rest = divmod(wanted, size)
    kind = np.min_scalar_type(repeats + 1)
    return rows * kind.type(repeats) + choose(index, rows, rest, seed)


def _describe_shortage(dataset: DatasetConfig, num_rows: int) -> str:
    """Word that a dataset has not as many rows as are wanted."""
    return (
        f"{dataset.source}: num_rows is {dataset.num_rows}, and {num_rows} training rows are left after rejects, "
        f"duplicates, the held-out part and leaks: lower num_rows to at most {num_rows}, or give a weight instead "
        "(a weight above 1 repeats rows)"
    )
