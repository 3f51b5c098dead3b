"""What makes two conversations the same: exactly, and up to case, width and spaces.

`example_id` is the exact identity: the first 32 hexadecimal digits of the sha256 of the canonical JSON of
`{"messages": [...], "tools": [...] or null}` (keys sorted, no spaces, text not escaped, UTF-8).

Keys are the loose identity, used to find leaks. Text is normalized by NFKC, case folding and spaces; system
messages and tools do not count. A conversation has a key for every assistant message: a digest of everything up to
and with it. The last one stands for the whole conversation. So a training row that begins with a held-out
conversation is found too: it would teach that very answer to that very prompt.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tasks.ingestion.messages import Message
from tasks.ingestion.quality import find_text_problems
from tasks.ingestion.rejects import RowError
from tasks.ingestion.screening import Screen, may_hold_any, screen_values

ID_DIGITS = 32
KEY_BYTES = 16
CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
WRITTEN = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A usable row: what is written, and what it is compared by."""

    example_id: str
    source: str
    line: int
    messages: str
    """JSON text; keys in the order in which templates write them."""
    tools: str | None
    """JSON text, or None where there are none."""
    keys: tuple[bytes, ...]
    """Loose identity up to each assistant message."""
    prompt_key: bytes
    """Loose identity of everything before the last assistant message."""
    num_turns: int
    """Assistant messages."""
    prompt_characters: int
    """In messages that are not the assistant's."""
    answer_characters: int
    """In the assistant's messages, tool calls not counted."""
    problems: tuple[str, ...]
    """Codes of what looks wrong in the text but is kept; see quality.TEXT_PROBLEMS."""
    found: tuple[str, ...] = ()
    """Kinds of personal data and secrets, one for each place; see screening.KINDS."""


def make_conversation(
    messages: list[Message], tools: list[dict[str, Any]] | None, source: str, line: int, screen: Screen = "off"
) -> Conversation:
    """Look for personal data and secrets, and give the conversation its identities.

    Identities are those of the text that is written, so with placeholders where `screen` is redact.

    Raises:
        RowError: broken_text, where a text cannot be written as UTF-8 or a number as JSON.
    """
    try:
        text = WRITTEN.encode(messages)
        tools_text = None if tools is None else WRITTEN.encode(tools)
        found: Counter[str] = Counter()
        if screen != "off" and (may_hold_any(text) or (tools_text and may_hold_any(tools_text))):
            messages, tools = screen_values([messages, tools], found, redact=screen == "redact")
        if found and screen == "redact":
            text = WRITTEN.encode(messages)
            tools_text = None if tools is None else WRITTEN.encode(tools)
        canonical = CANONICAL.encode({"messages": messages, "tools": tools}).encode()
    except UnicodeEncodeError as error:
        raise RowError("broken_text", f"character {error.start} is half of a surrogate pair ({error.reason})") from None
    except ValueError as error:
        raise RowError("bad_tool_call", f"a tool or its call cannot be written as JSON: {error}") from None
    keys, prompt_key = _make_keys(messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    contents = [message["content"] for message in messages]
    answer_characters = sum(map(len, answers))
    return Conversation(
        example_id=hashlib.sha256(canonical).hexdigest()[:ID_DIGITS],
        source=source,
        line=line,
        messages=text,
        tools=tools_text,
        keys=keys,
        prompt_key=prompt_key,
        num_turns=len(answers),
        prompt_characters=sum(map(len, contents)) - answer_characters,
        answer_characters=answer_characters,
        problems=find_text_problems("\n".join(contents)),
        found=tuple(found.elements()),
    )


def normalize_text(text: str) -> str:
    """Fold case and width, and make every run of white space one space."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def _make_keys(messages: list[Message]) -> tuple[tuple[bytes, ...], bytes]:
    """Return the loose identity up to each assistant message, and that of all before the last one."""
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    keys, before = [], b""
    for message in messages:
        role = message["role"]
        if role == "system":
            continue
        if role == "assistant":
            before = state.digest()
        text = normalize_text(message["content"])
        if "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            text += "\0" + json.dumps(functions, sort_keys=True)
        state.update(f"{role}\0{text}\1".encode())
        if role == "assistant":
            keys.append(state.digest())
    return tuple(keys), before
