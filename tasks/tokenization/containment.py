"""Checks that a template loses nothing of a conversation.

The words of the answer, its tool calls and its reasoning stand in the target; every earlier content and the name of
every tool stand in the prompt. Each is given a span of its own, so that one word does not stand for two messages.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Any

from tasks.tokenization.errors import MaskError
from tasks.tokenization.rendering import Chat, Message, Tool, render
from tasks.tokenization.thoughts import split_thought
from tasks.tokenization.turns import Turn

_SENTINEL = "Vestigium4Qew"
_SYSTEM_ROLES = ("system", "developer")


class _Text:
    """A text, and the spans of it that something was found in."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.taken: list[tuple[int, int]] = []

    def take(self, words: str) -> bool:
        """Find words where nothing else was found, and keep their span; tell whether they were there."""
        start = self.text.find(words) if words else -1
        while start >= 0:
            stop = start + len(words)
            clash = next((end for begin, end in self.taken if begin < stop and start < end), None)
            if clash is None:
                self.taken.append((start, stop))
                return True
            start = self.text.find(words, clash)
        return not words

    def take_any(self, forms: Sequence[str]) -> bool:
        """Find words in one of their forms."""
        return any(self.take(form) for form in forms)


def find_losses(
    chat: Chat, messages: Sequence[Message], turns: Sequence[Turn], tools: Sequence[Tool] | None
) -> tuple[str, ...]:
    """Return what the template loses of a conversation, as `tokenization.allow_dropped` names it; once for each loss.

    Args:
        chat: Tokenizer and template.
        messages: As the template sees them.
        turns: The trained messages as text, in order and without marks.
        tools: Their definitions.
    """
    losses: set[tuple[str, int]] = set()
    for turn in turns:
        losses.update(_find_in_prompt(chat, messages, turn, tools))
        losses.update((loss, turn.index) for loss in _find_in_target(chat, messages, turn, tools))
    return tuple(loss for loss, _ in sorted(losses, key=lambda item: (item[1], item[0])))


def _find_in_prompt(
    chat: Chat, messages: Sequence[Message], turn: Turn, tools: Sequence[Tool] | None
) -> Iterator[tuple[str, int]]:
    """Yield what is not in a served prompt, and the message that it is of."""
    prompt = _Text(turn.prompt)
    wanted = [
        (loss, number, words)
        for number, message in enumerate(messages[: turn.index])
        for loss, words in _list_history(message)
    ]
    # Longer ones first: a short one must not take the place that only they have.
    for loss, number, words in sorted(filter(itemgetter(2), wanted), key=lambda item: -len(item[2])):
        is_there = prompt.take_any(_forms(words))
        if is_there and words in chat.ending.frame and loss != "history_reasoning":
            is_there = _is_written(chat, messages[: turn.index], number, tools, prompt=True)
        if not is_there:
            yield loss, number
    yield from (("history_tool_calls", number) for number in _find_lost_calls(chat, messages, turn, tools))
    for number, tool in enumerate(tools or []):
        if not prompt.take(str((tool.get("function") or tool).get("name", ""))):
            yield "tools", -1 - number


def _find_lost_calls(
    chat: Chat, messages: Sequence[Message], turn: Turn, tools: Sequence[Tool] | None
) -> Iterator[int]:
    """Yield the earlier messages whose calls, or arguments of them, are not in a served prompt.

    The definitions of the tools hold the same names, so a call is found by a name that only it has.
    """
    calling = [number for number, message in enumerate(messages[: turn.index]) if message.get("tool_calls")]
    if not calling:
        return
    marked = [*messages[: turn.index]]
    marks: dict[int, list[str]] = {}
    for number in calling:
        calls = messages[number]["tool_calls"]
        marks[number] = [f"{_SENTINEL}{number}x{place}z" for place in range(len(calls))]
        named = [
            call | {"function": call["function"] | {"name": mark}}
            for call, mark in zip(calls, marks[number], strict=True)
        ]
        marked[number] = messages[number] | {"tool_calls": named}
    try:
        prompt = render(chat, marked, tools, add_generation_prompt=True)
    except MaskError:
        return
    for number in calling:
        values = [value for call in messages[number]["tool_calls"] for value in _list_values(call)]
        if not all(mark in prompt for mark in marks[number]) or not all(_is_said(turn.prompt, v) for v in values):
            yield number


def _list_history(message: Message) -> Iterator[tuple[str, str]]:
    """Yield the texts of an earlier message, and the losses that they would be."""
    role = str(message["role"])
    loss = "system" if role in _SYSTEM_ROLES else "history" if role == "assistant" else role
    for text in _texts_of(message.get("content")):
        thought = split_thought(text) if role == "assistant" else None
        if thought:
            yield "history_reasoning", thought.words.strip()
            text = thought.rest
        yield loss, text.strip()
    if role == "assistant" and isinstance(message.get("reasoning_content"), str):
        yield "history_reasoning", message["reasoning_content"].strip()


def _texts_of(content: Any) -> Iterator[str]:
    """Yield the texts of a content, or of its parts."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def _find_in_target(chat: Chat, messages: Sequence[Message], turn: Turn, tools: Sequence[Tool] | None) -> Iterator[str]:
    """Yield what of a trained message is not said."""
    message = messages[turn.index]
    said = turn.target.removesuffix(chat.ending.kept) if turn.closed else turn.target
    body = _Text(said)
    for text in _texts_of(message.get("content")):
        if body.take(text.strip()):
            is_short = text.strip() and text.strip() in chat.ending.frame and text.strip() != said.strip()
            if is_short and not _is_written(chat, messages[: turn.index + 1], turn.index, tools, prompt=False):
                yield "answer"
            continue
        thought = split_thought(text)
        if thought and not body.take(thought.words.strip()):
            yield "reasoning"
        if not body.take((thought.rest if thought else text).strip()):
            yield "answer"
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and not body.take(reasoning.strip()):
        yield "reasoning"
    for call in message.get("tool_calls") or []:
        if not _is_called(said, call):
            yield "tool_calls"


def _is_called(said: str, call: Any) -> bool:
    """Tell whether a tool call's name, and the names and values of its arguments, are said."""
    function = (call.get("function") or call) if isinstance(call, dict) else {}
    return str(function.get("name", "")) in said and all(_is_said(said, value) for value in _list_values(call))


def _list_values(call: Any) -> Iterator[Any]:
    """Return the names and values of a call's arguments."""
    function = (call.get("function") or call) if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return _leaves(arguments)


def _is_said(said: str, value: Any) -> bool:
    if isinstance(value, str):
        return any(form in said for form in _forms(value.strip()))
    forms = {json.dumps(value), str(value)}
    return any(form in said for form in forms)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and the values that are not themselves made of such."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _forms(words: str) -> list[str]:
    """Return how a template may write a text: as it is, as JSON's text, or as JSON where it is some."""
    once = json.dumps(words, ensure_ascii=False)[1:-1]
    ascii_once = json.dumps(words)[1:-1]
    forms = [words, once, ascii_once, json.dumps(once, ensure_ascii=False)[1:-1], json.dumps(ascii_once)[1:-1]]
    if words[:1] in ("{", "["):
        try:
            value = json.loads(words)
        except ValueError:
            return forms
        forms += [json.dumps(value, ensure_ascii=False), json.dumps(value)]
        forms += [json.dumps(value, ensure_ascii=False, indent=width) for width in (2, 4)]
    return forms


def _is_written(
    chat: Chat, messages: Sequence[Message], number: int, tools: Sequence[Tool] | None, *, prompt: bool
) -> bool:
    """Tell by a word of its own whether the template writes the content of a message that its frame may hold too."""
    message = messages[number]
    if not isinstance(message.get("content"), str):
        return True
    marked = [*messages[:number], {**message, "content": f"{message['content']} {_SENTINEL}"}, *messages[number + 1 :]]
    try:
        return _SENTINEL in render(chat, marked, tools, add_generation_prompt=prompt)
    except MaskError:
        return True


def check_said(chat: Chat, messages: Sequence[Message], turns: Sequence[Turn]) -> None:
    """Refuse an answer of which nothing is left, whatever losses are allowed.

    Raises:
        MaskError: `empty_answer`, or `dropped_tool_calls` where it is nothing but calls.
    """
    for turn in turns:
        said = turn.target.removesuffix(chat.ending.kept)
        for token in chat.special if turn.closed and not chat.ending.known else ():
            said = said.removesuffix(token)
        message = messages[turn.index]
        given = "".join([*_texts_of(message.get("content")), str(message.get("reasoning_content") or "")]).strip()
        if not said.strip() and (message.get("tool_calls") or given):
            raise MaskError(
                "empty_answer" if given else "dropped_tool_calls",
                f"message {turn.index + 1}: {chat.name} renders nothing of it: set model.chat_template to a template "
                "that writes it, such as chatml",
            )


DROPPED = {
    "answer": "the text of its answer",
    "tool_calls": "its tool call or arguments of it",
    "reasoning": "its reasoning",
    "system": "the system message",
    "user": "what the user says",
    "tool": "a tool's result",
    "tools": "the definitions of the tools",
    "history": "the text of an earlier answer",
    "history_reasoning": "the reasoning of an earlier answer",
    "history_tool_calls": "an earlier tool call or arguments of it",
}


def check_losses(chat: Chat, losses: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse a conversation of which the template loses what the config does not allow.

    Raises:
        MaskError: `dropped_system`, `dropped_tools` and so on.
    """
    refused = list(dict.fromkeys(loss for loss in losses if loss not in allowed))
    if refused:
        raise MaskError(
            f"dropped_{refused[0]}",
            f"{chat.name} leaves out {' and '.join(DROPPED[loss] for loss in refused)}: set model.chat_template to a "
            "template that writes it, such as chatml, or allow the loss with tokenization.allow_dropped: "
            f"{json.dumps([*allowed, *refused])}",
        )
