"""Examples in memory, and the micro batches of every optimizer step.

Dimensions: `B` rows of a micro batch, `S` tokens of its longest row, `T` tokens of an example, `N` examples.

A row is one example, or a pack of several. Which rows a step holds depends only on the seed, the epoch and the step, so
that a resumed training goes on exactly where it was.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.config import TrainingConfig
from tasks.tokenization.masking import IGNORE_INDEX
from tasks.tokenization.packing import pack
from tasks.training.records import TrainingError


@dataclass(frozen=True)
class TokenTable:
    """All examples of a split, end to end: example i is at offsets[i]:offsets[i + 1]."""

    example_ids: list[str]
    offsets: NDArray[np.int64]
    """[N + 1]"""
    input_ids: NDArray[np.int32]
    """[sum of T]"""
    targets: NDArray[np.int32]
    """[sum of T]; the token that each position has to predict: the labels, one to the left; IGNORE_INDEX where none."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, [N]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Batch:
    """One forward pass. Padding is on the right, where causal attention never sees it: no mask is needed."""

    input_ids: Tensor
    """[B, S] int64"""
    targets: Tensor
    """[B, S] int64; IGNORE_INDEX on padding and where nothing is learned."""
    position_ids: Tensor | None
    """[B, S] int64, from 0 again in each example of a pack; none when every row is one example."""
    example_ids: tuple[str, ...]
    num_tokens: int
    """Without padding."""
    num_trained_tokens: int
    """Targets that count."""


def read_tokens(path: Path) -> TokenTable:
    """Read a split of a tokens folder.

    Raises:
        TrainingError: an example has nothing to learn, or input_ids and labels differ in length.
    """
    frame = pl.read_parquet(path, columns=["example_id", "input_ids", "labels"])
    example_ids = frame["example_id"].to_list()
    lengths = frame["input_ids"].list.len().to_numpy().astype(np.int64)
    wrong = np.flatnonzero(lengths != frame["labels"].list.len().to_numpy())
    if wrong.size:
        raise TrainingError(f"{path}: {_name(example_ids, wrong)}: as many labels as input_ids are wanted")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    labels = _flatten(frame["labels"])
    targets = np.full_like(labels, IGNORE_INDEX)
    targets[:-1] = labels[1:]
    targets[(offsets[1:] - 1)[lengths > 0]] = IGNORE_INDEX
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(targets != IGNORE_INDEX)])
    empty = np.flatnonzero(before[offsets[1:]] == before[offsets[:-1]])
    if empty.size:
        raise TrainingError(
            f"{path}: {_name(example_ids, empty)}: no trained token (every label after the first token is "
            f"{IGNORE_INDEX}): remove these rows, or give them an answer"
        )
    return TokenTable(example_ids, offsets, _flatten(frame["input_ids"]), targets)


def form_rows(table: TokenTable, config: TrainingConfig) -> list[list[int]]:
    """Return the rows, each a list of indices of examples: packs when packing, else one example a row."""
    if not config.packing:
        return [[index] for index in range(len(table.example_ids))]
    return pack(table.lengths.tolist(), config.tokens_per_pack)


def iterate_steps(
    table: TokenTable, rows: Sequence[Sequence[int]], config: TrainingConfig, *, seed: int, first: int, last: int
) -> Iterator[list[Batch]]:
    """Yield the micro batches of each optimizer step from `first` up to but not including `last`.

    Each epoch is a new permutation of the rows, drawn from (seed, epoch). Within a step, rows are sorted by length
    before they are cut into micro batches: less padding, and the step's gradient is the same sum.
    """
    rows_per_step = config.micro_batch * config.gradient_accumulation_steps
    steps_per_epoch = -(-len(rows) // rows_per_step)
    row_lengths = np.array([table.lengths[list(row)].sum() for row in rows]) if config.packing else table.lengths
    order, order_epoch = np.empty(0, np.int64), -1
    for step in range(first, last):
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != order_epoch:
            order, order_epoch = np.random.default_rng([seed, epoch]).permutation(len(rows)), epoch
        window = order[position * rows_per_step : (position + 1) * rows_per_step]
        window = window[np.argsort(-row_lengths[window], kind="stable")]
        yield [
            form_batch(table, [rows[row] for row in window[start : start + config.micro_batch]])
            for start in range(0, len(window), config.micro_batch)
        ]


def form_batch(table: TokenTable, rows: Sequence[Sequence[int]]) -> Batch:
    """Lay rows of examples into tensors, each row padded on the right to the longest."""
    is_packed = any(len(row) > 1 for row in rows)
    length = max(sum(int(table.offsets[i + 1] - table.offsets[i]) for i in row) for row in rows)
    input_ids = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), IGNORE_INDEX, np.int64)
    # The padding keeps counting from 0 as a segment of its own, so that it joins no example.
    position_ids = np.tile(np.arange(length), (len(rows), 1)) if is_packed else None
    num_tokens = 0
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            begin, end = table.offsets[index], table.offsets[index + 1]
            stop = start + int(end - begin)
            input_ids[number, start:stop] = table.input_ids[begin:end]
            targets[number, start:stop] = table.targets[begin:end]
            if position_ids is not None:
                position_ids[number, start:stop] = np.arange(stop - start)
            start = stop
        if position_ids is not None:
            position_ids[number, start:] = np.arange(length - start)
        num_tokens += start
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        example_ids=tuple(table.example_ids[index] for row in rows for index in row),
        num_tokens=num_tokens,
        num_trained_tokens=int((targets != IGNORE_INDEX).sum()),
    )


def _flatten(column: pl.Series) -> NDArray[np.int32]:
    """Put the lists of a column end to end; empty lists leave nothing."""
    values: NDArray[Any] = column.list.explode(empty_as_null=False).to_numpy() if len(column) else np.empty(0)
    return values.astype(np.int32)


def _name(example_ids: list[str], indices: NDArray[np.int64]) -> str:
    """Name the first few examples and count the rest."""
    shown = ", ".join(example_ids[index] for index in indices[:3])
    return f"{indices.size} example(s), such as {shown}" if indices.size > 1 else f"example {shown}"
