"""Tokens of an answer become its text as they come: whole characters, up to a stop text, calls of tools apart."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from tasks.prompts import special_tokens
from tasks.serving.call_syntax import Call, CallSyntax

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LOOK_BACK = 8
"""Tokens that are decoded again before the newest: what a token spells may depend on those before it."""


class TextStream:
    """Text of tokens as it grows; the pieces together are the decoded whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._ids: list[int] = []
        self._start = 0  # tokens before are decoded no more
        self._shown = 0  # tokens whose text was given

    def _decode(self, ids: Sequence[int]) -> str:
        text: Any = self._tokenizer.decode(
            list(ids), skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return str(text)

    def add(self, token: int) -> str:
        """Return the text that a token adds: empty while a character is unfinished."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        return "" if text.endswith(_UNFINISHED) else self._give(text)

    def finish(self) -> str:
        """Return the text of what never became whole characters."""
        return self._give(self._decode(self._ids[self._start :]))

    def _give(self, text: str) -> str:
        known = self._decode(self._ids[self._start : self._shown])
        self._shown = len(self._ids)
        self._start = max(self._start, self._shown - _LOOK_BACK)
        return text[len(known) :]


def hold_back(text: str, marks: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


@dataclass
class AnswerText:
    """An answer's content and calls, token by token.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer, and are no part of it.
        syntax: in which calls are looked for; None where no tools were given.
        schemas: parameters by function name.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[str] = ()
    syntax: CallSyntax | None = None
    schemas: Mapping[str, Any] = field(default_factory=dict)
    content: str = ""
    """What was given so far."""
    calls: list[Call] = field(default_factory=list)
    """Known when the answer is finished."""
    is_stopped: bool = False
    """A stop text was met."""

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer, skip_special=self.syntax is None)
        names = sorted(special_tokens(self.tokenizer), key=len, reverse=True) if self.syntax else []
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._pending = ""
        self._calling = ""
        """From the first call's opening on."""

    def add(self, token: int) -> str:
        """Return the content that is certain with this token."""
        return self._take(self._stream.add(token))

    def finish(self) -> str:
        """Return the rest of the content, and read the calls: what cannot be read as calls is content."""
        piece = "" if self.is_stopped else self._take(self._stream.finish(), is_last=True)
        if self._calling and self.syntax is not None:
            try:
                self.calls = self.syntax.parse(self._calling, self.schemas)
            except ValueError:
                piece += self._give(self._calling)
        return piece

    def _take(self, text: str, *, is_last: bool = False) -> str:
        self._pending += text
        places = [place for stop in self.stops if (place := self._pending.find(stop)) >= 0]
        if places:
            self._pending, self.is_stopped, is_last = self._pending[: min(places)], True, True
        if self._calling:
            self._calling += self._pending
            self._pending = ""
            return ""
        ready = len(self._pending) if is_last else len(self._pending) - hold_back(self._pending, self.stops)
        if self.syntax is not None:
            opening = self._find_opening()
            if opening is not None and opening <= ready:
                given, self._calling, self._pending = self._pending[:opening], self._pending[opening:], ""
                return self._give(given)
            if not is_last:
                ready = min(ready, self._count_certain())
        given, self._pending = self._pending[:ready], self._pending[ready:]
        return self._give(given)

    def _find_opening(self) -> int | None:
        """Return where the calls begin in what is pending."""
        assert self.syntax is not None
        if self.syntax.opening:
            place = self._pending.find(self.syntax.opening)
            return place if place >= 0 else None
        begins = not self.content.strip() and self._special.sub("", self._pending).lstrip()[:1] in ("{", "[")
        return 0 if begins and self._pending.strip() else None

    def _count_certain(self) -> int:
        """Return how many pending characters can be no opening."""
        assert self.syntax is not None
        if not self.syntax.opening:
            return len(self._pending) if self._pending.strip() or self.content else 0
        return len(self._pending) - hold_back(self._pending, (self.syntax.opening,))

    def _give(self, text: str) -> str:
        text = self._special.sub("", text)
        self.content += text
        return text


def write_calls(calls: Sequence[Call], make_id: Any) -> list[dict[str, Any]]:
    """Return calls as OpenAI's API has them: arguments are JSON text."""
    return [
        {
            "id": make_id(),
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for name, arguments in calls
    ]
