"""The plan counts what the training counts, and what a drawn part says of all has an error that holds."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from schemas.config import TrainingConfig
from tasks.planning.sizes import draw_conversations, measure_sizes
from tasks.training.rows import lay_out, open_rows
from tasks.training.schedule import count_steps


def write_split(path: Path, lengths: list[int]) -> Path:
    ids = [list(range(length)) for length in lengths]
    labels = [[-100, *range(1, length)] for length in lengths]
    names = [f"{number}" for number in range(len(lengths))]
    pl.DataFrame(
        {"example_id": names, "input_ids": ids, "labels": labels},
        schema_overrides={"input_ids": pl.List(pl.Int32), "labels": pl.List(pl.Int32)},
    ).write_parquet(path)
    return path


@pytest.mark.parametrize("packing", [False, True])
def test_the_counts_are_those_of_the_training(tmp_path: Path, packing: bool) -> None:
    lengths = np.random.default_rng(1).integers(4, 900, 3000).tolist()
    split = write_split(tmp_path / "train.parquet", lengths)
    config = TrainingConfig(packing=packing, micro_batch=3, num_epochs=1.5)
    found = measure_sizes(split, config)
    lay_out(split, tmp_path / "laid", config)
    table, rows = open_rows(tmp_path / "laid")
    steps_per_epoch, num_steps = count_steps(len(rows), config)
    assert found.num_packs.value == len(rows)
    assert (found.steps_per_epoch.value, found.num_steps.value) == (steps_per_epoch, num_steps)
    assert found.total_tokens.value == table.lengths.sum() == sum(lengths)
    assert found.trained_tokens.value == sum(lengths) - 3000
    assert found.seen_tokens.low == found.seen_tokens.high
    assert found.longest == max(lengths)


def test_a_drawn_part_says_how_far_off_it_may_be(tmp_path: Path) -> None:
    lengths = np.random.default_rng(2).lognormal(4, 1, 4000).astype(int).clip(4, 3000).tolist()
    config, hits = TrainingConfig(), 0
    for seed in range(40):
        part = np.random.default_rng(seed).choice(lengths, 500, replace=False).tolist()
        split = write_split(tmp_path / "train.parquet", part)
        found = measure_sizes(split, config, share=500 / 4000, num_sampled=500)
        hits += found.total_tokens.low <= sum(lengths) <= found.total_tokens.high
        assert found.num_examples.value == 4000
    assert hits >= 35


def test_a_draw_takes_each_conversation_once_in_order(tmp_path: Path) -> None:
    pl.DataFrame({"n": range(1000)}).write_parquet(tmp_path / "train.parquet")
    for number, kept in ((100, 100), (5000, 1000)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert draw_conversations(tmp_path / "train.parquet", folder, number=number, seed=3) == 1000
        drawn = pl.read_parquet(folder / "train.parquet")["n"].to_list()
        assert len(drawn) == len(set(drawn)) == kept
        assert drawn == sorted(drawn)
