"""Messages in one form, and the order that their roles must have.

A message is `{"role", "content"}` with content always text, and only where the data has them: `tool_calls`,
`tool_call_id`, `name`, `reasoning_content`, `thinking`, `train`. Text stays exactly as it was: placeholders such as
{{name}}, spaces and line ends are data.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.flags import FLAG_KEYS, check_refused, read_train_flag
from tasks.ingestion.rows.toolcalls import read_function_call_text, read_tool_calls

Message = dict[str, Any]
FUNCTION_CALL = "function_call"
MOST_CHARACTERS = 64 << 20
"""Of a conversation; see MOST_LINE_BYTES."""
ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": FUNCTION_CALL,
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
TEXT_KEYS = {
    "name": "name",
    "tool_call_id": "tool_call_id",
    "reasoning_content": "reasoning_content",
    "reasoning": "reasoning_content",
    "thinking": "thinking",
}
READ_KEYS = frozenset({*TEXT_KEYS, *FLAG_KEYS, "tool_calls", "function_call"})
# What may follow what; tool results may also follow calls that are written as plain assistant text.
FOLLOWERS: dict[str | None, frozenset[str]] = {
    None: frozenset({"system", "user", "assistant"}),
    "system": frozenset({"user", "assistant"}),
    "user": frozenset({"assistant"}),
    "assistant": frozenset({"user", "assistant", "tool"}),
    "tool": frozenset({"tool", "assistant"}),
}


@dataclass(frozen=True)
class Tags:
    """How the data names a message's keys and roles."""

    role_keys: tuple[str, ...] = ("role", "from")
    content_keys: tuple[str, ...] = ("content", "value")
    roles: dict[str, str] = field(default_factory=lambda: ROLES)


DEFAULT_TAGS = Tags()


def read_messages(
    value: Any,
    *,
    tags: Tags = DEFAULT_TAGS,
    schemas: dict[str, Any] | None = None,
    unused: Counter[str] | None = None,
) -> list[Message]:
    """Bring a list of messages (or its JSON text) to the one form.

    Args:
        value: the messages as they were read.
        tags: names of keys and roles.
        schemas: parameters by function name where nulls may come from Arrow's columns, else None.
        unused: counts the message keys that nobody reads.

    Raises:
        RowError: a message cannot be understood.
    """
    unused = Counter() if unused is None else unused
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_json(value)
    if value is None:
        raise RowError("null_content", "the messages are null")
    if not isinstance(value, list):
        raise RowError("bad_message", f"the messages are of type {type(value).__name__}: a list is wanted")
    return [_read_message(item, number, tags, schemas, unused) for number, item in enumerate(value, start=1)]


def _read_message(item: Any, number: int, tags: Tags, schemas: dict[str, Any] | None, unused: Counter[str]) -> Message:
    """Bring one message to the form; `number` is its 1-based place."""
    plain = _read_plain(item, tags)
    if plain is not None:
        return plain
    if isinstance(item, str) and item.lstrip().startswith("{"):
        item = _parse_json(item)
    if not isinstance(item, dict):
        raise RowError("bad_message", f"message {number} is of type {type(item).__name__}: an object is wanted")
    role, role_key = _read_role(item, number, tags)
    content_key = next((key for key in tags.content_keys if key in item), None)
    content = item[content_key] if content_key else None
    message: Message = {"role": role, "content": ""}
    if role == FUNCTION_CALL:
        message["role"] = "assistant"
        text = _read_content(content, number, role)
        message["tool_calls"], reasoning = read_function_call_text(text, unused)
        if reasoning is not None:
            message["reasoning_content"] = reasoning
    else:
        _add_tool_calls(message, item, schemas, unused)
        if content is not None or "tool_calls" not in message:
            if content_key is None:
                raise RowError("bad_message", f"message {number} has no content; its keys: {', '.join(item)}")
            message["content"] = _read_content(content, number, role)
    if len(item) > 2:
        _add_optional(message, item, number)
        for key in item.keys() - READ_KEYS - {role_key, content_key}:
            if item[key] is not None:
                unused[f"message key {key}"] += 1
    return message


def _read_plain(item: Any, tags: Tags) -> Message | None:
    """Return a message that is a known role and a text under the usual names, and None for every other."""
    if type(item) is not dict or len(item) != 2 or tags.role_keys[0] != "role" or tags.content_keys[0] != "content":
        return None
    given, content = item.get("role"), item.get("content")
    role = tags.roles.get(given) if type(given) is str else None
    if role is None or role == FUNCTION_CALL or type(content) is not str:
        return None
    return {"role": role, "content": content}


def _read_role(item: dict[str, Any], number: int, tags: Tags) -> tuple[str, str]:
    """Return our name of the role, and the key under which it was."""
    key = next((key for key in tags.role_keys if item.get(key) is not None), None)
    if key is None:
        raise RowError("bad_message", f"message {number} has no role; its keys: {', '.join(item) or 'none'}")
    given = item[key]
    role = tags.roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowError("unknown_role", f"message {number} has the role {given!r}; known: {', '.join(tags.roles)}")
    return role, key


def _read_content(content: Any, number: int, role: str) -> str:
    """Return a text, or the joined texts of a list of text parts."""
    if isinstance(content, str):
        return content
    if content is None:
        raise RowError("null_content", f"message {number} ({role}): its content is null")
    if isinstance(content, list) and content:
        return "".join(_read_part(part, number) for part in content)
    raise RowError("not_text", f"message {number} ({role}): its content is of type {type(content).__name__}")


def _read_part(part: Any, number: int) -> str:
    """Return the text of one content part (LLaMA-Factory v1 calls it value); images and sounds are not trained."""
    text = None
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise RowError("not_text", f"message {number}: a content part of type {kind!r}: only text is known")
    return text


def _add_tool_calls(
    message: Message, item: dict[str, Any], schemas: dict[str, Any] | None, unused: Counter[str]
) -> None:
    """Add the calls of an assistant message, from `tool_calls` or the older `function_call`."""
    value = item.get("tool_calls") or item.get("function_call")
    if not value:
        return
    if message["role"] != "assistant":
        raise RowError("bad_tool_call", f"a {message['role']} message has tool calls: only the assistant's may")
    if isinstance(value, str):
        value = _parse_json(value)
    calls = read_tool_calls(value, schemas, unused)
    if calls:
        message["tool_calls"] = calls


def _add_optional(message: Message, item: dict[str, Any], number: int) -> None:
    """Add what templates and the label mask read besides role and content."""
    for key, ours in TEXT_KEYS.items():
        value = item.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise RowError("not_text", f"message {number}: {key} is of type {type(value).__name__}")
        message[ours] = value
    check_refused(item, number)
    flag = read_train_flag(item, message["role"], number)
    if isinstance(flag, float):
        message["weight"] = flag
    elif flag is not None:
        message["train"] = flag


def _parse_json(text: str) -> Any:
    """Parse messages, or one, that are kept as JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("bad_message", f"messages as text are not JSON ({error}): {text[:120]}") from None


def check_messages(messages: list[Message]) -> None:
    """Check roles, their order and that every turn says something.

    The order is one optional system message, an optional first message of the assistant, then user turns, each
    answered by one or more assistant messages with tool results between them; the assistant has the last word.

    Raises:
        RowError: names the message.
    """
    if not messages:
        raise RowError("empty_conversation", "the list of messages is empty")
    if (size := sum(len(message["content"]) for message in messages)) > MOST_CHARACTERS:
        raise RowError("too_large", f"the messages have {size:,} characters, and {MOST_CHARACTERS:,} are read at most")
    before = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in FOLLOWERS[before]:
            after = f"after {before}" if before else "as the first message"
            raise RowError("wrong_role_order", f"message {number} is {role} {after}")
        if not message["content"].strip() and "tool_calls" not in message:
            if role == "assistant":
                raise RowError("empty_answer", f"message {number}: the assistant says nothing")
            if role == "user":
                raise RowError("empty_prompt", f"message {number}: the user says nothing")
        before = role
    _check_end(messages)


def _check_end(messages: list[Message]) -> None:
    """Check that the assistant ends the conversation and that something is left to learn."""
    last = messages[-1]["role"]
    if last == "user":
        raise RowError("ends_with_user", f"message {len(messages)}, the last, is the user's")
    if last == "tool":
        raise RowError("ends_with_tool", f"message {len(messages)}, the last, is a tool's result")
    if last != "assistant":
        raise RowError("no_assistant", "no message is the assistant's")
    if not any(message.get("train", True) for message in messages if message["role"] == "assistant"):
        raise RowError("nothing_to_train", "every assistant message says train: false")


def alternate_strictly(messages: list[Message]) -> bool:
    """Tell whether user (or one tool result) and assistant take turns one by one, after a system message."""
    roles = [message["role"] for message in messages if message["role"] != "system"]
    return len(roles) % 2 == 0 and all((role == "assistant") == bool(place % 2) for place, role in enumerate(roles))
