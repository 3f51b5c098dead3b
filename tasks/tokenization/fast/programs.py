"""A skeleton made ready for many conversations: its constants as ids, its contents as texts between added tokens.

An added token splits a text before anything else is done to it, so that the ids on its two sides do not depend on one
another. What lies between two of them is encoded as one text, constants and contents together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from tasks.tokenization.fast.skeletons import Skeleton, fill
from tasks.tokenization.fast.tracing import Part, Slot
from tasks.tokenization.fast.words import NotByWords
from tasks.tokenization.labels import ID_TYPE
from tasks.tokenization.rendering import Chat

Contents = Sequence[str]
Encode = Callable[[str], bytes]


class Segment(NamedTuple):
    """What lies between two added tokens."""

    text: Callable[[Contents], str]
    """All of it; of a constant, where it is encoded already, the empty text."""
    ids: bytes
    """Of a constant, or of an added token."""
    front: Callable[[Contents], str] | None = None
    """Set where it holds the border of a prompt and its answer: the part before it."""
    front_ids: bytes = b""
    """Of a constant front."""
    ends: bool = False
    """Whether a trained target ends before it."""


@dataclass(frozen=True, eq=False)
class Program:
    """An example's segments, and what else is known of it."""

    segments: tuple[Segment, ...]
    turns: tuple[int, ...]
    """Indices of the messages trained in it."""
    target: Callable[[Contents], str]
    """Text of the last of them, with its end of turn."""


def compile_skeleton(skeleton: Skeleton, encode: Encode) -> tuple[Program, ...] | None:
    """Prepare a skeleton's examples; None where ids cannot be put together from constants and contents."""
    programs = []
    try:
        for chain, indices in zip(skeleton.chains, skeleton.chained, strict=True):
            _check_joints(skeleton.chat, chain)
            segments = _merge_constants(list(_cut_segments(skeleton.chat, encode, chain)))
            programs.append(Program(segments, indices, _writer(chain[-1])))
    except NotByWords:
        return None
    return tuple(programs)


def _cut_segments(chat: Chat, encode: Encode, chain: Sequence[Sequence[Part]]) -> Iterator[Segment]:
    """Cut an example at its added tokens.

    Raises:
        NotByWords: an added token takes spaces from beside it, or what is said does not end in one.
    """
    parts: list[Part] = []
    front: list[Part] | None = None
    ends = False
    for position, piece in enumerate(chain):
        if position % 2:
            front = list(parts)
        elif position:
            ends = True
        if ends and (parts or front is not None):
            raise NotByWords
        for part in _cut_constants(chat, piece):
            if not isinstance(part, int):
                parts.append(part)
                continue
            if parts or front is not None:
                yield _make_segment(encode, parts, front, ends)
                parts, front, ends = [], None, False
            yield Segment(_write_nothing, part.to_bytes(ID_TYPE.itemsize, "little"), ends=ends)
            ends = False
    if parts or front is not None:
        raise NotByWords


def _write_nothing(contents: Contents) -> str:
    return ""


def _cut_constants(chat: Chat, parts: Sequence[Part]) -> list[Part | int]:
    """Cut constants at added tokens, which become their ids."""
    tokens = chat.tokenizer.added_tokens_decoder
    cut: list[Part | int] = []
    for part in parts:
        if isinstance(part, Slot):
            cut.append(part)
            continue
        for piece in chat.pattern.split(part):
            if piece in chat.added:
                token = tokens[chat.added[piece]]
                if token.lstrip or token.rstrip or token.single_word:
                    raise NotByWords
                cut.append(chat.added[piece])
            elif piece:
                cut.append(piece)
    return cut


def _make_segment(encode: Encode, parts: Sequence[Part], front: Sequence[Part] | None, ends: bool) -> Segment:
    """Make a segment, encoded at once where it holds no content."""
    is_constant = not any(isinstance(part, Slot) for part in parts)
    ids = encode(fill(parts, ())) if is_constant else b""
    if front is None:
        return Segment(_writer(parts), ids, ends=ends)
    is_front_constant = not any(isinstance(part, Slot) for part in front)
    front_ids = encode(fill(front, ())) if is_front_constant else b""
    return Segment(_writer(parts), ids, _writer(front), front_ids, ends)


def _writer(parts: Sequence[Part]) -> Callable[[Contents], str]:
    """Return a function that puts contents in their places; the usual case of one content goes without a loop."""
    match parts:
        case [Slot(index, ())]:
            return lambda contents: contents[index]
        case [Slot(index, ()), str(after)]:
            return lambda contents: contents[index] + after
        case [str(before), Slot(index, ())]:
            return lambda contents: before + contents[index]
        case [str(before), Slot(index, ()), str(after)]:
            return lambda contents: before + contents[index] + after
    kept = tuple(parts)
    return lambda contents: fill(kept, contents)


def _merge_constants(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Join constants that follow one another."""
    merged: list[Segment] = []
    for segment in segments:
        before = merged[-1] if merged else None
        if (
            before
            and before.ids
            and before.front is None
            and segment.ids
            and segment.front is None
            and not segment.ends
        ):
            merged[-1] = before._replace(ids=before.ids + segment.ids)
        else:
            merged.append(segment)
    return tuple(merged)


def _check_joints(chat: Chat, chain: Sequence[Sequence[Part]]) -> None:
    """Refuse constants between which and a content an added token could arise.

    Raises:
        NotByWords: a constant ends with the front of one, or begins with the end of one, or two contents meet.
    """
    cuts = [(token[:length], token[length:]) for token in chat.added for length in range(1, len(token))]
    fronts, ends = (tuple(set(halves)) for halves in zip(*cuts, strict=True)) if cuts else ((), ())
    for one, other in pairwise([part for piece in chain for part in piece]):
        meet = isinstance(one, Slot) and isinstance(other, Slot)
        if meet or (isinstance(one, str) and isinstance(other, Slot) and one.endswith(fronts)):
            raise NotByWords
        if isinstance(one, Slot) and isinstance(other, str) and other.startswith(ends):
            raise NotByWords
