"""How a row becomes a conversation: its messages and its tools, in one form whatever the format."""

from collections import Counter
from typing import Any, NamedTuple

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.flags import weigh_answers
from tasks.ingestion.rows.formats import FORMATS
from tasks.ingestion.rows.layouts import Layout
from tasks.ingestion.rows.meaning import WEIGHT_COLUMNS, check_meaning, find_row_weight
from tasks.ingestion.rows.messages import Message, check_messages
from tasks.ingestion.rows.preferences import mark_answers
from tasks.ingestion.rows.toolcalls import name_schemas, read_tools


class Converted(NamedTuple):
    """What a row says."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    rejected: list[Message] | None = None
    """The messages with the answer that is not preferred, where the row is a pair."""


def convert_row(row: Any, layout: Layout, *, invented_nulls: bool, unused: Counter[str]) -> Converted:
    """Turn a row into the messages and tools of a conversation, or of two that differ in the answer.

    Args:
        row: the parsed row.
        layout: its format and columns.
        invented_nulls: the row comes from Arrow's columns, where objects have the keys of all others as nulls.
        unused: counts columns and message keys that are not read.

    Raises:
        RowError: the row cannot be used, with a fixed reason.
    """
    if not isinstance(row, dict):
        raise RowError("not_an_object", f"the row is of type {type(row).__name__}: named columns are wanted")
    form = FORMATS[layout.format]
    for names in form.required:
        if layout.columns[names[0]] not in row:
            detail = f"no {layout.columns[names[0]]}; its columns: {', '.join(row) or 'none'} (format {layout.format})"
            raise RowError("missing_field", detail)
    check_meaning(row, layout)
    weight = find_row_weight(row, layout)
    for column in row.keys() - layout.read_columns:
        if weight == 1 or column.lower() not in WEIGHT_COLUMNS:
            unused[f"column {column}"] += 1
    tools = read_tools(layout.get(row, "tools"), invented_nulls=invented_nulls)
    schemas = name_schemas(tools) if invented_nulls else None
    messages = _finish(form.convert(row, layout, schemas, unused), row, layout, weight, unused)
    if form.convert_rejected is None:
        return Converted(messages, tools)
    if weight != 1:
        raise RowError("unread_meaning", "the row has a weight, and pairs all weigh the same: leave its column out")
    others: Counter[str] = Counter()
    rejected = _finish(form.convert_rejected(row, layout, schemas, others), row, layout, weight, others)
    unused |= others  # what is not read of the prompt is the same in both
    mark_answers(messages, rejected)
    return Converted(messages, tools, rejected)


def _finish(
    messages: list[Message], row: dict[str, Any], layout: Layout, weight: float, unused: Counter[str]
) -> list[Message]:
    """Add what stands beside the messages in a row, and check them."""
    system = layout.get_text(row, "system")
    if system and messages and messages[0]["role"] == "system":
        unused["column system, where the messages have their own"] += messages[0]["content"] != system
    elif system:
        messages.insert(0, {"role": "system", "content": system})
    if layout.trim_trailing_user:
        _trim(messages, unused)
    if weight != 1:
        weigh_answers(messages, weight)
    check_messages(messages)
    _skip_greeting(messages, unused)
    return messages


def _trim(messages: list[Message], unused: Counter[str]) -> None:
    """Cut the user messages at the end."""
    while messages and messages[-1]["role"] == "user":
        messages.pop()
        unused["user messages at the end, cut by data.trim_trailing_user"] += 1


def _skip_greeting(messages: list[Message], unused: Counter[str]) -> None:
    """Train no answer that nothing stands before: nobody can be served it; the turns after it see it."""
    if messages[0]["role"] == "assistant" and messages[0].get("train") is not False:
        messages[0]["train"] = False
        unused["first messages that are the assistant's: kept as context, not trained"] += 1
        if not any(message.get("train", True) for message in messages if message["role"] == "assistant"):
            raise RowError("nothing_to_train", "the only answer stands before every question")
