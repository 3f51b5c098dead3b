"""Where every row of a dataset went."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetCounts:
    """Where every row went; rows_in = rows_train + rows_eval + rejected + rows_duplicate + rows_leaked.

    rows_in are the rows that the run takes in: those read, without those that are left out, and with the copies that
    a weight above 1 makes (train.parquet then holds an example_id several times). What data.max_rows leaves unread
    is not counted at all.
    """

    rows_in: int
    rows_train: int
    """Rows of train.parquet."""
    rows_eval: int
    rows_rejected: dict[str, int]
    """By reason."""
    rows_duplicate: int
    """Copies beyond the first of a conversation."""
    rows_leaked: int
    """Training rows that hold a held-out conversation."""
    rows_left_out: int = 0
    """Usable rows that a weight, num_rows or max_eval_rows leaves out."""
    rows_repeated: int = 0
    """Copies that weights above 1 made."""

    def __post_init__(self) -> None:
        taken = self.rows_train + self.rows_eval + self.rows_duplicate + self.rows_leaked
        assert self.rows_in == taken + sum(self.rows_rejected.values()), f"rows do not add up: {self}"

    @property
    def rows_read(self) -> int:
        """Rows of the files; what budgets are measured by."""
        return self.rows_in + self.rows_left_out - self.rows_repeated
