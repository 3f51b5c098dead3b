"""Control tokens spelled out inside contents: found, counted, and kept as plain text.

A conversation about chat templates may hold the text of an end-of-turn token. Rendered and encoded, it would become
that token. Where it is not allowed, such a text is marked before rendering with two characters that nothing else in the
conversation uses, and encoded as ordinary text afterwards. The result is what
`apply_chat_template(..., sanitize_control_tokens=True)` serves for the same tokens.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tasks import prompts
from tasks.prompts import Marks, find_tokens
from tasks.tokenization.errors import MaskError
from tasks.tokenization.rendering import Chat, Message, Tool

__all__ = ["Marks", "control_tokens", "count_literals", "encode_marked", "find_literal_endings", "mark_literals"]

# Tags that contents write themselves, and that templates read and write again; not special in any vocabulary that
# has them as tokens.
_OPEN_TAGS = frozenset({"<think>", "</think>"})


def control_tokens(chat: Chat) -> frozenset[str]:
    """Return the tokens that a content must not contain: special ones, and those that frame the template's turns."""
    frame = chat.ending.user_frame + chat.ending.kept
    return chat.special | {token for token in chat.added if token in frame and token not in _OPEN_TAGS}


def count_literals(chat: Chat, messages: Sequence[Message], tools: Sequence[Tool] | None) -> int:
    """Return how often contents spell a control token."""
    return prompts.count_literals(control_tokens(chat), [messages, tools])


def find_literal_endings(chat: Chat, messages: Sequence[Message], indices: Sequence[int]) -> tuple[str, ...]:
    """Return the control tokens that trained answers end with as text."""
    pattern = find_tokens(control_tokens(chat))[1]
    found = []
    for index in indices:
        text = prompts.text_of(messages[index].get("content")).rstrip()
        matches = pattern.findall(text)
        if matches and text.endswith(matches[-1]):
            found.append(str(matches[-1]))
    return tuple(found)


def mark_literals(
    chat: Chat, messages: Sequence[Message], tools: Sequence[Tool] | None
) -> tuple[list[Message], list[Tool] | None, Marks]:
    """Put marks around the control tokens that contents spell.

    Raises:
        MaskError: no characters are left for marks.
    """
    try:
        return prompts.mark_literals(control_tokens(chat), messages, tools)
    except prompts.RequestError as error:
        raise MaskError("control_literal", str(error)) from None


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, marks: Marks) -> list[int]:
    """Encode a rendered text whose marked tokens stay text.

    Raises:
        MaskError: the tokenizer has only the control token for such a text.
    """
    try:
        return prompts.encode_marked(tokenizer, text, marks)
    except prompts.RequestError as error:
        raise MaskError("control_literal", str(error)) from None
