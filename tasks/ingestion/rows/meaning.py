"""Columns that change what a row means but that its format does not read: such a row is refused, and the column named.

"Not read" is for columns that cannot matter (an id, a category). A column of this table matters: what is trained
without it teaches something else. `data.ignored_columns` takes a column out of the table where a person knows better.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.flags import read_row_weight
from tasks.ingestion.rows.layouts import Layout


class Meaning(NamedTuple):
    """What a column of this name would say, and the way out."""

    matters: Callable[[Any], bool]
    way_out: str
    reason: str = "unread_meaning"
    is_field: bool = False
    """Another column for the prompt or the answer: a person who names the columns has chosen among them."""


def _is_there(value: Any) -> bool:
    return value not in (None, False, "", [], {}) and not (isinstance(value, str) and not value.strip())


def _is_false(value: Any) -> bool:
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def _is_no_weight(value: Any) -> bool:
    return value not in (None, "") and read_row_weight(value) is None


def _masks_others(value: Any) -> bool:
    return _is_there(value) and str(value).lower() != "user"


_MEDIA = Meaning(_is_there, "only text is trained: remove these rows")
_PREFERENCE = Meaning(
    _is_there,
    "a preference dataset: name the columns to train in data.columns, such as {prompt: prompt, completion: chosen}",
    is_field=True,
)
_WEIGHT = Meaning(_is_no_weight, "a row weighs from 0 to 1: write such numbers, or give data.weight for the dataset")
WEIGHT_COLUMNS = ("weight", "loss_weight")

MEANINGS: dict[str, Meaning] = {
    "context": Meaning(
        _is_there, "it belongs to the prompt: join it with the prompt, or map it as data.columns: {input: context}"
    ),
    "system_prompt": Meaning(_is_there, "map it: data.columns: {system: system_prompt}", is_field=True),
    "functions": Meaning(_is_there, "map it: data.columns: {tools: functions}", is_field=True),
    "history": Meaning(_is_there, "write earlier turns as messages", is_field=True),
    "label": Meaning(_is_false, "the row says that its answer is a bad one: remove the row", "rated_bad"),
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(WEIGHT_COLUMNS, _WEIGHT),
    "mask": Meaning(_masks_others, "write train: false on the messages that are not trained"),
}
NAMES = frozenset(MEANINGS)


def check_meaning(row: dict[str, Any], layout: Layout) -> None:
    """Refuse a row with a column that changes its meaning and that nobody reads.

    Raises:
        RowError: unread_meaning or rated_bad; names the column, its value and the way out.
    """
    if NAMES.isdisjoint(row):
        return
    for column in NAMES & row.keys() - layout.read_columns - set(layout.ignored_columns):
        meaning = MEANINGS[column]
        if meaning.matters(row[column]) and not (meaning.is_field and layout.is_given):
            raise RowError(
                meaning.reason,
                f"column {column} = {str(row[column])[:80]!r} is not read as {layout.format}, and it changes what "
                f"the row means: {meaning.way_out}; where it does not matter, set data.ignored_columns: [{column}]",
            )


def find_row_weight(row: dict[str, Any], layout: Layout) -> float:
    """Return what a checked row says that it weighs, 0 to 1; 1 where it does not say."""
    weight = 1.0
    for column in WEIGHT_COLUMNS:
        if column in row and column not in layout.read_columns and column not in layout.ignored_columns:
            found = read_row_weight(row[column])
            weight = weight if found is None else found
    return weight
