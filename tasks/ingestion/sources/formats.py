"""Formats of rows: which columns they have, and how they are told apart."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tasks.ingestion.rejects import DataError
from tasks.ingestion.rows.messages import DEFAULT_TAGS, Tags


@dataclass(frozen=True)
class Format:
    """Columns of a format; a required one may go by several names, the first being ours."""

    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Our names of all columns."""
        return (*(names[0] for names in self.required), *self.optional)


# In the order of preference where a row has the columns of several.
FORMATS: dict[str, Format] = {
    "messages": Format((("messages",),), ("system", "tools")),
    "sharegpt": Format((("conversations", "conversation"),), ("system", "tools")),
    "alpaca": Format((("instruction",), ("output", "response")), ("input", "history", "system", "tools")),
    "instruct": Format((("instruct",), ("label",)), ("input", "system")),
    "prompt_completion": Format((("prompt",), ("completion", "response")), ("system", "tools")),
}
KNOWN = "; ".join(f"{name}: {', '.join('|'.join(names) for names in form.required)}" for name, form in FORMATS.items())
ROWS_LOOKED_AT = 1000


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


@dataclass(frozen=True)
class Layout:
    """A format, and the column of each of its fields."""

    format: str
    columns: dict[str, str]
    tags: Tags = DEFAULT_TAGS

    @cached_property
    def read_columns(self) -> frozenset[str]:
        """Columns that somebody reads."""
        return frozenset(self.columns.values())


def find_layout(rows: Sequence[Any], reading: Reading, where: str) -> Layout | None:
    """Choose the format that most of the rows have, and the columns of its fields.

    Args:
        rows: the first rows of a file, as read.
        reading: the config's format and column map.
        where: the file, for messages.

    Returns:
        None when no row is an object.

    Raises:
        DataError: no format fits the columns, or two columns could be the same field.
    """
    objects = [row for row in rows if isinstance(row, dict)]
    names = _allow_formats(reading, where)
    if not objects:
        return None
    votes: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for row in objects:
        found = next((match for name in names if (match := _match(row, name, reading.columns))), None)
        if found:
            votes[found] += 1
    present = Counter(key for row in objects for key in row)
    if not votes:
        raise DataError(_describe_wrong_columns(present, reading, where))
    (name, required), _ = votes.most_common(1)[0]
    _check_one_column_a_field(name, reading, present, len(objects), where)
    columns = dict(zip((names[0] for names in FORMATS[name].required), required, strict=True))
    for key in FORMATS[name].optional:
        if key in reading.columns or not reading.only_mapped:
            columns[key] = reading.columns.get(key, key)
    missing = [f"{key}: {column}" for key, column in reading.columns.items() if column not in present]
    if missing:
        raise DataError(
            f"{where}: the column map (data.columns) names columns that are not there ({', '.join(missing)}): "
            f"the columns are {', '.join(map(repr, present))}"
        )
    return Layout(name, columns, reading.tags)


def _allow_formats(reading: Reading, where: str) -> list[str]:
    """Return the formats that the config leaves open."""
    names = list(FORMATS) if reading.format == "auto" else [reading.format]
    open_names = [name for name in names if reading.columns.keys() <= set(FORMATS[name].fields)]
    if not open_names:
        fields = "; ".join(f"{name}: {', '.join(FORMATS[name].fields)}" for name in names)
        raise DataError(
            f"{where}: data.columns has the fields {', '.join(reading.columns)}, and no format has all of them "
            f"(fields are {fields}): write our field's name first, then the column's"
        )
    return open_names


def _match(row: dict[str, Any], name: str, mapped: dict[str, str]) -> tuple[str, tuple[str, ...]] | None:
    """Return the columns of the format's required fields in this row, or None where one is missing."""
    columns = []
    for names in FORMATS[name].required:
        candidates = (mapped[names[0]],) if names[0] in mapped else names
        column = next((candidate for candidate in candidates if candidate in row), None)
        if column is None:
            return None
        columns.append(column)
    return name, tuple(columns)


def _check_one_column_a_field(name: str, reading: Reading, present: Counter[str], num_rows: int, where: str) -> None:
    """Refuse to guess where most rows have two columns for one field."""
    for names in FORMATS[name].required:
        found = [column for column in names if 2 * present[column] > num_rows]
        if names[0] not in reading.columns and len(found) > 1:
            raise DataError(
                f"{where}: {' and '.join(found)} could both be the {names[0]} of format {name}: "
                f"say which with data.columns: {{{names[0]}: {found[0]}}}"
            )


def _describe_wrong_columns(present: Counter[str], reading: Reading, where: str) -> str:
    """Word the error of a file whose columns fit no format."""
    wanted = f"format {reading.format}" if reading.format != "auto" else "any known format"
    mapped = f" with data.columns {reading.columns}" if reading.columns else ""
    return (
        f"{where}: the columns {', '.join(map(repr, present)) or '(none)'} do not make {wanted}{mapped} "
        f"(required: {KNOWN}): rename them, or map them, such as data.columns: {{prompt: question}}"
    )
