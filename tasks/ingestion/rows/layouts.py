"""A layout: the format of a file's rows, and which column each of its fields is read from."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.messages import DEFAULT_TAGS, Tags


@dataclass(frozen=True)
class Reading:
    """What the config says about how rows are read."""

    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    tags: Tags = DEFAULT_TAGS
    only_mapped: bool = False
    """Read no optional column that the map does not name."""
    strict_turns: bool = False
    """Count rows whose turns do not alternate strictly: other programs drop these."""
    ignored_columns: tuple[str, ...] = ()
    """Columns that are not read, whatever they mean."""
    trim_trailing_user: bool = False
    """Cut user messages at the end of a conversation, which nothing answers."""


@dataclass(frozen=True)
class Layout:
    """A format, and the column of each of its fields."""

    format: str
    columns: dict[str, str]
    tags: Tags = DEFAULT_TAGS
    is_given: bool = False
    """A person or an index named the columns: the others are meant to be left out."""
    ignored_columns: tuple[str, ...] = ()
    trim_trailing_user: bool = False

    @cached_property
    def read_columns(self) -> frozenset[str]:
        """Columns that somebody reads."""
        return frozenset(self.columns.values())

    def get(self, row: dict[str, Any], name: str) -> Any:
        """Return the value of an optional field, None where the format or the row has none."""
        column = self.columns.get(name)
        return None if column is None else row.get(column)

    def get_text(self, row: dict[str, Any], name: str) -> str:
        """Return an optional text; null, absent and blank are the empty text.

        Raises:
            RowError: not_text.
        """
        value = self.get(row, name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise RowError("not_text", f"{self.columns[name]} is of type {type(value).__name__}: text is wanted")
        return value if value.strip() else ""

    def require_text(self, row: dict[str, Any], name: str) -> str:
        """Return a required text, as it is.

        Raises:
            RowError: null_content or not_text.
        """
        value = row[self.columns[name]]
        if value is None:
            raise RowError("null_content", f"{self.columns[name]} is null")
        if not isinstance(value, str):
            raise RowError("not_text", f"{self.columns[name]} is of type {type(value).__name__}: text is wanted")
        return value

    def join_prompt(self, row: dict[str, Any], name: str, further: str = "input") -> str:
        """Join a required and an optional text by a line feed; a blank one is left out."""
        parts = [self.require_text(row, name), self.get_text(row, further)]
        return "\n".join(part for part in parts if part.strip())
