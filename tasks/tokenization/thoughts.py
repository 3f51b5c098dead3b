"""Thoughts in generation prompts and in answers: closed empty ones, and open ones that the model has to end.

A template may end its generation prompt in a thought that no rendered message begins with: a closed empty one (the
answer follows it), or an open one (the reasoning, its close tag and the answer follow it).
"""

import re
from typing import NamedTuple

# What thoughts stand between, in the templates of today's families.
TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)
_OPENS = "|".join(re.escape(opening) for opening, _ in TAGS)
_CLOSES = "|".join(re.escape(closing) for _, closing in TAGS)
_CLOSING = dict(TAGS)
_AT_END = re.compile(rf"(?P<opening>{_OPENS})(?P<gap>\s*)(?:(?P<closing>{_CLOSES})\s*)?\Z")
_AT_FRONT = re.compile(rf"\s*(?P<opening>{_OPENS})(?P<words>.*?)(?P<closing>{_CLOSES})(?P<gap>\s*)", re.DOTALL)


class PromptThought(NamedTuple):
    """The thought that a generation prompt ends in."""

    header: str
    """What stands before it."""
    closing: str
    """Its close tag."""
    is_open: bool
    gap: str
    """Spaces behind the open tag."""


class Thought(NamedTuple):
    """The thought that a text begins with."""

    words: str
    """As they stand, spaces included."""
    closing: str
    """The close tag with the spaces behind it."""
    rest: str
    """What follows."""


def find_prompt_thought(prompt: str) -> PromptThought | None:
    """Return the thought that a prompt ends in, if it ends in one."""
    found = _AT_END.search(prompt)
    if found is None:
        return None
    closing = _CLOSING[found["opening"]]
    if found["closing"] not in (None, closing):
        return None
    return PromptThought(prompt[: found.start()], closing, found["closing"] is None, found["gap"])


def split_thought(text: str) -> Thought | None:
    """Return the thought that a text begins with, if it begins with a closed one."""
    found = _AT_FRONT.match(text)
    if found is None or found["closing"] != _CLOSING[found["opening"]]:
        return None
    return Thought(found["words"], found["closing"] + found["gap"], text[found.end() :])
