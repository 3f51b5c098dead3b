from pathlib import Path

import polars as pl
import pytest

from tasks.storage import digest_file
from tasks.tokenization.packfiles import open_packs, write_packs
from tasks.tokenization.packing import pack


def write_tokens(path: Path, lengths: list[int]) -> pl.DataFrame:
    """Write examples of these lengths; example i holds 1000 i, 1000 i + 1, …, and trains the last of them."""
    ids = [list(range(1000 * number, 1000 * number + length)) for number, length in enumerate(lengths)]
    labels = [[*[-100] * (len(one) - 1), one[-1]] for one in ids]
    lists = pl.List(pl.Int32)
    frame = pl.DataFrame({"input_ids": ids, "labels": labels}, schema={"input_ids": lists, "labels": lists})
    frame.write_parquet(path, row_group_size=7)
    return frame


def test_packs_hold_their_examples_end_to_end(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train.parquet", [6, 5, 4, 3, 2])
    counts = write_packs(tmp_path / "train.parquet", 10, tmp_path / "packs.arrow")
    assert open_packs(tmp_path / "packs.arrow").to_pylist() == [
        {
            "input_ids": [0, 1, 2, 3, 4, 5, 2000, 2001, 2002, 2003],
            "labels": [-100, -100, -100, -100, -100, 5, -100, -100, -100, 2003],
            "lengths": [6, 4],
            "examples": [0, 2],
        },
        {
            "input_ids": [1000, 1001, 1002, 1003, 1004, 3000, 3001, 3002, 4000, 4001],
            "labels": [-100, -100, -100, -100, 1004, -100, -100, 3002, -100, 4001],
            "lengths": [5, 3, 2],
            "examples": [1, 3, 4],
        },
    ]
    assert (counts.num_packs, counts.num_examples, counts.num_tokens) == (2, 5, 20)
    assert counts.packing_efficiency == 1.0
    assert counts.digest == digest_file(tmp_path / "packs.arrow")


@pytest.mark.parametrize("window", [1, 7, 10, 64, 1000])
def test_every_window_is_packed_by_itself_and_every_example_once(tmp_path: Path, window: int) -> None:
    lengths = [1 + (37 * number) % 50 for number in range(500)]
    frame = write_tokens(tmp_path / "train.parquet", lengths)
    counts = write_packs(tmp_path / "train.parquet", 64, tmp_path / "packs.arrow", examples_per_window=window)
    packs = open_packs(tmp_path / "packs.arrow").to_pylist()
    expected = [
        [start + index for index in one]
        for start in range(0, 500, window)
        for one in pack(lengths[start : start + window], 64)
    ]
    assert [one["examples"] for one in packs] == expected
    assert counts.num_packs == len(expected)
    for column in ("input_ids", "labels"):
        values = frame[column].to_list()
        assert [one[column] for one in packs] == [[token for i in one for token in values[i]] for one in expected]


def test_an_empty_table_makes_no_packs_and_the_same_packs_have_the_same_digest(tmp_path: Path) -> None:
    write_tokens(tmp_path / "none.parquet", [])
    assert write_packs(tmp_path / "none.parquet", 8, tmp_path / "none.arrow").num_packs == 0
    assert open_packs(tmp_path / "none.arrow").num_rows == 0
    write_tokens(tmp_path / "some.parquet", [3, 4, 5])
    first, again = (write_packs(tmp_path / "some.parquet", 8, tmp_path / f"{n}.arrow").digest for n in range(2))
    assert first == again
