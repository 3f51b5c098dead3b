"""A trained message as text: what the model is served, and what it then has to say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.tokenization.endings import USER
from tasks.tokenization.errors import MaskError
from tasks.tokenization.literals import Marks, count_literals, mark_literals, strings_of
from tasks.tokenization.rendering import Chat, Message, Tool, render


@dataclass(frozen=True)
class Turn:
    """One trained assistant message."""

    index: int
    """Of the message in the conversation."""
    prompt: str
    """The served prompt: the messages before it with the generation prompt."""
    target: str
    """The message as the template renders it behind that prompt, up to and with the end of turn."""
    closed: bool
    """Whether the target ends in an end-of-turn token of the template; if not, eos is appended."""


@dataclass(frozen=True)
class Rendered:
    """The trained messages of a conversation as text."""

    turns: list[Turn]
    marks: Marks | None = None
    """Set when contents spell control tokens: the turns' texts then hold marks around them."""
    num_literals: int = 0
    dropped: tuple[str, ...] = ()
    """What the template leaves out of the last prompt: roles, or `reasoning`."""


def render_turns(
    chat: Chat,
    messages: Sequence[Message],
    indices: Sequence[int],
    tools: Sequence[Tool] | None,
    *,
    allow_special_tokens: bool = False,
) -> Rendered:
    """Render the trained messages of a conversation, with marks around literal control tokens.

    Raises:
        MaskError: the template refuses the messages, or does not say what follows its generation prompt.
    """
    num_literals = 0 if allow_special_tokens else count_literals(chat, messages, tools)
    if not num_literals:
        turns = [render_turn(chat, messages, index, tools) for index in indices]
        return Rendered(turns, dropped=find_dropped(messages, turns))
    marked, marked_tools, marks = mark_literals(chat, messages, tools)
    turns = [render_turn(chat, marked, index, marked_tools) for index in indices]
    for turn in turns:
        plain = render_turn(chat, messages, turn.index, tools)
        if (marks.remove(turn.prompt), marks.remove(turn.target)) != (plain.prompt, plain.target):
            raise MaskError(
                "control_literal",
                f"message {turn.index}: the contents spell a control token and {chat.name} rewrites it, so that it "
                "cannot be kept as text: remove it, or set tokenization.allow_special_tokens",
            )
    return Rendered(turns, marks, num_literals, find_dropped(messages, [plain]))


def render_turn(chat: Chat, messages: Sequence[Message], index: int, tools: Sequence[Tool] | None) -> Turn:
    """Render one trained message in the context that inference will see.

    Raises:
        MaskError: as `render_turns`.
    """
    if index == 0:
        raise MaskError(
            "no_prompt",
            "message 0 is the assistant's, so nothing could be served to get it: put a message before it or mark it "
            "train: false",
        )
    prompt = render(chat, messages[:index], tools, add_generation_prompt=True)
    whole = render(chat, messages[: index + 1], tools, add_generation_prompt=False)
    text = whole[len(prompt) :] if whole.startswith(prompt) else _align(chat, messages[: index + 1], tools)
    target, closed = _cut_ending(chat, text)
    _check_written(chat, messages, index, prompt, target, closed)
    return Turn(index, prompt, target, closed)


def _check_written(chat: Chat, messages: Sequence[Message], index: int, prompt: str, target: str, closed: bool) -> None:
    """Refuse a message of which the template loses what matters.

    Raises:
        MaskError: nothing is rendered, tool calls are left out, or a null content is written as a word.
    """
    if not target.strip() and not closed:
        raise MaskError("empty_answer", f"message {index}: {chat.name} renders nothing of it")
    for call in messages[index].get("tool_calls") or []:
        function = (call.get("function") or call) if isinstance(call, dict) else {}
        if str(function.get("name", "")) not in target:
            raise MaskError(
                "dropped_by_template",
                f"message {index}: {chat.name} leaves out its tool call: set model.chat_template to a template with "
                "tool calls, or take such rows out",
            )
    has_null = any("content" in message and message["content"] is None for message in messages[: index + 1])
    if has_null and "None" in prompt + target and "None" not in str([_words(message) for message in messages]):
        raise MaskError(
            "null_content", f"message {index}: {chat.name} writes a null content as None: give an empty text"
        )


def _words(message: Message) -> list[str]:
    """Return a message's texts."""
    return list(strings_of(message))


def find_dropped(messages: Sequence[Message], turns: Sequence[Turn]) -> tuple[str, ...]:
    """Return what a template leaves out: roles whose contents are not in the last prompt, and `reasoning`.

    A content counts as written when it is there without its outer spaces, as it is or as JSON text.
    """
    if not turns:
        return ()
    last = turns[-1]
    dropped = []
    for message in messages[: last.index]:
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str) or content.strip() in last.prompt:
            continue
        if json.dumps(content, ensure_ascii=False)[1:-1].strip() not in last.prompt:
            dropped.append(str(message["role"]))
    for turn in turns:
        reasoning = messages[turn.index].get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip() not in turn.target:
            dropped.append("reasoning")
    return tuple(dropped)


def _align(chat: Chat, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
    """Return what the template writes for the last message, where the history before it is rendered differently.

    Some templates put the system message or the tools into the last user message, so that the served prompt is not
    the front of the rendered conversation. A word that no message holds stands in for the message before, and what
    follows it is compared: it has to begin with what follows it in the served prompt.
    """
    before = messages[-2]
    number = len(messages) - 1
    if not isinstance(before.get("content"), str):
        raise _mismatch(chat, number, "the message before it has no plain text to find the place by")
    stand_in = USER
    while any(stand_in in str(message) for message in messages):
        stand_in += USER
    probe = [*messages[:-2], {**before, "content": stand_in}]
    prompt = render(chat, probe, tools, add_generation_prompt=True)
    whole = render(chat, [*probe, messages[-1]], tools, add_generation_prompt=False)
    if prompt.count(stand_in) != 1 or whole.count(stand_in) != 1:
        raise _mismatch(chat, number, "the message before it is not rendered once, so that the place is unknown")
    served, written = prompt.partition(stand_in)[2], whole.partition(stand_in)[2]
    if not written.startswith(served):
        raise _mismatch(
            chat, number, f"the served prompt ends in {served[-60:]!r}, but the message is rendered as {written[:60]!r}"
        )
    return written[len(served) :]


def _mismatch(chat: Chat, number: int, why: str) -> MaskError:
    return MaskError(
        "generation_prompt_mismatch",
        f"message {number}: {chat.name} does not say what the model has to answer: {why}. Give reasoning_content if "
        "the template expects reasoning, or set model.chat_template to a template whose generation prompt is the "
        "front of its assistant turn",
    )


def _cut_ending(chat: Chat, text: str) -> tuple[str, bool]:
    """Cut what follows the end of turn; tell whether there is one."""
    ending = chat.ending
    if ending.known and ending.tail and text.endswith(ending.tail):
        return text[: len(text) - len(ending.tail)] + ending.kept, ending.closed
    stripped = text.rstrip()
    if stripped.endswith(tuple(chat.special)):
        return stripped, True
    return (text, False) if ending.known else (stripped, False)
