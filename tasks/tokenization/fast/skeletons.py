"""What a template writes around the contents, found out once for all conversations of one shape.

A shape is the messages' roles and which of them are trained. Tracing (`tracing.py`) shows that the template only joins
its own texts with the contents, under conditions that are checked for every conversation; the served prompts and what
the model has to say are then put together without rendering. Shapes for which that cannot be shown, and contents that
meet no known conditions, are rendered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from tasks.tokenization.containment import find_losses
from tasks.tokenization.errors import MaskError
from tasks.tokenization.fast.tracing import Condition, Constraints, Part, Slot, Untraceable, merge, trace
from tasks.tokenization.rendering import Chat, Message
from tasks.tokenization.thoughts import find_prompt_thought
from tasks.tokenization.turns import Turn, render_turn

# Tracing costs about as much as rendering ten conversations: a shape is given up after so many fruitless attempts.
_MOST_ATTEMPTS = 64
MOST_SHAPES = 512

Shape = tuple[tuple[str, ...], tuple[int, ...]]


class TracedTurn(NamedTuple):
    """A trained message as constants and contents; its target always ends in the template's end of turn."""

    number: int
    prompt: tuple[Part, ...]
    target: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The trained messages of a shape, for contents that meet the conditions."""

    chat: Chat
    roles: tuple[str, ...]
    conditions: tuple[Condition, ...]
    turns: tuple[TracedTurn, ...]
    chains: tuple[tuple[tuple[Part, ...], ...], ...]
    """The examples: each the served prompt, what is said, what is served beyond that, what is said then, …"""
    chained: tuple[tuple[int, ...], ...]
    """Indices of the messages trained in each of them."""

    def fits(self, contents: Sequence[str]) -> bool:
        """Tell whether contents meet the conditions."""
        return all(condition.holds(contents) for condition in self.conditions)

    def fill(self, contents: Sequence[str]) -> list[Turn]:
        """Return the turns as text."""
        return [
            Turn(turn.number, fill(turn.prompt, contents), fill(turn.target, contents), True) for turn in self.turns
        ]


@dataclass
class _Known:
    skeletons: list[Skeleton] = field(default_factory=list)
    num_attempts: int = 0


_KNOWN: WeakKeyDictionary[Chat, dict[Shape, _Known]] = WeakKeyDictionary()


def fill(parts: Sequence[Part], contents: Sequence[str]) -> str:
    """Put contents in their places."""
    return "".join([part if isinstance(part, str) else part.fill(contents) for part in parts])


def find_skeleton(chat: Chat, roles: tuple[str, ...], indices: tuple[int, ...], contents: list[str]) -> Skeleton | None:
    """Return the skeleton that these contents fit, traced if there is none yet; None where there can be none."""
    shapes = _KNOWN.setdefault(chat, {})
    shape = (roles, indices)
    if shape not in shapes:
        if len(shapes) >= MOST_SHAPES:
            return None
        shapes[shape] = _Known()
    known = shapes[shape]
    for skeleton in known.skeletons:
        if skeleton.fits(contents):
            return skeleton
    if known.num_attempts >= _MOST_ATTEMPTS:
        return None
    known.num_attempts += 1
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        skeleton = derive(chat, messages, indices)
    except Untraceable:
        return None
    known.skeletons.append(skeleton)
    return skeleton


def derive(chat: Chat, messages: Sequence[Message], indices: Sequence[int]) -> Skeleton:
    """Trace the trained messages of a conversation, and compare with what rendering gives.

    Raises:
        Untraceable: its texts are not known from its contents alone.
    """
    contents = [message["content"] for message in messages]
    constraints = Constraints(contents)
    turns = tuple(_trace_turn(chat, messages, index, constraints) for index in indices)
    for turn in turns:
        _check_all_written(turn)
    chains, chained = _chain(turns, constraints)
    skeleton = Skeleton(
        chat, tuple(message["role"] for message in messages), tuple(constraints.conditions), turns, chains, chained
    )
    try:
        rendered = [render_turn(chat, messages, index, None) for index in indices]
    except MaskError as error:
        raise Untraceable from error
    if skeleton.fill(contents) != rendered or find_losses(chat, messages, rendered, None):
        raise Untraceable
    return skeleton


def _trace_turn(chat: Chat, messages: Sequence[Message], index: int, constraints: Constraints) -> TracedTurn:
    """Trace one trained message, as `turns.render_turn` renders it."""
    if index == 0 or not (chat.ending.known and chat.ending.closed and chat.ending.tail):
        raise Untraceable
    prompt = trace(chat, messages[:index], constraints, add_generation_prompt=True)
    whole = trace(chat, messages[: index + 1], constraints, add_generation_prompt=False)
    text = suffix_after(whole, prompt, constraints)
    written = chat.ending.tail + chat.ending.opening
    if not text or not isinstance(text[-1], str) or not text[-1].endswith(written):
        raise Untraceable
    end = text[-1].removesuffix(written) + chat.ending.kept
    target = merge((*text[:-1], end))
    return TracedTurn(index, prompt, target)


def _check_all_written(turn: TracedTurn) -> None:
    """Require every content before an answer in its prompt, and its own in its target, cut by outer spaces only.

    A thought that the prompt opens has to be closed by what the template writes: contents do not count.
    """
    for parts, wanted in ((turn.prompt, range(turn.number)), (turn.target, [turn.number])):
        slots = [part for part in parts if isinstance(part, Slot)]
        if not {slot.number for slot in slots if not any((cut or "").strip() for _, cut in slot.cuts)}.issuperset(
            wanted
        ):
            raise Untraceable
    end = turn.prompt[-1] if isinstance(turn.prompt[-1], str) else ""
    thought = find_prompt_thought(end)
    if thought and thought.is_open and not any(isinstance(p, str) and thought.closing in p for p in turn.target):
        raise Untraceable


def suffix_after(whole: Sequence[Part], front: Sequence[Part], constraints: Constraints) -> tuple[Part, ...] | None:
    """Return what follows a front, or None where the text does not begin with it.

    Raises:
        Untraceable: that depends on the contents in a way that is not asked for.
    """
    rest, wanted = list(reversed(whole)), list(reversed(front))
    while wanted:
        if not rest:
            raise Untraceable
        one, other = rest.pop(), wanted.pop()
        if isinstance(one, Slot) and isinstance(other, Slot):
            if one != other and (one.number != other.number or not constraints.ask(one, "__eq__", other)):
                raise Untraceable
        elif isinstance(one, str) and isinstance(other, str):
            length = min(len(one), len(other))
            if one[:length] != other[:length]:
                return None
            rest += [one[length:]] if one[length:] else []
            wanted += [other[length:]] if other[length:] else []
        else:
            slot, constant = (one, other) if isinstance(one, Slot) else (other, one)
            assert isinstance(slot, Slot)
            assert isinstance(constant, str)
            if constraints.ask(slot, "__bool__") and not constraints.ask(slot, "startswith", constant[0]):
                return None
            raise Untraceable
    return tuple(reversed(rest))


def _chain(
    turns: Sequence[TracedTurn], constraints: Constraints
) -> tuple[tuple[tuple[tuple[Part, ...], ...], ...], tuple[tuple[int, ...], ...]]:
    """Put turns whose prompt begins with all of the turn before into one example."""
    chains: list[list[tuple[Part, ...]]] = []
    chained: list[list[int]] = []
    for number, turn in enumerate(turns):
        before = turns[number - 1] if number else None
        front = suffix_after(turn.prompt, merge((*before.prompt, *before.target)), constraints) if before else None
        if front is None:
            chains.append([turn.prompt, turn.target])
            chained.append([turn.number])
        else:
            chains[-1] += [front, turn.target]
            chained[-1].append(turn.number)
    return tuple(map(tuple, chains)), tuple(map(tuple, chained))
