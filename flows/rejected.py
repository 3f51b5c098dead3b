"""What rejected rows cost: the one budget of both stages, and where the first ones stand."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.ingestion.errors import name_place
from tasks.ingestion.reject_groups import RejectGroup


def judge_rejected(
    rejected: Mapping[str, int], num_rows: int, max_fraction: float, groups: Sequence[RejectGroup]
) -> str | None:
    """Return what is wrong where more rows are rejected than allowed, else None.

    Args:
        rejected: rows by reason, of ingestion and tokenization.
        num_rows: rows that were read, with the copies that weights make.
        max_fraction: data.max_rejected_fraction.
        groups: the rejected rows, for the first place of each reason.
    """
    total = sum(rejected.values())
    if total <= max_fraction * num_rows:
        return None
    first = {group.reason: group.rows[0] for group in groups if group.rows}
    lines = [
        f"\n  {number:,} x {reason}" + (f", the first: {describe_place(first[reason])}" if reason in first else "")
        for reason, number in Counter(rejected).most_common()
    ]
    return (
        f"{total:,} of {num_rows:,} rows ({total / num_rows:.2%}) are rejected, and data.max_rejected_fraction allows "
        f"{max_fraction:.2%}: mend or remove the rows, or raise the budget{''.join(lines)}"
    )


def describe_place(row: Mapping[str, str | int]) -> str:
    """Return a rejected row's file, line and reason in words."""
    return f"{name_place(Path(str(row['source'])).name, int(row['line']))}  {row['detail']}"
