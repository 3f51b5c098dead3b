"""One is no plural."""

from schemas.plurals import add_up_rows, count_of


def test_one_is_no_plural() -> None:
    assert [count_of(number, "row") for number in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    assert [count_of(number, "copy", "copies") for number in (1, 3)] == ["1 copy", "3 copies"]


def test_a_sum_of_rows_leaves_out_what_is_nothing() -> None:
    rows = {"rows in": 11, "to train": 8, "held out": 2, "duplicates": 1, "leaked": 0}
    assert add_up_rows(rows) == "8 to train + 2 held out + 1 duplicate"
