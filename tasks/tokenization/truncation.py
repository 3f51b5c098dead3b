"""Conversations that are too long: cut inside the prompt's contents, never in headers or ends of turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from schemas.config import TokenizationConfig
from tasks.prompts import normalize_messages, text_of
from tasks.tokenization.continuation import encode_turn
from tasks.tokenization.encoding import decode
from tasks.tokenization.errors import MaskError
from tasks.tokenization.rendering import Chat, Message, Tool
from tasks.tokenization.turns import Turn, render_turns

# A content is never cut below this many characters: a prompt without a question teaches nothing.
_LEAST_CHARACTERS = 32
# With `cut_answer`, a prompt is cut to this part of the budget before its answer is.
_PROMPT_SHARE = 0.25
_SYSTEM_ROLES = frozenset({"system", "developer"})


@dataclass(frozen=True)
class CutTurn:
    """A turn that fits: what is served with shorter contents, and what is said."""

    turn: Turn
    prompt_ids: list[int]
    target_ids: list[int]
    """With the end of turn, also where eos was appended."""


def cut_turn(
    chat: Chat, messages: Sequence[Message], index: int, tools: Sequence[Tool] | None, config: TokenizationConfig
) -> CutTurn:
    """Make one turn fit `config.max_length` tokens.

    The contents before the answer keep their first characters: as many as fit, the same limit for all of them, so
    that the longest are cut first. System messages are cut only when that is not enough.

    Raises:
        MaskError: the answer does not fit (`answer_too_long`), or headers and tools alone do not.
    """

    def at(limit: int, system: bool) -> CutTurn:
        return _encode_capped(chat, messages, index, tools, config, limit, system)

    longest = max((len(text_of(message.get("content"))) for message in messages[:index]), default=0)
    shortest = at(_LEAST_CHARACTERS, True)
    room = config.max_length - len(shortest.target_ids)
    if len(shortest.prompt_ids) > room:
        if len(shortest.prompt_ids) > config.max_length // 2 and len(shortest.target_ids) <= config.max_length // 2:
            raise MaskError(
                "prompt_too_long",
                f"message {index + 1}: headers, tools and the first characters of the contents take "
                f"{len(shortest.prompt_ids)} tokens, the answer {len(shortest.target_ids)}, and "
                f"tokenization.max_length is {config.max_length}: shorten them, or raise it where the model has "
                "positions for more",
            )
        if config.truncation == "reject":
            raise MaskError(
                "answer_too_long",
                f"message {index + 1}: the answer has {len(shortest.target_ids)} tokens, and with its prompt's headers "
                f"it does not fit tokenization.max_length = {config.max_length}: set tokenization.truncation to "
                "cut_answer, or raise it where the model has positions for more",
            )
        room = max(int(config.max_length * _PROMPT_SHARE), len(shortest.prompt_ids))
    system = len(at(_LEAST_CHARACTERS, False).prompt_ids) > room
    best = _widest(lambda limit: at(limit, system), shortest, longest, room)
    return _cut_answer(chat, best, config.max_length - len(best.prompt_ids))


def _widest(at: Callable[[int], CutTurn], shortest: CutTurn, longest: int, room: int) -> CutTurn:
    """Find the largest limit of characters whose prompt has at most `room` tokens, to a hundredth of it."""
    best, low, high = shortest, _LEAST_CHARACTERS, longest + 1
    while high - low > 1 and room - len(best.prompt_ids) > max(4, room // 100):
        middle = (low + high) // 2
        candidate = at(middle)
        if len(candidate.prompt_ids) <= room:
            best, low = candidate, middle
        else:
            high = middle
    return best


def _encode_capped(
    chat: Chat,
    messages: Sequence[Message],
    index: int,
    tools: Sequence[Tool] | None,
    config: TokenizationConfig,
    limit: int,
    system: bool,
) -> CutTurn:
    """Encode a turn whose prompt's contents keep at most `limit` characters."""
    capped: list[Message] = []
    for message in messages[:index]:
        text = text_of(message.get("content"))
        is_free = system or message["role"] not in _SYSTEM_ROLES
        shorter = normalize_messages([{**message, "content": text[:limit]}], chat.forms)[0]
        capped.append(shorter if is_free and len(text) > limit else message)
    allow = config.allow_special_tokens
    rendered = render_turns(chat, [*capped, messages[index]], [index], tools, allow_special_tokens=allow)
    turn = rendered.turns[0]
    prompt_ids, target_ids = encode_turn(chat, turn, rendered.marks)
    if not turn.closed:
        target_ids = [*target_ids, int(chat.tokenizer.eos_token_id)]
    if rendered.marks:
        turn = replace(turn, prompt=rendered.marks.remove(turn.prompt), target=rendered.marks.remove(turn.target))
    return CutTurn(turn, prompt_ids, target_ids)


def _cut_answer(chat: Chat, cut: CutTurn, room: int) -> CutTurn:
    """Cut an answer to `room` tokens, its end of turn kept and no character halved."""
    if len(cut.target_ids) <= room:
        return cut
    added = set(chat.added.values()) | {chat.tokenizer.eos_token_id}
    num_ending = 0
    while num_ending < len(cut.target_ids) and cut.target_ids[-1 - num_ending] in added:
        num_ending += 1
    ending = cut.target_ids[len(cut.target_ids) - num_ending :]
    num_kept = room - num_ending
    while num_kept > 0 and decode(chat.tokenizer, cut.target_ids[:num_kept]).endswith("\ufffd"):
        num_kept -= 1
    if num_kept <= 0:
        raise MaskError("answer_too_long", f"message {cut.turn.index + 1}: no token of the answer fits")
    kept = cut.target_ids[:num_kept] + ending
    return CutTurn(replace(cut.turn, target=decode(chat.tokenizer, kept)), cut.prompt_ids, kept)
