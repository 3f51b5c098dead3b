"""Control tokens spelled out inside contents: found, counted, and kept as plain text.

A conversation about chat templates may hold the text of an end-of-turn token. Rendered and encoded, it would become
that token. Where it is not allowed, such a text is marked before rendering with two characters that nothing else in the
conversation uses, and encoded as ordinary text afterwards. The result is what
`apply_chat_template(..., sanitize_control_tokens=True)` serves for the same tokens.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tasks.tokenization.encoding import encode
from tasks.tokenization.errors import MaskError
from tasks.tokenization.rendering import Chat, Message, Tool


@dataclass(frozen=True)
class Marks:
    """The two characters around a literal control token, and how to find them again."""

    opening: str
    closing: str
    marked: re.Pattern[str]
    """A marked token, or one of the two characters alone."""

    def remove(self, text: str) -> str:
        """Return the text without marks."""
        return text.replace(self.opening, "").replace(self.closing, "")


def control_tokens(chat: Chat) -> frozenset[str]:
    """Return the tokens that a content must not contain: special ones, and those that frame the template's turns."""
    frame = chat.ending.user_frame + chat.ending.kept
    return chat.special | {token for token in chat.added if token in frame and token not in _OPEN_TAGS}


# Tags that contents write themselves, and that templates read and write again; not special in any vocabulary that
# has them as tokens.
_OPEN_TAGS = frozenset({"<think>", "</think>"})


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string of messages or tools but the keys and roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from strings_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


def count_literals(chat: Chat, messages: Sequence[Message], tools: Sequence[Tool] | None) -> int:
    """Return how often contents spell a control token."""
    prefixes, pattern = _finder(control_tokens(chat))
    num_literals = 0
    for text in strings_of([messages, tools]):
        if any(prefix in text for prefix in prefixes):
            num_literals += len(pattern.findall(text))
    return num_literals


def find_literal_endings(chat: Chat, messages: Sequence[Message], indices: Sequence[int]) -> tuple[str, ...]:
    """Return the control tokens that trained answers end with as text."""
    pattern = _finder(control_tokens(chat))[1]
    found = []
    for index in indices:
        content = messages[index].get("content")
        matches = pattern.findall(content.rstrip()) if isinstance(content, str) else []
        if matches and str(content).rstrip().endswith(matches[-1]):
            found.append(str(matches[-1]))
    return tuple(found)


_FINDERS: dict[frozenset[str], tuple[tuple[str, ...], re.Pattern[str]]] = {}


def _finder(tokens: frozenset[str]) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """Return the tokens' first two characters, for a quick look, and a pattern of the tokens, longest first."""
    if tokens not in _FINDERS:
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        _FINDERS[tokens] = (tuple(sorted({token[:2] for token in tokens})), pattern)
    return _FINDERS[tokens]


def mark_literals(
    chat: Chat, messages: Sequence[Message], tools: Sequence[Tool] | None
) -> tuple[list[Message], list[Tool] | None, Marks]:
    """Put marks around the control tokens that contents spell."""
    pattern = _finder(control_tokens(chat))[1]
    used = {character for text in strings_of([messages, tools]) for character in text if character >= "\ue000"}
    free = [chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used][:2]
    if len(free) < 2:
        raise MaskError("control_literal", "the contents use the whole private area of Unicode: none is left for marks")
    opening, closing = free
    marks = Marks(opening, closing, re.compile(f"{opening}({pattern.pattern}){closing}|[{opening}{closing}]"))

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(f"{opening}\\g<0>{closing}", value)
        if isinstance(value, dict):
            return {key: item if key == "role" else mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [mark(item) for item in value]
        return value

    return mark(list(messages)), mark(list(tools)) if tools is not None else None, marks


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, marks: Marks) -> list[int]:
    """Encode a rendered text whose marked tokens stay text.

    A mark that the template has torn from its token still ends a piece, so that the text around cannot join into a
    control token.
    """
    pieces = marks.marked.split(text)
    line_end = encode(tokenizer, "\n")
    ids = encode(tokenizer, pieces[0])
    for number, piece in enumerate(pieces[1:], start=1):
        if not piece:
            continue
        # Behind a line's end, so that no space is put before a piece that is not the text's first.
        encode_piece = _as_text if number % 2 else encode
        piece_ids = encode_piece(tokenizer, "\n" + piece)
        if piece_ids[: len(line_end)] == line_end:
            piece_ids = piece_ids[len(line_end) :]
        else:
            piece_ids = encode_piece(tokenizer, piece)
        if number % 2 and tokenizer.convert_tokens_to_ids(piece) in piece_ids:
            raise MaskError("control_literal", f"the tokenizer has only the control token for the text {piece!r}")
        ids += piece_ids
    return ids


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode with no added token recognised, special or not."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for piece in pieces for token in backend.model.tokenize(piece)]
