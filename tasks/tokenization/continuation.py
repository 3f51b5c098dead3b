"""One turn as ids, by itself: the prompt exactly as served, the answer as its continuation."""

import unicodedata
from collections.abc import Callable, Sequence

from tasks.tokenization.encoding import decode_batch, encode
from tasks.tokenization.errors import MaskError
from tasks.tokenization.literals import Marks, encode_marked
from tasks.tokenization.rendering import Chat
from tasks.tokenization.turns import Turn


def encode_turn(chat: Chat, turn: Turn, marks: Marks | None = None) -> tuple[list[int], list[int]]:
    """Encode one turn by itself: the slow way, and the meaning of the fast one.

    The prompt's ids are those of the prompt alone, since that is what is served. The answer's ids are those that
    follow them when both are encoded at once; where the tokenizer merges across the border, those of the answer
    encoded as a continuation.

    Returns:
        The ids of the prompt and of the target, without an appended eos.

    Raises:
        MaskError: no ids decode to the target.
    """
    tokenizer = chat.tokenizer

    def ids_of(text: str) -> list[int]:
        return encode_marked(tokenizer, text, marks) if marks else encode(tokenizer, text)

    prompt_ids = ids_of(turn.prompt)
    whole = ids_of(turn.prompt + turn.target)
    target = marks.remove(turn.target) if marks else turn.target
    candidates: list[list[int]] = []
    if whole[: len(prompt_ids)] == prompt_ids and not absorbs_space(chat, prompt_ids, target):
        candidates.append(whole[len(prompt_ids) :])
    anchor = _anchor(chat, prompt_ids)
    candidates.append(_encode_after(anchor, turn.target, ids_of))
    candidates.append(ids_of(turn.target))
    candidates.append(_piecewise(chat, anchor, turn.target, ids_of))
    for candidate in candidates:
        if decodes_to(chat, prompt_ids, candidate, target):
            return prompt_ids, candidate
    raise MaskError(
        "not_representable",
        f"message {turn.index + 1}: the tokenizer has no ids that decode to {target[:80]!r} "
        f"(nearest: {decode_batch(tokenizer, candidates[:1])[0][:80]!r}): write the row as the nearest is, or set "
        "model.chat_template to a template without the tokens around it, such as plain",
    )


def _encode_after(anchor: str, text: str, ids_of: Callable[[str], list[int]]) -> list[int]:
    """Encode a text as what follows another; by itself where the two merge."""
    front, ids = ids_of(anchor), ids_of(anchor + text)
    return ids[len(front) :] if ids[: len(front)] == front else ids_of(text)


def _piecewise(chat: Chat, anchor: str, text: str, ids_of: Callable[[str], list[int]]) -> list[int]:
    """Encode a text in the pieces between its added tokens.

    Some sentence-piece tokenizers put a space behind every added token, so that a text that holds one does not come
    back as it was. Pieces encoded as the continuation of a line's end have no such space.
    """
    ids: list[int] = []
    for number, piece in enumerate(chat.pattern.split(text)):
        if piece in chat.added:
            ids.append(chat.added[piece])
        elif piece:
            ids += _encode_after("\n" if number else anchor, piece, ids_of)
    return ids


def absorbs_space(chat: Chat, prompt_ids: Sequence[int], target: str) -> bool:
    """Tell whether the prompt's last token takes the answer's leading spaces into itself."""
    return bool(target[:1].isspace() and prompt_ids and prompt_ids[-1] in chat.space_absorbing)


def _anchor(chat: Chat, prompt_ids: Sequence[int]) -> str:
    """Return a text to encode an answer behind: an added token if the prompt ends in one, else a line's end."""
    if prompt_ids and prompt_ids[-1] in chat.added.values():
        neutral = (text for text in sorted(chat.special) if chat.added[text] not in chat.space_absorbing)
        return next(neutral, "\n")
    return "\n"


def decodes_to(chat: Chat, prompt_ids: Sequence[int], target_ids: Sequence[int], target: str) -> bool:
    """Tell whether the ids decode to the target, by themselves or behind the prompt.

    Sentence-piece decoders drop a space at the front of what they decode, so that an answer that begins with one is
    only seen behind the prompt's last ids.
    """
    near = list(prompt_ids[-4:])
    alone, before, both = decode_batch(chat.tokenizer, [list(target_ids), near, [*near, *target_ids]])
    return same_text(chat, alone, target) or (both.startswith(before) and same_text(chat, both[len(before) :], target))


def same_text(chat: Chat, decoded: str, text: str) -> bool:
    """Compare, leaving the tokenizer its Unicode normal form."""
    if decoded == text:
        return True
    normalizer = getattr(getattr(chat.tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None or text.isascii():
        return False
    return decoded in {unicodedata.normalize(form, text) for form in ("NFC", "NFKC", "NFD", "NFKD")}
