import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import TrainingConfig
from tasks.training.batches import form_batch
from tasks.training.micro_batches import iterate_steps
from tasks.training.records import TrainingError
from tasks.training.token_table import TokenTable
from tests.tasks.training.conftest import read_tokens, write_split

THREE = [([5, 6, 7, 8], 2), ([9, 10, 11], 1), ([12, 13], 1)]


def make_rows(lengths: list[int], **training: Any) -> tuple[TokenTable, Sequence[Sequence[int]]]:
    """Return examples of these lengths, and the rows that they are trained in."""
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder) / "train.parquet", [(list(range(length)), 1) for length in lengths])
        return read_tokens(Path(folder) / "train.parquet", **training)


def test_targets_are_labels_one_to_the_left(tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", THREE)
    table, _ = read_tokens(tmp_path / "train.parquet")
    assert list(table.example_ids) == ["train-0000", "train-0001", "train-0002"]
    assert table.offsets.tolist() == [0, 4, 7, 9]
    assert table.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert table.targets.tolist() == [-100, 7, 8, -100, 10, 11, -100, 13, -100]


def test_padded_batch(tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", THREE)
    batch = form_batch(read_tokens(tmp_path / "train.parquet")[0], [[0], [1], [2]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 0], [12, 13, 0, 0]]
    assert batch.targets.tolist() == [[-100, 7, 8, -100], [10, 11, -100, -100], [13, -100, -100, -100]]
    assert batch.position_ids is None
    assert (batch.num_tokens, batch.num_trained_tokens) == (9, 5)
    assert batch.example_ids == ("train-0000", "train-0001", "train-0002")


def test_packed_batch_starts_positions_again_in_each_example_and_in_the_padding(tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", THREE)
    batch = form_batch(read_tokens(tmp_path / "train.parquet")[0], [[0, 2], [1]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 12, 13], [9, 10, 11, 0, 0, 0]]
    assert batch.targets.tolist() == [[-100, 7, 8, -100, 13, -100], [10, 11, -100, -100, -100, -100]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=60),
    micro_batch=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    packing=st.booleans(),
    seed=st.integers(0, 9),
)
def test_each_epoch_sees_each_example_once(
    lengths: list[int], micro_batch: int, accumulation: int, packing: bool, seed: int
) -> None:
    config = TrainingConfig(
        micro_batch=micro_batch, gradient_accumulation_steps=accumulation, packing=packing, tokens_per_pack=32
    )
    table, rows = make_rows(lengths, packing=packing, tokens_per_pack=32)
    steps_per_epoch = -(-len(rows) // (micro_batch * accumulation))
    steps = list(iterate_steps(table, rows, config, seed=seed, first=0, last=2 * steps_per_epoch))
    for epoch in (steps[:steps_per_epoch], steps[steps_per_epoch:]):
        seen = [name for step in epoch for batch in step for name in batch.example_ids]
        assert sorted(seen) == sorted(table.example_ids)
        assert sum(batch.num_tokens for step in epoch for batch in step) == sum(lengths)
    assert all(len(step) <= accumulation and len(batch.input_ids) <= micro_batch for step in steps for batch in step)


def test_going_on_in_the_middle_gives_the_same_steps() -> None:
    config = TrainingConfig(micro_batch=3, gradient_accumulation_steps=2)
    table, rows = make_rows(list(range(2, 42)))
    whole = [[b.example_ids for b in step] for step in iterate_steps(table, rows, config, seed=5, first=0, last=20)]
    rest = [[b.example_ids for b in step] for step in iterate_steps(table, rows, config, seed=5, first=9, last=20)]
    assert rest == whole[9:]
    assert whole[:7] != whole[7:14]  # another order in the second epoch
    others = [[b.example_ids for b in step] for step in iterate_steps(table, rows, config, seed=6, first=0, last=7)]
    assert others != whole[:7]


def test_example_without_a_trained_token_is_refused(tmp_path: Path) -> None:
    # A label on the first token alone trains nothing: no token comes before it.
    pl.DataFrame(
        {"example_id": ["good", "bad"], "input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, 2, 3], [4, -100]]}
    ).write_parquet(tmp_path / "train.parquet")
    with pytest.raises(TrainingError, match="example bad: no trained token"):
        read_tokens(tmp_path / "train.parquet")


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"example_id": ["odd"], "input_ids": [[1, 2, 3]], "labels": [[1, 2]]}).write_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(TrainingError, match="example odd: as many labels as input_ids"):
        read_tokens(tmp_path / "train.parquet")


def test_empty_split_has_no_examples(tmp_path: Path) -> None:
    write_split(tmp_path / "eval.parquet", [])
    table, rows = read_tokens(tmp_path / "eval.parquet")
    assert len(table.example_ids) == len(table.lengths) == len(rows) == 0
