"""The datasets of a run: each is split by itself, and then its training rows are taken by weight or number.

The order matters. Were the datasets mixed before the split, a copy that a weight makes could stand on both sides of
it. Split by itself, a dataset holds out the same rows alone and in every mixture (as long as data.max_eval_rows does
not bind), so that runs with different mixtures can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.config import DataConfig, DatasetConfig
from tasks.ingestion.rejects import DataError
from tasks.ingestion.splits import (
    DUPLICATE,
    EVAL,
    LEAKED,
    TRAIN,
    UNUSED,
    Sides,
    choose,
    count_held_out,
    find_first,
    hold_out,
    keep_all,
    rank,
    separate,
    split_rows,
)

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Division:
    """Where each row of all datasets went, and how often the training rows are taken."""

    datasets: tuple[DatasetConfig, ...]
    """A held-out one is the last."""
    bounds: tuple[int, ...]
    """Where each dataset's rows begin; one entry more than there are datasets."""
    sides: Sides
    times: NDArray[np.uint32]
    """How often a row is trained."""

    def count(self, dataset: int | None = None) -> dict[str, int]:
        """Return the rows of each side, of one dataset or of all."""
        rows = slice(None) if dataset is None else slice(*self.bounds[dataset : dataset + 2])
        sides, times = self.sides[rows], self.times[rows]
        taken = int(np.count_nonzero(times))
        num_rows = np.bincount(sides, minlength=UNUSED + 1).tolist()
        return {
            "rows_train": int(times.sum()),
            "rows_eval": num_rows[EVAL],
            "rows_duplicate": num_rows[DUPLICATE],
            "rows_leaked": num_rows[LEAKED],
            # Read, and neither used nor wrong.
            "rows_left_out": num_rows[TRAIN] - taken + num_rows[UNUSED],
            # Copies that a weight above 1 made.
            "rows_repeated": int(times.sum()) - taken,
            "rows_unused": num_rows[UNUSED],
        }


def divide(rows: pl.DataFrame, bounds: Sequence[int], config: DataConfig, *, seed: int) -> Division:
    """Split each dataset by itself, keep them apart, and take the training rows.

    Args:
        rows: the index of all datasets' rows, one dataset after the other.
        bounds: where each dataset's rows begin, and where the last one's end.
        config: held-out part, weights and numbers.
        seed: of the split and of the choice of training rows.

    Raises:
        DataError: a dataset has fewer training rows than `num_rows` wants.
    """
    parts = [rows[low:high] for low, high in pairwise(bounds)]
    datasets = list(config.datasets)
    if config.held_out_dataset is not None:
        datasets.append(config.held_out_dataset)
        splits = [*map(keep_all, parts[:-1]), hold_out(parts[-1], config.max_eval_rows, seed)]
    else:
        limits = _share_out(parts, config)
        splits = [
            split_rows(part, config.eval_fraction, limit, seed) for part, limit in zip(parts, limits, strict=True)
        ]
    sides = separate(rows, splits)
    times = np.zeros(rows.height, dtype=np.uint32)
    for dataset, (low, high) in zip(datasets, pairwise(bounds), strict=True):
        places = low + np.flatnonzero(sides[low:high] == TRAIN)
        times[places] = take(rows["example_id"].gather(places), dataset, seed)
    return Division(tuple(datasets), tuple(bounds), sides, times)


def _share_out(parts: Sequence[pl.DataFrame], config: DataConfig) -> list[int]:
    """Return the most rows that each dataset holds out: its share of data.max_eval_rows where all want more."""
    sizes = [int(np.count_nonzero(find_first(part))) for part in parts]
    wanted = [count_held_out(size, config.eval_fraction, size) for size in sizes]
    total = sum(wanted)
    if total <= config.max_eval_rows:
        return wanted
    # Rounding the running sums, and not the shares, makes them add up to the limit.
    bounds = [round(config.max_eval_rows * part / total) for part in accumulate(wanted, initial=0)]
    return [high - low for low, high in pairwise(bounds)]


def take(ids: pl.Series, dataset: DatasetConfig, seed: int) -> NDArray[np.uint32]:
    """Return how often each training row is taken by the dataset's weight or number.

    A weight w takes round(w * n) of n rows, at least one: each floor(w) times, and a seeded choice once more. The
    choice goes by the rank of the split, so that a larger weight takes what a smaller one takes, and more.

    Raises:
        DataError: there are fewer rows than `num_rows`.
    """
    num_rows = dataset.num_rows
    if num_rows is not None and num_rows > len(ids):
        raise DataError(_describe_shortage(dataset, len(ids)))
    if not len(ids):
        return np.zeros(0, dtype=np.uint32)
    wanted = num_rows if num_rows is not None else max(1, round(dataset.weight * len(ids)))
    times, rest = divmod(wanted, len(ids))
    return (times + choose(ids, rest, seed)).astype(np.uint32)


def _describe_shortage(dataset: DatasetConfig, num_rows: int) -> str:
    """Word that a dataset has not as many rows as are wanted."""
    return (
        f"{dataset.source}: num_rows is {dataset.num_rows}, and {num_rows} training rows are left after rejects, "
        f"duplicates, the held-out part and leaks: lower num_rows to at most {num_rows}, or give a weight instead "
        "(a weight above 1 repeats rows)"
    )


def mix(ids: pl.Series, bounds: Sequence[int], times: NDArray[np.uint32], seed: int) -> Places:
    """Return the places of the taken rows in the order in which they are written.

    One dataset's rows stay in their order; several are mixed by the rank of seed, copy and content. Whoever takes rows
    from the front (an evaluation of the first ones, a preview) then sees every dataset.

    Args:
        ids: example_ids of all datasets' rows.
        bounds: where each dataset's rows begin, and where the last one's end.
        times: how often each row is taken.
        seed: of the order.
    """
    order = np.repeat(np.arange(len(ids)), times)
    if sum(bool(times[low:high].any()) for low, high in pairwise(bounds)) < 2:
        return order
    ranks = np.empty(len(order), dtype=np.uint64)
    ends = np.cumsum(times, dtype=np.int64)
    copies = np.arange(1, len(order) + 1) - np.repeat(ends - times, times)
    for copy in range(1, int(times.max()) + 1):
        places = np.flatnonzero(copies == copy)
        ranks[places] = rank(ids.gather(order[places]), f"mix:{seed}:{copy}")
    return order[np.argsort(ranks, kind="stable")]
