"""Columns that change what a row means but that its format does not read: such a row is refused, and the column named.

"Not read" is for columns that cannot matter (an id, a category). A column of this table matters: what is trained
without it teaches something else. `data.ignored_columns` takes a column out of the table where a person knows better.
"""

from collections.abc import Callable
from functools import lru_cache
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
    if isinstance(value, list):
        return any(map(_is_there, value))
    return value not in (None, False, "", [], {}) and not (isinstance(value, str) and not value.strip())


def _is_false(value: Any) -> bool:
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def _is_no_weight(value: Any) -> bool:
    return value not in (None, "") and read_row_weight(value) is None


def _is_prose(value: Any) -> bool:
    """Tell a thought from what says whether there is one, such as on or high."""
    return isinstance(value, str) and len(value.strip()) > _LONGEST_SWITCH


def _masks_others(value: Any) -> bool:
    return _is_there(value) and str(value).lower() != "user"


_LONGEST_SWITCH = 20
_MEDIA = Meaning(_is_there, "only text is trained: remove these rows")
_PREFERENCE = Meaning(
    _is_there,
    "a preference dataset: set training.objective to dpo, or name the columns to train in data.columns, such as "
    "{prompt: prompt, completion: chosen}",
    is_field=True,
)
_REASONING = Meaning(
    _is_prose,
    "it belongs before the answer: write the row as messages, with it as reasoning_content of the answer",
    is_field=True,
)
_RATED_BAD = Meaning(_is_false, "the row says that its answer is a bad one: remove the row", "rated_bad")
_WEIGHT = Meaning(_is_no_weight, "a row weighs from 0 to 1: write such numbers, or give data.weight for the dataset")
WEIGHT_COLUMNS = ("weight", "loss_weight")

MEANINGS: dict[str, Meaning] = {
    "context": Meaning(
        _is_there, "it belongs to the prompt: join it with the prompt, or map it as data.columns: {input: context}"
    ),
    "system_prompt": Meaning(_is_there, "map it: data.columns: {system: system_prompt}", is_field=True),
    "functions": Meaning(_is_there, "map it: data.columns: {tools: functions}", is_field=True),
    "history": Meaning(_is_there, "write earlier turns as messages", is_field=True),
    **dict.fromkeys(("label", "kto_tag"), _RATED_BAD),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking", "thought", "rationale"), _REASONING),
    **dict.fromkeys(("cot", "complex_cot", "chain_of_thought"), _REASONING),
    "documents": Meaning(_is_there, "they belong to the prompt: write them into a message", is_field=True),
    "chat_template_kwargs": Meaning(
        _is_there, "set tokenization.template_arguments, which holds for the dataset, and read rows of each kind apart"
    ),
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PREFERENCE),
    **dict.fromkeys(WEIGHT_COLUMNS, _WEIGHT),
    "mask": Meaning(_masks_others, "write train: false on the messages that are not trained"),
}
"""By names in small letters; a column may have capitals."""


def check_meaning(row: dict[str, Any], layout: Layout) -> None:
    """Refuse a row with a column that changes its meaning and that nobody reads.

    Raises:
        RowError: unread_meaning or rated_bad; names the column, its value and the way out.
    """
    for column, meaning in _find_meanings(tuple(row)):
        if column in layout.read_columns or column in layout.ignored_columns:
            continue
        if meaning.matters(row[column]) and not (meaning.is_field and layout.is_given):
            raise RowError(
                meaning.reason,
                f"column {column} = {str(row[column])[:80]!r} is not read as {layout.format}, and it changes what "
                f"the row means: {meaning.way_out}; where it does not matter, set data.ignored_columns: [{column}]",
            )


@lru_cache(maxsize=256)
def _find_meanings(columns: tuple[str, ...]) -> tuple[tuple[str, Meaning], ...]:
    """Return the columns that would say something."""
    named = ((column, MEANINGS.get(str(column).lower())) for column in columns)
    return tuple((column, meaning) for column, meaning in named if meaning is not None)


def find_row_weight(row: dict[str, Any], layout: Layout) -> float:
    """Return what a checked row says that it weighs, 0 to 1; 1 where it does not say."""
    weight = 1.0
    for column, _ in _find_meanings(tuple(row)):
        is_ours = column not in layout.read_columns and column not in layout.ignored_columns
        if is_ours and column.lower() in WEIGHT_COLUMNS:
            found = read_row_weight(row[column])
            weight = weight if found is None else found
    return weight
