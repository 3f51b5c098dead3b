"""The rows that are trained on: one example or a pack of several; of pairs, one pair or several."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from schemas.config import TrainingConfig
from tasks.training.records import TrainingError
from tasks.training.table_writer import write_examples, write_packs
from tasks.training.token_table import TokenTable, open_packs, open_table

MAX_PACK_TOKENS = 16384
MIN_PACK_TOKENS = 2048
MIN_STEPS_PER_EPOCH = 50


def lay_out(split: Path, folder: Path, config: TrainingConfig) -> None:
    """Write the examples of a split of a tokens folder as they are trained on, and what stands in each row.

    Args:
        split: train.parquet or eval.parquet.
        folder: for `open_rows`; made when missing.
        config: whether a row is a pack, and of how many tokens.

    Raises:
        TrainingError: an example has nothing to learn, is longer than a pack, or has not as many labels as input_ids.
    """
    try:
        write_examples(split, folder, pairs=config.is_paired)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    table = open_table(folder, group=count_group(config))
    tokens_per_pack = choose_pack_tokens(table.group_lengths, config) if config.packing else None
    longest = int(table.group_lengths.max(initial=0))
    if tokens_per_pack is not None and longest > tokens_per_pack:
        what = "the two answers of example" if config.is_paired else "example"
        name = table.example_ids[int(table.group_lengths.argmax()) * table.group]
        raise TrainingError(
            f"training.tokens_per_pack is {tokens_per_pack}, but {what} {name} {'have' if config.is_paired else 'has'} "
            f"{longest} tokens: raise tokens_per_pack, or lower tokenization.max_length"
        )
    write_packs(folder, tokens_per_pack, group=table.group)


def open_rows(folder: Path, config: TrainingConfig | None = None) -> tuple[TokenTable, Sequence[Sequence[int]]]:
    """Map what `lay_out` wrote: the examples, and the rows, each the numbers of its examples."""
    return open_table(folder, group=1 if config is None else count_group(config)), open_packs(folder)


def count_group(config: TrainingConfig) -> int:
    """Return how many examples go through the model together."""
    return 2 if config.is_paired else 1


def choose_pack_tokens(lengths: NDArray[Any], config: TrainingConfig) -> int:
    """Return the budget of a pack in tokens.

    Where the config leaves it open: 16,384, halved while an epoch would have fewer than 50 steps, but never below 2,048
    or the longest example. It depends on the data alone, so that the same config trains the same on every machine.
    """
    if config.tokens_per_pack != "auto":
        return config.tokens_per_pack
    longest, total = int(lengths.max(initial=1)), int(lengths.sum())
    budget = MAX_PACK_TOKENS
    while budget > MIN_PACK_TOKENS and total < MIN_STEPS_PER_EPOCH * config.rows_per_step * budget:
        budget //= 2
    return max(budget, longest)
