"""How a row becomes a conversation: its messages and its tools, in one form whatever the format."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from tasks.ingestion.rejects import RowError
from tasks.ingestion.rows.messages import Message, check_messages, read_messages
from tasks.ingestion.rows.toolcalls import name_schemas, read_tools
from tasks.ingestion.sources.formats import FORMATS, Layout


def convert_row(
    row: Any, layout: Layout, *, invented_nulls: bool, unused: Counter[str]
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Turn a row into the messages and tools of a conversation.

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
    for column in row.keys() - layout.read_columns:
        unused[f"column {column}"] += 1
    for names in FORMATS[layout.format].required:
        if layout.columns[names[0]] not in row:
            detail = f"no {layout.columns[names[0]]}; its columns: {', '.join(row) or 'none'} (format {layout.format})"
            raise RowError("missing_field", detail)
    tools = read_tools(_get(row, layout, "tools"), invented_nulls=invented_nulls)
    schemas = name_schemas(tools) if invented_nulls else None
    messages = CONVERTERS[layout.format](row, layout, schemas, unused)
    system = _get_text(row, layout, "system")
    if system and messages and messages[0]["role"] == "system":
        unused["column system, where the messages have their own"] += messages[0]["content"] != system
    elif system:
        messages.insert(0, {"role": "system", "content": system})
    check_messages(messages)
    return messages, tools


Converter = Callable[[dict[str, Any], Layout, dict[str, Any] | None, Counter[str]], list[Message]]


def _convert_alpaca(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """instruction, a line feed and input make the prompt; history is earlier pairs of question and answer."""
    messages: list[Message] = []
    for pair in _read_history(_get(row, layout, "history")):
        messages += _make_turn(*pair)
    return messages + _make_turn(_join_prompt(row, layout, "instruction"), _require_text(row, layout, "output"))


def _convert_instruct(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """Turn instruct, a line feed and input into the prompt, and label into the answer."""
    return _make_turn(_join_prompt(row, layout, "instruct"), _require_text(row, layout, "label"))


def _convert_prompt_completion(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """Take prompt and completion as texts, or as lists of messages."""
    prompt, completion = row[layout.columns["prompt"]], row[layout.columns["completion"]]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _make_turn(_require_text(row, layout, "prompt"), _require_text(row, layout, "completion"))
    parts: list[Any] = []
    for value, role in ((prompt, "user"), (completion, "assistant")):
        parts += value if isinstance(value, list) else [{"role": role, "content": value}]
    return read_messages(parts, tags=layout.tags, schemas=schemas, unused=unused)


def _convert_messages(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """Read the one column of messages, of either naming (role and content, from and value)."""
    field_name = FORMATS[layout.format].required[0][0]
    return read_messages(row[layout.columns[field_name]], tags=layout.tags, schemas=schemas, unused=unused)


CONVERTERS: dict[str, Converter] = {
    "messages": _convert_messages,
    "sharegpt": _convert_messages,
    "alpaca": _convert_alpaca,
    "instruct": _convert_instruct,
    "prompt_completion": _convert_prompt_completion,
}


def _make_turn(prompt: str, answer: str) -> list[Message]:
    """Return a user message and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _get(row: dict[str, Any], layout: Layout, name: str) -> Any:
    """Return the value of an optional field, None where the format or the row has none."""
    column = layout.columns.get(name)
    return None if column is None else row.get(column)


def _get_text(row: dict[str, Any], layout: Layout, name: str) -> str:
    """Return an optional text; null, absent and blank are the empty text."""
    value = _get(row, layout, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("not_text", f"{layout.columns[name]} is of type {type(value).__name__}: text is wanted")
    return value if value.strip() else ""


def _require_text(row: dict[str, Any], layout: Layout, name: str) -> str:
    """Return a required text, as it is."""
    value = row[layout.columns[name]]
    if value is None:
        raise RowError("null_content", f"{layout.columns[name]} is null")
    if not isinstance(value, str):
        raise RowError("not_text", f"{layout.columns[name]} is of type {type(value).__name__}: text is wanted")
    return value


def _join_prompt(row: dict[str, Any], layout: Layout, name: str) -> str:
    """Join the instruction and the input by a line feed; a blank one is left out."""
    parts = [_require_text(row, layout, name), _get_text(row, layout, "input")]
    return "\n".join(part for part in parts if part.strip())


def _read_history(value: Any) -> list[tuple[str, str]]:
    """Return the earlier pairs of question and answer of an alpaca row."""
    if value is None or value == "":
        return []
    if isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value
    ):
        return [(question, answer) for question, answer in value]
    raise RowError("bad_history", f"history is {str(value)[:120]!r}: a list of [question, answer] is wanted")
