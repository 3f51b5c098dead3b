from pathlib import Path

import polars as pl
import pytest

from tasks.partitions import name_part
from tasks.training.packing import pack
from tasks.training.table_writer import write_examples, write_packs
from tasks.training.token_table import TokenTable, open_packs, open_table


def write_tokens(path: Path, lengths: list[int]) -> pl.DataFrame:
    """Write examples of these lengths; example i holds 1000 i, 1000 i + 1, …, and trains the last of them."""
    ids = [list(range(1000 * number, 1000 * number + length)) for number, length in enumerate(lengths)]
    labels = [[*[-100] * (len(one) - 1), one[-1]] for one in ids]
    lists = pl.List(pl.Int32)
    columns = {"example_id": [f"e{number}" for number in range(len(ids))], "input_ids": ids, "labels": labels}
    frame = pl.DataFrame(columns, schema={"example_id": pl.String, "input_ids": lists, "labels": lists})
    frame.write_parquet(path, row_group_size=7)
    return frame


def read_pack(table: TokenTable, numbers: list[int]) -> tuple[list[str], list[int], list[int]]:
    """Return the names, ids and targets of a pack's examples."""
    spans = [slice(*table.offsets[number : number + 2].tolist()) for number in numbers]
    input_ids = [token for span in spans for token in table.input_ids[span].tolist()]
    targets = [token for span in spans for token in table.targets[span].tolist()]
    return [table.example_ids[number] for number in numbers], input_ids, targets


def test_packs_hold_their_examples_and_what_each_position_predicts(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.parquet", [6, 5, 4, 3, 2])
    write_examples(tmp_path / "train.parquet", tmp_path / "packs")
    write_packs(tmp_path / "packs", 10)
    table, packs = open_table(tmp_path / "packs"), open_packs(tmp_path / "packs")
    assert list(packs) == [[0, 2], [1, 3, 4]]
    assert read_pack(table, packs[0]) == (
        ["e0", "e2"],
        [0, 1, 2, 3, 4, 5, 2000, 2001, 2002, 2003],
        [-100, -100, -100, -100, 5, -100, -100, -100, 2003, -100],
    )
    assert read_pack(table, packs[-1]) == (
        ["e1", "e3", "e4"],
        [1000, 1001, 1002, 1003, 1004, 3000, 3001, 3002, 4000, 4001],
        [-100, -100, -100, 1004, -100, -100, 3002, -100, 4001, -100],
    )
    assert table.lengths.tolist() == [6, 5, 4, 3, 2]
    assert packs[0:5] == list(packs)
    with pytest.raises(IndexError):
        packs[2]


def test_packs_of_a_table_in_parts_are_those_of_one_file(tmp_path: Path) -> None:
    frame = write_tokens(tmp_path / "whole.parquet", [2 + (37 * number) % 50 for number in range(100)])
    table = tmp_path / "train.parquet"
    table.mkdir()
    for number, part in enumerate((frame[:30], frame[:0], frame[30:])):
        part.write_parquet(name_part(table, number), row_group_size=7)
    made = []
    for split in (tmp_path / "whole.parquet", table):
        folder = tmp_path / f"packs of {split.stem}"
        write_examples(split, folder)
        write_packs(folder, 64)
        made.append({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".arrow"})
        assert list(open_table(folder).example_ids) == frame["example_id"].to_list()
    assert made[0].keys() == {"input_ids", "targets", "offsets", "packs", "bounds"}
    assert made[0] == made[1]


@pytest.mark.parametrize("window", [1, 7, 10, 64, 1000])
def test_every_window_is_packed_by_itself_and_every_example_once(tmp_path: Path, window: int) -> None:
    lengths = [2 + (37 * number) % 50 for number in range(500)]
    frame = write_tokens(tmp_path / "train.parquet", lengths)
    write_examples(tmp_path / "train.parquet", tmp_path / "packs")
    write_packs(tmp_path / "packs", 64, window=window)
    table, packs = open_table(tmp_path / "packs"), open_packs(tmp_path / "packs")
    assert list(packs) == [
        [start + index for index in one]
        for start in range(0, 500, window)
        for one in pack(lengths[start : start + window], 64)
    ]
    assert sorted(index for one in packs for index in one) == list(range(500))
    assert table.input_ids.tolist() == [token for ids in frame["input_ids"] for token in ids]
    assert list(table.example_ids) == frame["example_id"].to_list()


def test_without_a_budget_every_example_stands_alone(tmp_path: Path) -> None:
    write_tokens(tmp_path / "some.parquet", [3, 4, 5])
    write_examples(tmp_path / "some.parquet", tmp_path / "packs")
    write_packs(tmp_path / "packs", None, window=2)
    assert list(open_packs(tmp_path / "packs")) == [[0], [1], [2]]


def test_an_empty_table_makes_no_packs(tmp_path: Path) -> None:
    write_tokens(tmp_path / "none.parquet", [])
    write_examples(tmp_path / "none.parquet", tmp_path / "packs")
    write_packs(tmp_path / "packs", 8)
    assert len(open_packs(tmp_path / "packs")) == len(open_table(tmp_path / "packs").example_ids) == 0


def test_all_examples_that_teach_nothing_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    frame = write_tokens(tmp_path / "train.parquet", [5] * 30)
    nothing = pl.Series("labels", [[-100] * 5] * 30, dtype=pl.List(pl.Int32))
    chosen = pl.Series([number % 6 == 2 for number in range(30)])
    frame.with_columns(pl.when(chosen).then(nothing).otherwise(pl.col("labels")).alias("labels")).write_parquet(
        tmp_path / "train.parquet", row_group_size=7
    )
    with pytest.raises(ValueError, match=r"5 examples, such as e2, e8, e14: no trained token"):
        write_examples(tmp_path / "train.parquet", tmp_path / "packs")
