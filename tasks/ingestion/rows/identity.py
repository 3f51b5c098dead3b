"""What makes two conversations the same: exactly, and up to case, width and spaces.

`example_id` is the exact identity: the first 32 hexadecimal digits of the sha256 of the canonical JSON of
`{"messages": [...], "tools": [...] or null}`, of a pair also `"rejected": [...]` (keys sorted, no spaces, text not
escaped, UTF-8).

Keys are the loose identity, used to find leaks. Text is normalized by NFKC, case folding and spaces; tools do not
count, nor do system messages, but for one that the assistant answers. A conversation has a key for every assistant
message: a digest of everything up to and with it. The last one stands for the whole conversation. So a training row
that begins with a held-out conversation is found too: it would teach that very answer to that very prompt.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from typing import Any, NamedTuple

import orjson

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.messages import Message
from tasks.ingestion.rows.quality import find_text_problems
from tasks.ingestion.rows.screening import Screen, may_hold_any, screen_values

ID_DIGITS = 32
KEY_BYTES = 16
CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
WRITTEN = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class UsableRow(NamedTuple):
    """A usable row: what is written, and what it is compared by."""

    example_id: str
    source: str
    line: int
    messages: str
    """JSON text; keys in the order in which templates write them."""
    tools: str | None
    """JSON text, or None where there are none."""
    rejected: str | None
    """JSON text of the messages with the answer that is not preferred, or None where the row is no pair."""
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
    found: tuple[str, ...]
    """Kinds of personal data and secrets, one for each place; see screening.KINDS."""
    text: bytes
    """Normalized text of all messages but the system's; near duplicates are found by it."""


def make_conversation(
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    source: str,
    line: int,
    screen: Screen = "off",
    rejected: list[Message] | None = None,
) -> UsableRow:
    """Look for personal data and secrets, and give the conversation its identities.

    Identities are those of the text that is written, so with placeholders where `screen` is redact. Of a pair the loose
    ones are those of the chosen answer.

    Raises:
        RowError: broken_text, where a text cannot be written as UTF-8 or a number as JSON.
    """
    try:
        text = WRITTEN.encode(messages)
        others = [None if other is None else WRITTEN.encode(other) for other in (tools, rejected)]
        found: Counter[str] = Counter()
        if screen != "off" and any(map(may_hold_any, filter(None, (text, *others)))):
            messages, tools, rejected = screen_values([messages, tools, rejected], found, redact=screen == "redact")
        if found and screen == "redact":
            text = WRITTEN.encode(messages)
            others = [None if other is None else WRITTEN.encode(other) for other in (tools, rejected)]
        pair = {} if rejected is None else {"rejected": rejected}
        canonical = CANONICAL.encode({"messages": messages, "tools": tools, **pair}).encode()
    except UnicodeEncodeError as error:
        raise RowError("broken_text", f"character {error.start} is half of a surrogate pair ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise RowError("bad_tool_call", f"a tool or its call cannot be written as JSON: {error}") from None
    problems = find_text_problems("\n".join([message["content"] for message in (*messages, *(rejected or ()))]))
    return _describe(messages, canonical, source, line, (text, others[0], others[1]), problems, tuple(found.elements()))


def make_plain_conversation(messages: list[Message], source: str, line: int) -> UsableRow | None:
    """Do what make_conversation does, five times as fast, for messages of nothing but a role and a content.

    Nothing is screened, and no text problems are looked for.

    Returns:
        None where the messages have more, or cannot be written.
    """
    written, canonical = [], []
    try:
        for message in messages:
            if len(message) != 2:
                return None
            role, content = ROLES_WRITTEN[message["role"]], orjson.dumps(message["content"])
            written.append(role[0] + content)
            canonical.append(content + role[1])
    except orjson.JSONEncodeError:  # half of a surrogate pair
        return None
    text = (b"[" + b"}, ".join(written) + b"}]").decode()
    whole = b'{"messages":[{"content":' + b',{"content":'.join(canonical) + b'],"tools":null}'
    return _describe(messages, whole, source, line, (text, None, None), (), ())


# What goes before a content where it is written, and behind it where it is digested.
ROLES_WRITTEN: dict[str, tuple[bytes, bytes]] = {
    role: (f'{{"role": "{role}", "content": '.encode(), f',"role":"{role}"}}'.encode())
    for role in ("system", "user", "assistant", "tool")
}


def normalize_text(text: str) -> bytes:
    """Fold case and width, and make every run of white space one space."""
    if not text.isascii():
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()
    folded = text.encode().translate(FOLDED)
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    return folded.strip(b" ")


# ASCII in lower case, with a space for what str.split() splits at.
FOLDED = bytes(32 if chr(byte).isspace() and byte < 128 else ord(chr(byte).lower()) & 255 for byte in range(256))


def _describe(
    messages: list[Message],
    canonical: bytes,
    source: str,
    line: int,
    written: tuple[str, str | None, str | None],
    problems: tuple[str, ...],
    found: tuple[str, ...],
) -> UsableRow:
    """Digest the canonical text, and the normalized one up to and with each assistant message.

    `written` is the JSON text of messages, tools and rejected messages.
    """
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    keys, texts = [], []
    prompt_key = b""
    prompt_characters = answer_characters = 0
    is_prompt = [message["role"] for message in messages[:2]] == ["system", "assistant"]
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            prompt_key = state.digest()
            answer_characters += len(content)
        else:
            prompt_characters += len(content)
            if role == "system" and not is_prompt:
                continue
        text = normalize_text(content)
        texts.append(text)
        if "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            text += b"\0" + json.dumps(functions, sort_keys=True).encode()
        state.update(b"%b\0%b\1" % (role.encode(), text))
        if role == "assistant":
            keys.append(state.digest())
    example_id = hashlib.sha256(canonical).hexdigest()[:ID_DIGITS]
    text_of_messages, tools, rejected = written
    # By place: names would cost as much as the digest.
    return UsableRow(
        *(example_id, source, line, text_of_messages, tools, rejected, tuple(keys), prompt_key, len(keys)),
        *(prompt_characters, answer_characters, problems, found, b" ".join(texts)),
    )
