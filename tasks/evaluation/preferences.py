"""Pairs of answers to held-out prompts: how likely a model makes each, and how far it prefers the right one.

A margin says by how much more than its base a model prefers the chosen answer; the base itself has none. So the base
has the loss of no preference (log 2 for sigmoid), and as many pairs right as wrong.
"""

from collections.abc import Sequence

import polars as pl
import torch

from schemas.config import DpoConfig
from schemas.records import PairRows, columns_of
from tasks.preferences import compute_pair_losses
from tasks.tokenization.labels import IGNORE_INDEX

Runs = tuple[tuple[int, int], ...]
PAIR_COLUMNS = ("chosen_nll", "chosen_tokens", "rejected_nll", "rejected_tokens")


def find_runs(labels: Sequence[int]) -> Runs:
    """Return start and end of each unbroken run of labels other than -100."""
    runs, start = [], None
    for place, label in enumerate((*labels, IGNORE_INDEX)):
        if label != IGNORE_INDEX and start is None:
            start = place
        elif label == IGNORE_INDEX and start is not None:
            runs.append((start, place))
            start = None
    return tuple(runs)


def has_pairs(rows: pl.DataFrame) -> bool:
    """Tell whether the rows of an evaluation are pairs."""
    return set(PAIR_COLUMNS) <= set(rows.columns)


def add_rewards(rows: pl.DataFrame, base: pl.DataFrame, config: DpoConfig) -> pl.DataFrame:
    """Add what the metrics of preferences are read from: preference_loss, reward_accuracy and reward_margin.

    Args:
        rows: of a model's evaluation, pairs.
        base: of the model that its training began with, the same rows.
        config: which loss, and beta.
    """
    assert rows["example_id"].equals(base["example_id"])
    own, before = (PairRows.validate(table.select(*columns_of(PairRows))) for table in (rows, base))
    margins = torch.from_numpy((_prefer(own, config) - _prefer(before, config)).to_numpy(writable=True))
    losses = compute_pair_losses(margins, config)
    rewards = config.beta * margins
    right = (rewards > 0).double() + 0.5 * (rewards == 0)
    found = {"preference_loss": losses, "reward_accuracy": right, "reward_margin": rewards}
    return rows.with_columns(pl.Series(name, values.numpy()) for name, values in found.items())


def _prefer(rows: pl.DataFrame, config: DpoConfig) -> pl.Series:
    """Return log p(chosen) - log p(rejected) of each pair; of a token each for ipo."""
    if config.loss == "ipo":
        return rows["rejected_nll"] / rows["rejected_tokens"] - rows["chosen_nll"] / rows["chosen_tokens"]
    return rows["rejected_nll"] - rows["chosen_nll"]
