"""Counts in sentences: 1 row, 2 rows."""

from collections.abc import Mapping


def count_of(number: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun; the plural is the noun with an s where none is given."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def add_up_rows(rows: Mapping[str, int]) -> str:
    """Return where rows went as a sum, such as `885 trained + 1 duplicate`; what is nothing is left out.

    Args:
        rows: by where they went; `rows in`, the whole, is no part of the sum.
    """
    parts = [
        count_of(number, "duplicate") if name == "duplicates" else f"{number:,} {name}"
        for name, number in rows.items()
        if number and name != "rows in"
    ]
    return " + ".join(parts)
