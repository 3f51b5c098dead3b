"""Runs a chat template on contents that record what the template does to them.

Each content of a message is a `TracedStr`. A template may join it with other texts. A question about it (is it empty,
does it hold this word) is answered for the content at hand and recorded as a condition. What it strips (outer spaces)
is recorded with the place where the content is written. Anything else stops the tracing. The text that comes out is a
list of constants and contents, and holds for every conversation that meets the conditions: all other decisions of the
template depend on something else than the contents.

A traced text is no `str`: a function that needs a `str` fails instead of reading it unrecorded.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from jinja2 import Environment, Template

from tasks.tokenization.joins import compile_with_joins
from tasks.tokenization.limits import TemplateLimitError, call_limited
from tasks.tokenization.rendering import Chat, Message


class Untraceable(Exception):  # noqa: N818 - not an error: the template is rendered for every conversation
    """A template does something with a content that cannot be traced."""


class Slot(NamedTuple):
    """A content's place in a text."""

    number: int
    """Of the message."""
    cuts: tuple[tuple[str, str | None], ...] = ()
    """Calls of strip, lstrip or rstrip, with their characters."""

    def fill(self, contents: Sequence[str]) -> str:
        """Return what is written in this place."""
        text = contents[self.number]
        for name, characters in self.cuts:
            text = getattr(text, name)(characters)
        return text


Part = str | Slot


class Condition(NamedTuple):
    """What a template asked of a content."""

    slot: Slot
    question: str
    """The name of a method of str; `__bool__` for whether there is anything in it."""
    argument: Any
    """Of the method; a slot stands for what is written there."""
    answer: bool

    def holds(self, contents: Sequence[str]) -> bool:
        """Tell whether other contents give the same answer."""
        return _ask(contents, self.slot, self.question, self.argument) == self.answer


def _ask(contents: Sequence[str], slot: Slot, question: str, argument: Any) -> bool:
    text = slot.fill(contents)
    if isinstance(argument, Slot):
        argument = argument.fill(contents)
    return bool(text) if question == "__bool__" else getattr(text, question)(argument) is True


@dataclass
class Constraints:
    """The contents at hand, and the conditions that the template's questions put on them."""

    contents: Sequence[str]
    conditions: list[Condition] = field(default_factory=list)

    def ask(self, slot: Slot, question: str, argument: Any = None) -> bool:
        """Answer, and record the answer as a condition."""
        answer = _ask(self.contents, slot, question, argument)
        condition = Condition(slot, question, argument, answer)
        if condition not in self.conditions:
            self.conditions.append(condition)
        return answer


def parts_of(text: Any) -> tuple[Part, ...]:
    """Return a text's constants and slots."""
    if isinstance(text, TracedStr):
        return text.parts
    if type(text) is not str:
        raise Untraceable
    return (text,)


def merge(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Join constants that follow one another."""
    merged: list[Part] = []
    for part in parts:
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(part for part in merged if part != "")


def trace(
    chat: Chat, messages: Sequence[Message], constraints: Constraints, *, add_generation_prompt: bool
) -> tuple[Part, ...]:
    """Render messages of a role and a content each, the contents traced.

    Raises:
        Untraceable: the template refuses them, or does more with them than ask, cut and join.
    """
    traced = [
        {key: TracedStr([Slot(number)], constraints) if key == "content" else value for key, value in message.items()}
        for number, message in enumerate(messages)
    ]
    try:
        text: Any = call_limited(
            chat.name,
            _compile_traced(chat).render,
            messages=traced,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **chat.variables,
        )
    except TemplateLimitError:
        raise
    except Exception as error:
        raise Untraceable from error
    return merge(parts_of(text))


_TRACED: WeakKeyDictionary[Chat, Template] = WeakKeyDictionary()


def _compile_traced(chat: Chat) -> Template:
    """Compile a template so that joining keeps texts traced, and tests of a text's type are answered."""
    if chat in _TRACED:
        return _TRACED[chat]
    environment: Environment = chat.compiled.environment.overlay()
    trim, tests = environment.filters["trim"], environment.tests
    environment.filters = {
        **environment.filters,
        "trim": lambda text, *chars: text.strip(*chars) if isinstance(text, TracedStr) else trim(text, *chars),
        "string": _text,
    }
    environment.tests = tests | {
        name: lambda value, test=tests[name]: isinstance(value, TracedStr) or test(value)
        for name in ("string", "iterable", "sequence")
    }
    template = compile_with_joins(environment, chat.source, concat=_join, str_join=_join, markup_join=_join, str=_text)
    _TRACED[chat] = template
    return template


def _join(pieces: Iterable[Any]) -> Any:
    """Join as Jinja does, keeping texts traced."""
    texts = [_text(piece) for piece in pieces]
    traced = next((text for text in texts if isinstance(text, TracedStr)), None)
    if traced is None:
        return "".join(texts)
    return TracedStr(itertools.chain.from_iterable(map(parts_of, texts)), traced.constraints)


def _text(value: Any) -> Any:
    """Return a value as text, a traced one as it is."""
    return value if isinstance(value, TracedStr) else str(value)


class TracedStr:
    """A text with contents in it."""

    def __init__(self, parts: Iterable[Part], constraints: Constraints) -> None:
        self.parts = merge(parts)
        self.constraints = constraints

    def __add__(self, other: Any) -> "TracedStr":
        return TracedStr((*self.parts, *parts_of(other)), self.constraints)

    def __radd__(self, other: Any) -> "TracedStr":
        return TracedStr((*parts_of(other), *self.parts), self.constraints)

    def _slot(self) -> Slot:
        if len(self.parts) != 1 or not isinstance(self.parts[0], Slot):
            raise Untraceable
        return self.parts[0]

    def _ask(self, question: str, argument: Any) -> bool:
        arguments = argument if isinstance(argument, tuple) else (argument,)
        if any(type(item) is not str for item in arguments):
            raise Untraceable
        return self.constraints.ask(self._slot(), question, argument)

    def __bool__(self) -> bool:
        if any(isinstance(part, str) for part in self.parts):
            return True
        return self.constraints.ask(self._slot(), "__bool__")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str | TracedStr) and self._ask("__eq__", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, item: object) -> bool:
        return self._ask("__contains__", item)

    def startswith(self, prefix: Any) -> bool:
        """Ask."""
        return self._ask("startswith", prefix)

    def endswith(self, suffix: Any) -> bool:
        """Ask."""
        return self._ask("endswith", suffix)

    def split(self, separator: Any) -> "list[TracedStr]":
        """Return the text alone where it does not hold the separator."""
        if type(separator) is not str or self._ask("__contains__", separator):
            raise Untraceable
        return [self]

    def _cut(self, name: str, characters: Any) -> "TracedStr":
        if characters is not None and type(characters) is not str:
            raise Untraceable
        slot = self._slot()
        return TracedStr([Slot(slot.number, (*slot.cuts, (name, characters)))], self.constraints)

    def strip(self, characters: Any = None) -> "TracedStr":
        """Cut."""
        return self._cut("strip", characters)

    def lstrip(self, characters: Any = None) -> "TracedStr":
        """Cut."""
        return self._cut("lstrip", characters)

    def rstrip(self, characters: Any = None) -> "TracedStr":
        """Cut."""
        return self._cut("rstrip", characters)

    def __getattr__(self, name: str) -> Any:
        raise Untraceable


def _refuse(self: Any, *arguments: Any, **keys: Any) -> Any:
    raise Untraceable


# What Python would answer for any object, or Jinja take as undefined.
_UNANSWERED = (
    *("__str__", "__repr__", "__format__", "__hash__", "__int__", "__float__", "__index__", "__complex__"),
    *("__len__", "__iter__", "__reversed__", "__getitem__", "__lt__", "__le__", "__gt__", "__ge__"),
    *("__mod__", "__rmod__", "__mul__", "__rmul__"),
)
for _name in _UNANSWERED:
    setattr(TracedStr, _name, _refuse)
