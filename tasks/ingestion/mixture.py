"""The datasets of a run: each is read and split by itself, and then its training rows are taken by weight or number.

The order matters. Were the datasets mixed before the split, a copy that a weight makes could stand on both sides of
it. Split by itself, a dataset holds out the same rows alone and in every mixture (as long as data.max_eval_rows does
not bind), so that runs with different mixtures can be compared.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import PurePath

from schemas.config import DataConfig, DatasetConfig
from tasks.ingestion.files import Source
from tasks.ingestion.formats import Reading
from tasks.ingestion.identity import Conversation
from tasks.ingestion.intake import Intake, take_in
from tasks.ingestion.rejects import DataError
from tasks.ingestion.sources import find_sources
from tasks.ingestion.splits import (
    Split,
    choose,
    count_held_out,
    drop_duplicates,
    hold_out,
    keep_all,
    separate,
    split_rows,
)


@dataclass(frozen=True)
class Portion:
    """A dataset's part in the run: what was read, where it went, and which training rows are taken how often."""

    dataset: DatasetConfig
    intake: Intake
    split: Split
    train: list[Conversation]
    """Of the split's training rows those that the weight or the number takes; copies included."""

    @cached_property
    def num_repeated(self) -> int:
        """Copies that a weight above 1 made."""
        return len(self.train) - len({row.example_id for row in self.train})

    @property
    def num_left_out(self) -> int:
        """Rows that were read and are neither used nor wrong."""
        return len(self.split.train) - (len(self.train) - self.num_repeated) + len(self.split.unused)


def read_datasets(config: DataConfig, *, seed: int) -> list[Intake]:
    """Read all datasets; a held-out one is the last.

    Where two files of different datasets have the same name, the later one's gets its dataset's place as a folder, so
    that a source and a line always name one row.

    Raises:
        DataError: a dataset cannot be read.
    """
    intakes = []
    names: set[str] = set()
    held_out = config.held_out_dataset
    datasets = (*config.datasets, *([] if held_out is None else [held_out]))
    for number, dataset in enumerate(datasets, start=1):
        folder = "held-out" if dataset is held_out else f"dataset-{number}"
        sources = _name_apart(find_sources(dataset), folder, names)
        max_rows = None if dataset is held_out else config.max_rows
        intake = take_in(sources, Reading(dataset.format, dataset.columns), max_rows, seed=seed, screen=config.screen)
        intake.name = PurePath(dataset.source).name
        intakes.append(intake)
    return intakes


def _name_apart(sources: Sequence[Source], folder: str, names: set[str]) -> list[Source]:
    """Give files whose names are taken a folder before their name; `names` are the taken ones, and is added to."""
    apart = []
    for source in sources:
        taken = any(file.name in names for file in source.files)
        files = [replace(file, name=f"{folder}/{file.name}") if taken else file for file in source.files]
        names.update(file.name for file in files)
        apart.append(replace(source, files=tuple(files)))
    return apart


def divide(intakes: Sequence[Intake], config: DataConfig, *, seed: int) -> list[Portion]:
    """Split each dataset by itself, keep them apart, and take the training rows.

    Args:
        intakes: what `read_datasets` returned.
        config: held-out part, weights and numbers.
        seed: of the split and of the choice of training rows.

    Raises:
        DataError: a dataset has fewer training rows than `num_rows` wants.
    """
    rows = [intake.conversations for intake in intakes]
    if config.held_out_dataset is not None:
        datasets = [*config.datasets, config.held_out_dataset]
        splits = [*map(keep_all, rows[:-1]), hold_out(rows[-1], config.max_eval_rows, seed)]
    else:
        datasets = list(config.datasets)
        limits = _share_out(rows, config)
        splits = [split_rows(part, config.eval_fraction, limit, seed) for part, limit in zip(rows, limits, strict=True)]
    return [
        Portion(dataset, intake, split, take(split.train, dataset, seed))
        for dataset, intake, split in zip(datasets, intakes, separate(splits), strict=True)
    ]


def _share_out(rows: Sequence[Sequence[Conversation]], config: DataConfig) -> list[int]:
    """Return the most rows that each dataset holds out: its share of data.max_eval_rows where all want more."""
    sizes = [len(drop_duplicates(part)[0]) for part in rows]
    wanted = [count_held_out(size, config.eval_fraction, size) for size in sizes]
    total = sum(wanted)
    if total <= config.max_eval_rows:
        return wanted
    # Rounding the running sums, and not the shares, makes them add up to the limit.
    bounds = [round(config.max_eval_rows * part / total) for part in accumulate(wanted, initial=0)]
    return [high - low for low, high in pairwise(bounds)]


def take(rows: Sequence[Conversation], dataset: DatasetConfig, seed: int) -> list[Conversation]:
    """Take training rows by the dataset's weight or number, in their order.

    A weight w takes round(w * n) of n rows, at least one: each floor(w) times, and a seeded choice once more. The
    choice goes by the rank of the split, so that a larger weight takes what a smaller one takes, and more.

    Raises:
        DataError: there are fewer rows than `num_rows`.
    """
    if not rows:
        if dataset.num_rows is not None:
            raise DataError(_describe_shortage(dataset, 0))
        return []
    num_rows = dataset.num_rows
    if num_rows is not None and num_rows > len(rows):
        raise DataError(_describe_shortage(dataset, len(rows)))
    wanted = num_rows if num_rows is not None else max(1, round(dataset.weight * len(rows)))
    times, rest = divmod(wanted, len(rows))
    once_more = choose(rows, rest, seed)
    return [row for row in rows for _ in range(times + (row.example_id in once_more))]


def _describe_shortage(dataset: DatasetConfig, num_rows: int) -> str:
    """Word that a dataset has not as many rows as are wanted."""
    return (
        f"{dataset.source}: num_rows is {dataset.num_rows}, and {num_rows} training rows are left after rejects, "
        f"duplicates, the held-out part and leaks: lower num_rows to at most {num_rows}, or give a weight instead "
        "(a weight above 1 repeats rows)"
    )


def mix(parts: Sequence[Sequence[Conversation]], seed: int) -> list[Conversation]:
    """Join the datasets' rows: one dataset's in their order, several mixed by the rank of seed, copy and content.

    Whoever takes rows from the front (an evaluation of the first ones, a preview) then sees every dataset.
    """
    parts = [part for part in parts if part]
    rows = [row for part in parts for row in part]
    if len(parts) < 2:
        return rows
    copies: dict[str, int] = {}
    ranked = []
    for place, row in enumerate(rows):
        copies[row.example_id] = copies.get(row.example_id, 0) + 1
        rank = hashlib.sha256(f"mix:{seed}:{copies[row.example_id]}:{row.example_id}".encode()).digest()
        ranked.append((rank, place))
    return [rows[place] for _, place in sorted(ranked)]
