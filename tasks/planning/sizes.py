"""How much there is to train: examples, tokens, rows of a step and steps, by the functions that the training uses.

Of a large dataset a part of the conversations is tokenized, drawn by the seed; what it says of all has an error.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.config import TrainingConfig
from tasks.planning.estimates import Estimate
from tasks.training.packing import pack
from tasks.training.rows import choose_pack_tokens
from tasks.training.schedule import count_steps
from tasks.training.table_writer import EXAMPLES_PER_WINDOW

_NORMAL = 1.96
"""Standard errors in half the bar: of a normal distribution, nineteen of twenty are within."""


@dataclass(frozen=True)
class Sizes:
    """What a training is going to see."""

    num_examples: Estimate
    total_tokens: Estimate
    """Of one epoch."""
    trained_tokens: Estimate
    """Of these, the tokens that are learned."""
    longest: int
    """Tokens of the longest example that was seen."""
    num_packs: Estimate
    """Rows of an epoch: packs, or examples where nothing is packed."""
    steps_per_epoch: Estimate
    num_steps: Estimate
    seen_tokens: Estimate
    """Over all steps."""
    num_sampled: int | None = None
    """Conversations that were tokenized; None for all."""


def measure_sizes(split: Path, config: TrainingConfig, *, share: float = 1.0, num_sampled: int | None = None) -> Sizes:
    """Count what a training sees of tokenized examples.

    Args:
        split: train.parquet of a tokens folder.
        config: the training section.
        share: part of all conversations that was tokenized.
        num_sampled: as many conversations; None for all.
    """
    lengths, trained = _read_lengths(split)
    part = 1.0 if share >= 1 else _find_error(lengths, share)
    whole = lengths if share >= 1 else _extend(lengths, round(len(lengths) / share))
    rows = _count_packs(whole, config)
    steps_per_epoch, num_steps = count_steps(rows, config)
    bar = 0.0 if share >= 1 else part
    total, seen = float(lengths.sum()) / share, float(lengths.sum()) / share * num_steps / max(1, steps_per_epoch)

    def estimate(value: float, width: float = bar) -> Estimate:
        return Estimate(value, value * (1 - width), value * (1 + width))

    is_cut = config.max_steps is not None and num_steps == config.max_steps
    return Sizes(
        num_examples=estimate(len(whole)),
        total_tokens=estimate(total),
        trained_tokens=estimate(float(trained.sum()) / share),
        longest=int(lengths.max(initial=0)),
        num_packs=estimate(rows),
        steps_per_epoch=estimate(steps_per_epoch),
        num_steps=estimate(num_steps, 0.0 if is_cut else bar),
        seen_tokens=estimate(seen),
        num_sampled=num_sampled,
    )


def draw_conversations(table: Path, folder: Path, *, number: int, seed: int) -> int:
    """Write a part of a split's conversations, drawn without replacement; return how many there are in all.

    Args:
        table: train.parquet of a dataset folder.
        folder: gets a file of the same name.
        number: of conversations to draw; where there are no more, the file is all of them.
        seed: of the draw.
    """
    total = count_rows(table)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(number, total), replace=False))
    kept = pl.scan_parquet(table, row_index_name="#").filter(pl.col("#").is_in(pl.Series(chosen, dtype=pl.UInt32)))
    kept.drop("#").sink_parquet(folder / table.name)
    return total


def count_rows(table: Path) -> int:
    """Return the rows of a Parquet file."""
    return int(pl.scan_parquet(table).select(pl.len()).collect().item())


def _read_lengths(split: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return tokens and trained tokens of each example, of both answers where it is a pair."""
    table = pl.scan_parquet(split)
    has_pairs = "rejected_ids" in table.collect_schema()
    columns = [("input_ids", "labels"), *([("rejected_ids", "rejected_labels")] if has_pairs else [])]
    counted = table.select(
        pl.sum_horizontal(pl.col(ids).list.len().fill_null(0) for ids, _ in columns).alias("length"),
        pl.sum_horizontal(
            pl.col(labels).list.eval(pl.element() != -100).list.sum().fill_null(0) for _, labels in columns
        ).alias("trained"),
    ).collect()
    return counted["length"].cast(pl.Int64).to_numpy(), counted["trained"].cast(pl.Int64).to_numpy()


def _count_packs(lengths: NDArray[Any], config: TrainingConfig) -> int:
    """Return the rows of an epoch, packed as the training packs them: window by window."""
    if not config.packing:
        return len(lengths)
    budget = max(choose_pack_tokens(lengths, config), int(lengths.max(initial=0)))
    windows = range(0, len(lengths), EXAMPLES_PER_WINDOW)
    return sum(len(pack(lengths[start : start + EXAMPLES_PER_WINDOW].tolist(), budget)) for start in windows)


def _extend(lengths: NDArray[Any], number: int) -> NDArray[Any]:
    """Return as many lengths as there would be of all conversations: those of the part, again and again."""
    return np.resize(lengths, number)


def _find_error(lengths: NDArray[Any], share: float) -> float:
    """Return half the bar of the total as a part of it: of a mean drawn without replacement from a finite whole."""
    if len(lengths) < 2:
        return 1.0
    error = float(lengths.std(ddof=1)) / math.sqrt(len(lengths)) * math.sqrt(max(0.0, 1 - share))
    return _NORMAL * error / float(lengths.mean())
