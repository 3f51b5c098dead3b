"""How a model writes calls of tools, learned from its chat template: a call that is known is rendered and looked at.

Three forms are known: JSON that holds name and arguments; a name, then JSON of the arguments; a name, then each
argument between marks of its own. What was learned is only used when it reads back the calls that the template writes.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

Call = tuple[str, dict[str, Any]]
"""Name and arguments."""
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]], bool], str]
"""Renders messages and tools, with or without the generation prompt; raises where the template refuses them."""

_QUESTION = "Quaestio7Rvx"
_NAME, _SECOND = "probe_vocis", "probe_numeri"
_FIRST_KEY, _SECOND_KEY, _FIRST_VALUE, _SECOND_VALUE = "clavis_a", "clavis_b", "Verbum6Tyx", "Verbum7Tyx"
_THOUGHT_ENDS = ("</think>", "[/THINK]")
_TYPES = {"clavis_a": "string", "clavis_b": "string", "number": "integer", "nested": "object", "flag": "boolean"}
_SHOWN: Call = (_NAME, {_FIRST_KEY: _FIRST_VALUE, _SECOND_KEY: _SECOND_VALUE})
_TRIALS: tuple[tuple[Call, ...], ...] = (
    (_SHOWN,),
    ((_NAME, {"clavis_a": 'a "b" <c>', "number": 3, "nested": {"x": [1, "2"]}, "flag": True}),),
    (_SHOWN, (_SECOND, {"clavis_b": "b"})),
)


class CallSyntax(Protocol):
    """A way of writing calls."""

    @property
    def opening(self) -> str:
        """With which the first call begins; empty where an answer that is a call begins at once."""
        ...

    @property
    def kind(self) -> str:
        """json, named or marked."""
        ...

    def parse(self, text: str, schemas: Mapping[str, Any]) -> list[Call]:
        """Return the calls of a text that begins with the opening; raise ValueError where it is not understood."""
        ...


@dataclass(frozen=True)
class JsonCalls:
    """Objects, or lists of them, that hold a name and arguments."""

    opening: str
    name_key: str
    arguments_key: str
    kind: str = "json"

    def parse(self, text: str, schemas: Mapping[str, Any]) -> list[Call]:
        """Read every JSON value of the text."""
        calls: list[Call] = []
        for value in read_values(text.removeprefix(self.opening)):
            for item in value if isinstance(value, list) else [value]:
                call = item.get("function", item) if isinstance(item, dict) else {}
                if not isinstance(call, dict) or self.name_key not in call:
                    raise ValueError(f"a call without {self.name_key}")
                calls.append((str(call[self.name_key]), read_arguments(call.get(self.arguments_key))))
        return calls


@dataclass(frozen=True)
class NamedCalls:
    """A name, then JSON of the arguments."""

    opening: str
    each: str
    """Directly before every name; the end of the opening."""
    middle: str
    """Between the name and its arguments."""
    kind: str = "named"

    def parse(self, text: str, schemas: Mapping[str, Any]) -> list[Call]:
        """Read name after name."""
        calls: list[Call] = []
        for part in text.split(self.each)[1:]:
            name, middle, rest = part.partition(self.middle)
            if not middle or not name.strip():
                raise ValueError("a call without arguments")
            calls.append((name.strip(), read_arguments(next(iter(read_values(rest)), None))))
        return calls


@dataclass(frozen=True)
class MarkedCalls:
    """A name, then each argument between marks."""

    opening: str
    name_end: str
    key_start: str
    key_end: str
    value_end: str
    kind: str = "marked"

    def parse(self, text: str, schemas: Mapping[str, Any]) -> list[Call]:
        """Read name after name; a value that is no string by the function's schema is JSON."""
        calls: list[Call] = []
        start, key_end, value_end = (re.escape(mark) for mark in (self.key_start, self.key_end, self.value_end))
        argument = re.compile(rf"{start}\s*(.*?)\s*{key_end}\n?(.*?)\n?{value_end}", re.DOTALL)
        # The name ends at its mark, or where that is white space at the first argument.
        name_end = re.escape(self.name_end) if self.name_end else rf"\s*(?={start}|$|<)"
        for part in text.split(self.opening)[1:]:
            head = re.match(rf"\s*(.*?){name_end}", part, re.DOTALL)
            if head is None or not head.group(1).strip():
                raise ValueError("a call without a name")
            name = head.group(1).strip()
            properties = (schemas.get(name) or {}).get("properties") or {}
            found = argument.findall(part)
            calls.append((name, {key: _read_value(value, properties.get(key)) for key, value in found}))
        return calls


def read_values(text: str) -> list[Any]:
    """Return the JSON objects and lists that stand in a text one after the other.

    Raises:
        ValueError: one is not finished or is no JSON, or there is none.
    """
    decoder, place = json.JSONDecoder(), 0
    values: list[Any] = []
    while (found := re.compile(r"[\[{]").search(text, place)) is not None:
        try:
            value, place = decoder.raw_decode(text, found.start())
        except ValueError:
            if values and text[found.start()] == "[":
                break  # a mark such as [END] behind the calls
            raise
        values.append(value)
    if not values:
        raise ValueError("no JSON")
    return values


def read_arguments(value: Any) -> dict[str, Any]:
    """Return arguments as an object.

    Raises:
        ValueError: they are none.
    """
    if isinstance(value, str):
        value = json.loads(value) if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"arguments that are no object: {value!r:.80}")  # noqa: TRY004 (it is text that is read)
    return value


def _read_value(text: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return text
    if kind == "boolean" and text in ("True", "False"):  # Python's own, which templates write
        return text == "True"
    try:
        return json.loads(text)
    except ValueError:
        return text


def learn_syntax(render: Render) -> CallSyntax | None:
    """Return how a template writes calls; None where it writes none, or none that could be read back."""
    try:
        body = _render_calls(render, [_SHOWN])
    except Exception:  # whatever a template refuses with
        return None
    try:
        both = _render_calls(render, _TRIALS[-1])
    except Exception:  # it writes one call only
        both = ""
    for syntax in (_learn_json(body), _learn_named(body, both), _learn_marked(body)):
        if syntax is not None and _reads_back(syntax, render):
            return syntax
    return None


def _render_calls(render: Render, calls: Sequence[Call]) -> str:
    """Return what the template writes behind the generation prompt for calls, without thoughts."""
    question = {"role": "user", "content": _QUESTION}
    written = [
        {"type": "function", "id": f"call{n:05d}", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls, 1)
    ]
    tools = [_define(_NAME), _define(_SECOND)]
    whole, before = (
        text[text.rfind(_QUESTION) + len(_QUESTION) :]
        for text in (
            render([question, {"role": "assistant", "content": "", "tool_calls": written}], tools, False),
            render([question], tools, True),
        )
    )
    # Two marks may begin alike.
    body = whole[len(_common_start(whole, before).rstrip("<[")) :]
    for end in _THOUGHT_ENDS:
        body = body.rpartition(end)[2]
    return body


def _common_start(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]


def _define(name: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": key} for key, kind in _TYPES.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def _learn_json(body: str) -> CallSyntax | None:
    start = re.search(r"(\[\s*)?\{", body)
    if start is None:
        return None
    try:
        value = json.JSONDecoder().raw_decode(body, start.start())[0]
    except ValueError:
        return None
    call = value[0] if isinstance(value, list) else value
    call = call.get("function", call) if isinstance(call, dict) else {}
    names = [key for key, item in call.items() if item == _NAME]
    arguments = [key for key, item in call.items() if _FIRST_KEY in (item if isinstance(item, dict | str) else "")]
    if not names or not arguments:
        return None
    return JsonCalls(body[: start.start()].strip(), names[0], arguments[0])


def _learn_named(body: str, both: str) -> CallSyntax | None:
    place = body.find(_NAME)
    behind = body[place + len(_NAME) :]
    start = behind.find("{")
    if place < 0 or start < 0 or _FIRST_KEY not in behind[start:] or not (opening := body[:place].strip()):
        return None
    before_second = both[: both.find(_SECOND)].rstrip() if _SECOND in both else opening
    each = _common_end(opening, before_second).strip()
    return NamedCalls(opening, each, behind[:start].strip()) if each else None


def _learn_marked(body: str) -> CallSyntax | None:
    pieces = [_NAME, _FIRST_KEY, _FIRST_VALUE, _SECOND_KEY, _SECOND_VALUE]
    found = re.match("(.*?)" + "(.*?)".join(map(re.escape, pieces)) + "(.*)", body, re.DOTALL)
    if found is None:
        return None
    opening, to_key, key_end, between, again, behind = found.groups()
    key_start = _common_end(to_key, between)
    # Both may end a tag before it: what begins an argument begins with a mark.
    key_start = key_start[max(key_start.find("<"), 0) :]
    value_end = between[: len(between) - len(key_start)]
    if not key_start.strip() or key_end != again or not behind.startswith(value_end) or not opening.strip():
        return None
    name_end = to_key[: len(to_key) - len(key_start)]
    return MarkedCalls(opening.strip(), name_end.strip(), key_start.strip(), key_end.strip(), value_end.strip())


def _reads_back(syntax: CallSyntax, render: Render) -> bool:
    """Tell whether the calls of trials are read as they were; the last trial has two, which some templates refuse."""
    schemas = {name: _define(name)["function"]["parameters"] for name in (_NAME, _SECOND)}
    for calls in _TRIALS:
        try:
            body = _render_calls(render, calls)
        except Exception:  # whatever a template refuses with
            if len(calls) > 1:
                continue
            return False
        text = body[body.find(syntax.opening) :].lstrip()
        try:
            read = syntax.parse(text, schemas)
        except ValueError:
            return False
        if read != list(calls[: len(read)]) or not read or (len(read) < len(calls) and _SECOND in body):
            return False
    return True
