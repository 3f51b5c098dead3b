"""The turns of many conversations as ids, in one batch, each character encoded about once.

An added token splits a text before anything else is done to it, so the ids on its two sides do not depend on one
another. Pieces that begin with one can therefore be encoded apart and put together: a first prompt, an answer behind
the last added token of its prompt, and what lies between an end of turn and the next answer. Where a piece does not
show that this held, its turn is encoded by itself (`continuation.encode_turn`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tasks.tokenization.continuation import absorbs_space, decodes_to, encode_turn, same_text
from tasks.tokenization.encoding import decode_batch, encode_batch
from tasks.tokenization.errors import MaskError
from tasks.tokenization.rendering import Chat
from tasks.tokenization.turns import Rendered, Turn


@dataclass(frozen=True)
class Encoded:
    """One turn as ids."""

    front_ids: list[int]
    """The served prompt, or what it has beyond the turn before when `chained`."""
    target_ids: list[int]
    """The answer, without an appended eos."""
    chained: bool
    """Whether the served prompt begins with the ids of the turn before, its prompt and its answer."""


@dataclass(frozen=True)
class _Pieces:
    """The two texts that a turn is encoded from."""

    front: str
    answer: str
    barrier: str
    """The end of turn that `front` begins with when it continues the turn before."""
    anchored: bool
    """Whether `answer` begins with the chat's anchor rather than the whole prompt."""


def encode_turns(
    conversations: Sequence[tuple[Chat, Rendered]], tokenizer: PreTrainedTokenizerBase
) -> list[list[Encoded] | MaskError]:
    """Encode the turns of many conversations.

    Returns:
        For each conversation its turns in order, or the error that refuses it.
    """
    plans = [_cut(chat, rendered) for chat, rendered in conversations]
    texts = [text for pieces in plans for piece in pieces for text in (piece.front, piece.answer)]
    ids = iter(encode_batch(tokenizer, texts))
    guesses = [
        [_join(chat, piece, next(ids), next(ids)) for piece in pieces]
        for (chat, _), pieces in zip(conversations, plans, strict=True)
    ]
    decoded = iter(decode_batch(tokenizer, [guess.target_ids for row in guesses for guess in row if guess]))
    outcomes: list[list[Encoded] | MaskError] = []
    for (chat, rendered), row in zip(conversations, guesses, strict=True):
        texts_of_row = [next(decoded) if guess else "" for guess in row]
        try:
            outcomes.append(list(_settle(chat, rendered, row, texts_of_row)))
        except MaskError as error:
            outcomes.append(error)
    return outcomes


def _cut(chat: Chat, rendered: Rendered) -> list[_Pieces]:
    """Cut each turn of a conversation into the texts to encode; none where literals are marked."""
    if rendered.marks:
        return []
    pieces = []
    before: Turn | None = None
    for turn in rendered.turns:
        barrier = _barrier(chat, before, turn) if before else ""
        front = turn.prompt
        if before and barrier:
            front = barrier + turn.prompt[len(before.prompt) + len(before.target) :]
        anchored = bool(chat.anchor) and turn.prompt.endswith(chat.anchor)
        pieces.append(_Pieces(front, (chat.anchor if anchored else turn.prompt) + turn.target, barrier, anchored))
        before = turn
    return pieces


def _barrier(chat: Chat, before: Turn, turn: Turn) -> str:
    """Return the added token that ends the turn before, if this turn's prompt is its continuation."""
    if not before.closed or not turn.prompt.startswith(before.prompt + before.target):
        return ""
    endings = (token for token in chat.added if before.target.endswith(token))
    return max(endings, key=len, default="")


def _join(chat: Chat, piece: _Pieces, front_ids: list[int], answer_ids: list[int]) -> Encoded | None:
    """Check that two pieces meet where they should, and cut them there; None when they do not."""
    if piece.barrier:
        if front_ids[:1] != [chat.added[piece.barrier]]:
            return None
        front_ids = front_ids[1:]
    if piece.anchored:
        anchor_ids = list(chat.anchor_ids)
        if front_ids[-len(anchor_ids) :] != anchor_ids:
            return None
        head = anchor_ids
    elif piece.barrier:
        return None
    else:
        head = front_ids
    if answer_ids[: len(head)] != head:
        return None
    return Encoded(front_ids, answer_ids[len(head) :], bool(piece.barrier))


def _settle(
    chat: Chat, rendered: Rendered, guesses: Sequence[Encoded | None], texts: Sequence[str]
) -> Iterator[Encoded]:
    """Keep the guesses that hold, and encode the other turns by themselves.

    Raises:
        MaskError: a turn has no ids that decode to it.
    """
    so_far: list[int] = []  # ids of the example that the next turn may continue
    natural = False  # whether they are what the tokenizer gives for that text at once
    for number, turn in enumerate(rendered.turns):
        guess = guesses[number] if guesses else None
        if guess and guess.chained and not natural:
            guess = None
        if guess and _holds(chat, turn, guess, texts[number]):
            encoded = guess if guess.chained else _chain(rendered, number, so_far, guess.front_ids, guess.target_ids)
            natural = True
        else:
            encoded = _chain(rendered, number, so_far, *encode_turn(chat, turn, rendered.marks))
            natural = False
        so_far = [*(so_far if encoded.chained else []), *encoded.front_ids, *encoded.target_ids]
        yield encoded


def _holds(chat: Chat, turn: Turn, guess: Encoded, decoded: str) -> bool:
    """Check the law on a guess: its ids decode to the target."""
    if absorbs_space(chat, guess.front_ids, turn.target):
        return False
    return same_text(chat, decoded, turn.target) or decodes_to(chat, guess.front_ids, guess.target_ids, turn.target)


def _chain(rendered: Rendered, number: int, so_far: list[int], prompt_ids: list[int], target_ids: list[int]) -> Encoded:
    """Express a whole prompt by what it has beyond the turn before, if it begins with that turn's ids."""
    if number and rendered.turns[number - 1].closed and prompt_ids[: len(so_far)] == so_far:
        return Encoded(prompt_ids[len(so_far) :], target_ids, True)
    return Encoded(prompt_ids, target_ids, False)
