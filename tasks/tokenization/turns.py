"""A trained message as text: what the model is served, and what it then has to say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tasks.prompts import normalize_messages, text_of
from tasks.tokenization.endings import USER
from tasks.tokenization.errors import MaskError
from tasks.tokenization.literals import Marks, count_literals, mark_literals
from tasks.tokenization.rendering import Chat, Message, Tool, render
from tasks.tokenization.thoughts import PromptThought, find_prompt_thought, split_thought


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
    plain: tuple[Turn, ...] = ()
    """The turns without marks."""


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
        return Rendered(turns, plain=tuple(turns))
    marked, marked_tools, marks = mark_literals(chat, messages, tools)
    turns = [render_turn(chat, marked, index, marked_tools) for index in indices]
    unmarked = tuple(render_turn(chat, messages, index, tools) for index in indices)
    for turn, plain in zip(turns, unmarked, strict=True):
        if (marks.remove(turn.prompt), marks.remove(turn.target)) != (plain.prompt, plain.target):
            raise MaskError(
                "control_literal",
                f"message {turn.index + 1}: the contents spell a control token and {chat.name} rewrites it, so that it "
                "cannot be kept as text: remove it, or set tokenization.allow_special_tokens",
            )
    return Rendered(turns, marks, num_literals, unmarked)


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
    shown = messages[: index + 1]
    text = whole[len(prompt) :] if whole.startswith(prompt) else _align(chat, shown, tools, prompt, whole)
    _check_thought(chat, index, prompt, text)
    target, closed = _cut_ending(chat, text)
    _check_written(chat, index, target, closed)
    return Turn(index, prompt, target, closed)


def _check_written(chat: Chat, index: int, target: str, closed: bool) -> None:
    """Refuse a message of which nothing is left.

    Raises:
        MaskError: it is.
    """
    if not target.strip() and not closed:
        raise MaskError(
            "empty_answer",
            f"message {index + 1}: {chat.name} renders nothing of it: set model.chat_template to a template that "
            "writes it, such as chatml",
        )


def _align(chat: Chat, messages: Sequence[Message], tools: Sequence[Tool] | None, prompt: str, whole: str) -> str:
    """Return what has to follow the served prompt, where the rendered conversation does not begin with it.

    The prompt may end in a thought that no rendered message begins with. And some templates put the system message or
    the tools into the last user message: a word that no message holds then stands in for the message before, and what
    follows it is compared.
    """
    thought = find_prompt_thought(prompt)
    if thought and whole.startswith(thought.header):
        return _follow_thought(chat, messages, thought, whole[len(thought.header) :])
    before = messages[-2]
    number = len(messages) - 1
    if not isinstance(before.get("content"), str) and not chat.forms.content_as_parts:
        raise _mismatch(chat, number, "the message before it has no plain text to find the place by")
    stand_in = USER
    while any(stand_in in str(message) for message in messages):
        stand_in += USER
    probe = [
        *messages[:-2],
        {
            **before,
            **normalize_messages([{"role": "user", "content": stand_in}], chat.forms)[0],
            "role": before["role"],
        },
    ]
    prompt = render(chat, probe, tools, add_generation_prompt=True)
    whole = render(chat, [*probe, messages[-1]], tools, add_generation_prompt=False)
    if prompt.count(stand_in) != 1 or whole.count(stand_in) != 1:
        raise _mismatch(chat, number, "the message before it is not rendered once, so that the place is unknown")
    served, written = prompt.partition(stand_in)[2], whole.partition(stand_in)[2]
    thought = find_prompt_thought(served)
    if not written.startswith(served) and thought and written.startswith(thought.header):
        return _follow_thought(chat, messages, thought, written[len(thought.header) :])
    if not written.startswith(served):
        raise _mismatch(
            chat, number, f"the served prompt ends in {served[-60:]!r}, but the message is rendered as {written[:60]!r}"
        )
    return written[len(served) :]


def _follow_thought(chat: Chat, messages: Sequence[Message], prompt: PromptThought, written: str) -> str:
    """Return what follows a prompt that ends in a thought, of what the template writes for the last message.

    Behind a closed thought the answer follows. Behind an open one the reasoning, its close tag and the answer: as the
    template writes them, or as the message has them where the template leaves the reasoning out.
    """
    said = split_thought(written)
    if not prompt.is_open:
        return said.rest if said else written
    message, number = messages[-1], len(messages) - 1
    given = split_thought(text_of(message.get("content")))
    reasoning = message.get("reasoning_content")
    if said and said.words.strip():
        words, closing, rest = said
    elif given and given.words.strip():
        words, closing, rest = given.words, given.closing, said.rest if said else written
        if rest.startswith(closing.removeprefix(prompt.closing)):  # spaces that the template kept
            closing = prompt.closing
    elif isinstance(reasoning, str) and reasoning.strip():
        words, closing, rest = f"{reasoning.strip()}\n", f"{prompt.closing}\n\n", said.rest if said else written
    else:
        raise _without_reasoning(chat, number)
    # Spaces behind the open tag are the prompt's.
    return (words.lstrip() if prompt.gap else words) + closing + rest


def _check_thought(chat: Chat, number: int, prompt: str, text: str) -> None:
    """Refuse an answer without reasoning behind a prompt that opens a thought.

    Raises:
        MaskError: the thought is never closed.
    """
    thought = find_prompt_thought(prompt[-200:])
    if thought and thought.is_open and thought.closing not in text:
        raise _without_reasoning(chat, number)


def _without_reasoning(chat: Chat, number: int) -> MaskError:
    arguments = _find_arguments(chat)
    way = f"set tokenization.template_arguments: {json.dumps(arguments)}, " if arguments else ""
    return MaskError(
        "missing_reasoning",
        f"message {number + 1}: {chat.name} opens a thought for the model to go on with, and the message has no "
        f"reasoning: {way}give its reasoning_content, or set model.chat_template: chatml",
    )


def _find_arguments(chat: Chat) -> dict[str, bool]:
    """Return the argument by which the template opens no thought in its prompts; none where it has no such."""
    question = [{"role": "user", "content": USER}]
    for name in ("enable_thinking", "thinking"):
        closed = replace(chat, variables={**chat.variables, name: False})
        try:
            thought = find_prompt_thought(render(closed, question, None, add_generation_prompt=True))
        except MaskError:
            continue
        if thought is None or not thought.is_open:
            return {name: False}
    return {}


def _mismatch(chat: Chat, number: int, why: str) -> MaskError:
    return MaskError(
        "generation_prompt_mismatch",
        f"message {number + 1}: {chat.name} does not say what the model has to answer: {why}. Set model.chat_template: "
        "chatml, or to a .jinja file whose generation prompt is the front of its assistant turn",
    )


def _cut_ending(chat: Chat, text: str) -> tuple[str, bool]:
    """Cut what follows the end of turn; tell whether there is one."""
    ending = chat.ending
    text = text.removesuffix(ending.opening)
    if ending.known and ending.tail and text.endswith(ending.tail):
        return text[: len(text) - len(ending.tail)] + ending.kept, ending.closed
    stripped = text.rstrip()
    if stripped.endswith(tuple(chat.special)):
        return stripped, True
    return (text, False) if ending.known else (stripped, False)
