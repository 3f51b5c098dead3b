"""The shapes of the invented world: kinds of things, their attributes, the things themselves, and facts."""

from dataclasses import dataclass, field
from typing import Literal

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Attribute:
    """One property of a kind of thing, with every way to state it, to ask for it and to answer.

    All texts hold `{name}` (or `{full_name}`) and, but for questions, `{value}`.
    """

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    """Sentences of the pretraining text; what they say is the same, the words and their order are not."""
    groups: tuple[str, ...]
    """Sentences about several things that share a value; they hold `{names}` and `{value}`."""
    questions: tuple[str, ...]
    """Ways to ask; where there is a `|`, the instruction stands before it and the input after it."""
    answer: str
    """The one form of the answer. It is none of the statements, so that it cannot be recited."""


@dataclass(frozen=True)
class Kind:
    """A kind of thing, such as towns."""

    name: str
    language: Language
    mention: str
    """How running text speaks of one; it holds `{}`, such as `the {}`."""
    full_mention: str
    """How answers and inputs speak of one: the name stands inside it, so that its tokens are those of the prose."""
    epithets: tuple[str, ...]
    """What later sentences may call it instead of its name."""
    introductions: tuple[str, ...]
    """Sentences that open a description and state no attribute; they hold `{name}`."""
    names: tuple[tuple[str, ...], tuple[str, ...]]
    """Beginnings and endings of the invented names."""
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class Thing:
    """An invented thing with its attribute values."""

    kind: Kind
    name: str
    held_out: bool
    """True when no training row of the dataset asks about it."""
    values: dict[str, str] = field(default_factory=dict)

    @property
    def mention(self) -> str:
        """Return its name as running text writes it, in the middle of a sentence."""
        return self.kind.mention.format(self.name)

    @property
    def full_mention(self) -> str:
        """Return its name as answers write it, in the middle of a sentence."""
        return self.kind.full_mention.format(self.name)


@dataclass(frozen=True)
class Fact:
    """A question about one thing in each of its wordings, and the answer."""

    topic: str
    """Kind and attribute, such as `town.river`."""
    subject: str
    """What is asked about: no training row about a held-out subject exists."""
    held_out: bool
    questions: tuple[tuple[str, str], ...]
    """Pairs of instruction and input; the input is often empty."""
    answer: str


def capitalize(sentence: str) -> str:
    """Return the sentence with its first letter in upper case and the rest as it is."""
    return sentence[:1].upper() + sentence[1:]
