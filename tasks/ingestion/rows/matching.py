"""Which format a file's rows have, by their columns."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from schemas.plurals import count_of
from tasks.ingestion.errors import DataError
from tasks.ingestion.rows.formats import FORMATS
from tasks.ingestion.rows.layouts import Layout, Reading

ROWS_LOOKED_AT = 1000
# Kinds of rows that are no conversations, by their columns, with the way out.
NO_CONVERSATIONS: dict[tuple[str, ...], str] = {
    ("chosen", "rejected"): "these are preference rows: train the preference with training.objective dpo, or the "
    "chosen answers alone by data.columns, such as {prompt: prompt, completion: chosen}, or {messages: chosen} where "
    "chosen holds messages",
    ("segments",): "segments are text that a template already made: give the conversations that they were made of",
    ("message_id", "parent_id", "text"): "these are single messages of trees: give the file of whole trees",
    ("text",): "rows of plain text (continued pretraining) hold no answer that could be trained apart from a prompt: "
    "give rows with a prompt and its answer, such as prompt and completion",
}
_MAPPING = (
    "rename them, or say what yours hold: data.columns: {prompt: ONE_OF_YOURS, completion: ANOTHER} in the config, or "
    "--set 'data.columns={prompt: ONE_OF_YOURS, completion: ANOTHER}'"
)
_OTHER_DELIMITERS = (";", "\t", "|")


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
        raise DataError(_describe_other_shape(objects, where) or _describe_wrong_columns(present, reading, where))
    (name, required), _ = votes.most_common(1)[0]
    _check_one_column_a_field(name, reading, present, len(objects), where)
    columns = dict(zip((names[0] for names in FORMATS[name].required), required, strict=True))
    for key, *others in FORMATS[name].optional:
        if key in reading.columns or not reading.only_mapped:
            found_name = next((other for other in (key, *others) if other in present), key)
            columns[key] = reading.columns.get(key, found_name)
    missing = [f"{key}: {column}" for key, column in reading.columns.items() if column not in present]
    if missing:
        raise DataError(
            f"{where}: the column map (data.columns) names columns that are not there ({', '.join(missing)}): "
            f"the columns are {', '.join(map(repr, present))}"
        )
    is_given = bool(reading.columns)
    return Layout(name, columns, reading.tags, is_given, reading.ignored_columns, reading.trim_trailing_user)


def _allow_formats(reading: Reading, where: str) -> list[str]:
    """Return the formats that the config leaves open."""
    names = _list_single() if reading.format == "auto" else [reading.format]
    open_names = [name for name in names if reading.columns.keys() <= set(FORMATS[name].fields)]
    if not open_names:
        fields = "; ".join(f"{name}: {', '.join(FORMATS[name].fields)}" for name in names)
        raise DataError(
            f"{where}: data.columns has the fields {', '.join(reading.columns)}, and no format has all of them "
            f"(fields are {fields}): write our field's name first, then the column's"
        )
    return open_names


def _list_single() -> list[str]:
    """Return the formats of rows with one answer: pairs have to be asked for."""
    return [name for name, form in FORMATS.items() if form.convert_rejected is None]


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


def _describe_other_shape(objects: Sequence[dict[str, Any]], where: str) -> str | None:
    """Word the error of a file whose rows are there, and elsewhere than at its top; None where they are not seen."""
    first = objects[0]
    (column, *others) = first or [""]
    found = [mark for mark in _OTHER_DELIMITERS if mark in str(column)]
    if found and not others:
        return (
            f"{where}: the header is a single column, {column!r}: the values are separated by {found[0]!r}, and in a "
            ".csv they have to be by commas: write it so, or name the file .tsv where they are tabs"
        )
    known = {name for columns in NO_CONVERSATIONS for name in columns}  # of which there is more to say
    lists = {key: value for key, value in first.items() if isinstance(value, list) and value and key not in known}
    inside = [key for key, value in lists.items() if all(isinstance(row, dict) for row in value)]
    if len(objects) == 1 and inside:
        key = inside[0]
        return (
            f"{where}: the file is one object, and not a list of rows; {key!r} in it holds a list of "
            f"{count_of(len(first[key]), 'object')}. If these are the rows, give that list alone, such as by "
            f"jq '.[{json.dumps(key)}]' FILE > rows.json"
        )
    return None


def _describe_wrong_columns(present: Counter[str], reading: Reading, where: str) -> str:
    """Word the error of a file whose columns fit no format."""
    tried = _list_single() if reading.format == "auto" else list(FORMATS)
    known = "; ".join(f"{name}: {', '.join('|'.join(names) for names in FORMATS[name].required)}" for name in tried)
    wanted = f"format {reading.format}" if reading.format != "auto" else "any known format"
    mapped = f" with data.columns {reading.columns}" if reading.columns else ""
    half = present.keys() & {name for form in tried for names in FORMATS[form].required for name in names}
    kinds = {} if half - {"prompt"} else NO_CONVERSATIONS
    advice = next((text for columns, text in kinds.items() if present.keys() >= set(columns)), None)
    return (
        f"{where}: the columns {', '.join(map(repr, present)) or '(none)'} do not make {wanted}{mapped} "
        f"(required: {known}): {advice or _MAPPING}"
    )
