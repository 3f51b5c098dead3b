"""A table is read alike in one file and in parts, and a part that is missing is named."""

from pathlib import Path

import polars as pl
import pytest

from tasks.partitions import TableError, copy_table, count_rows, list_parts, list_row_groups, name_part


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten rows in parts of 4, 0 and 6 rows, in row groups of 4."""
    path = tmp_path / "train.parquet"
    path.mkdir()
    rows = pl.DataFrame({"n": range(10)})
    for number, part in enumerate((rows[:4], rows[:0], rows[4:])):
        part.write_parquet(name_part(path, number), row_group_size=4)
    return path


def test_a_file_is_a_table_of_one_part(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pl.DataFrame({"n": range(10)}).write_parquet(path, row_group_size=4)
    assert list_parts(path) == [path]
    assert [group[1:] for group in list_row_groups(path)] == [(0, 4), (1, 4), (2, 2)]
    assert count_rows(path) == 10


def test_parts_follow_each_other(table: Path) -> None:
    assert [path.name for path in list_parts(table)] == ["000000.parquet", "000001.parquet", "000002.parquet"]
    assert [(group.part.name, group.number, group.num_rows) for group in list_row_groups(table) if group.num_rows] == [
        ("000000.parquet", 0, 4),
        ("000002.parquet", 0, 4),
        ("000002.parquet", 1, 2),
    ]
    assert count_rows(table) == 10
    assert pl.read_parquet(table)["n"].to_list() == list(range(10))
    assert pl.read_parquet(table, n_rows=5)["n"].to_list() == list(range(5))


def test_a_missing_part_and_what_is_none_are_named(table: Path) -> None:
    name_part(table, 1).rename(table / "other.txt")
    with pytest.raises(TableError, match=r"train\.parquet: it lacks its part 000001\.parquet, and holds other\.txt"):
        list_parts(table)
    (table / "other.txt").unlink()
    with pytest.raises(TableError, match=r"it lacks its part 000001\.parquet"):
        count_rows(table)
    for path in table.iterdir():
        path.unlink()
    with pytest.raises(TableError, match=r"it lacks its part 000000\.parquet"):
        list_parts(table)


def test_a_copy_replaces_what_was_there_in_either_form(tmp_path: Path, table: Path) -> None:
    file, target = tmp_path / "file.parquet", tmp_path / "eval.parquet"
    pl.DataFrame({"n": [1]}).write_parquet(file)
    for source, rows in ((file, 1), (table, 10), (table, 10), (file, 1)):
        copy_table(source, target)
        assert count_rows(target) == rows
