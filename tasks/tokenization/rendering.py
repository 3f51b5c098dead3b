"""Chat templates rendered as transformers renders them, as text.

The served prompt of an assistant message is defined by `apply_chat_template(messages before it,
add_generation_prompt=True)`. Everything in this stage compares against that text and its ids, so that no marker of a
template is ever searched for: contents may hold any marker.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from tasks.prompts import Forms, RequestError, find_forms, normalize_messages, special_tokens
from tasks.tokenization.encoding import encode
from tasks.tokenization.endings import Ending, any_of, find_anchor, find_ending
from tasks.tokenization.errors import MaskError
from tasks.tokenization.limits import TemplateLimitError, call_limited, compile_limited

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Chat:
    """A tokenizer and one of its chat templates, with what probing the two has shown."""

    tokenizer: PreTrainedTokenizerBase
    source: str
    """The template's Jinja text."""
    compiled: Any
    variables: dict[str, Any]
    """bos_token, eos_token and so on, as apply_chat_template passes them."""
    forms: Forms
    """In which it takes contents and arguments."""
    added: dict[str, int]
    """Added tokens that are more than whitespace, to their ids."""
    pattern: re.Pattern[str]
    """Any one of them, longer ones first, as a group."""
    special: frozenset[str]
    """Those of them that are control tokens."""
    space_absorbing: frozenset[int]
    """Ids of added tokens that take the whitespace behind them into themselves."""
    ending: Ending = field(default_factory=Ending)
    anchor: str = ""
    """The end of a usual prompt from its last added token on; empty when it holds none."""
    anchor_ids: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Return a name for messages to people."""
        return f"the chat template of {self.tokenizer.name_or_path or type(self.tokenizer).__name__}"


_RECENT: list[tuple[Any, Chat]] = []
_MOST_RECENT = 4


def open_chat(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] | None = None) -> Chat:
    """Return the template that the tokenizer uses with these tools, compiled and probed; the last few are kept.

    Raises:
        MaskError: the tokenizer has no chat template, or it is not valid Jinja.
    """
    try:
        source = tokenizer.get_chat_template(None, list(tools) if tools is not None else None)
    except ValueError as error:
        raise MaskError("no_template", f"the tokenizer has no chat template to use here: {error}") from None
    variables = dict(tokenizer.special_tokens_map)
    key = (source, variables, len(tokenizer))
    for known, chat in _RECENT:
        if chat.tokenizer is tokenizer and known == key:
            return chat
    chat = _probe(tokenizer, source, variables)
    _RECENT.append((key, chat))
    del _RECENT[:-_MOST_RECENT]
    return chat


def _probe(tokenizer: PreTrainedTokenizerBase, source: str, variables: dict[str, Any]) -> Chat:
    """Compile a template and learn how its prompts and turns end."""
    try:
        compiled = compile_limited(chat_template_utils._compile_jinja_template("").environment, source)
    except Exception as error:
        raise MaskError("template_error", f"the chat template is not valid Jinja: {error}") from None
    tokens = tokenizer.added_tokens_decoder
    added = {token.content: index for index, token in tokens.items() if token.content.strip()}
    special = special_tokens(tokenizer)
    space_absorbing = frozenset(index for index, token in tokens.items() if token.rstrip)
    pattern = any_of(added)
    chat = Chat(tokenizer, source, compiled, variables, Forms(), added, pattern, special, space_absorbing)
    bare = chat
    forms = find_forms(lambda messages, tools: render(bare, messages, tools, add_generation_prompt=True))
    chat = replace(chat, forms=forms)

    def probe(messages: list[Message], prompt: bool) -> str:
        return render(chat, normalize_messages(messages, forms), None, add_generation_prompt=prompt)

    ending = find_ending(probe, pattern, tokenizer.eos_token)
    anchor = find_anchor(ending.prompt_tail, pattern)
    anchor_ids = tuple(encode(tokenizer, anchor))
    usable = bool(anchor_ids) and tokens.get(anchor_ids[0]) is not None
    return replace(chat, ending=ending, anchor=anchor if usable else "", anchor_ids=anchor_ids if usable else ())


def render(
    chat: Chat, messages: Sequence[Message], tools: Sequence[Tool] | None, *, add_generation_prompt: bool
) -> str:
    """Render messages as `tokenizer.apply_chat_template(..., tokenize=False)` does.

    Args:
        chat: Tokenizer and template.
        messages: Plain data, as `plain_messages` returns it.
        tools: Tool definitions, or None.
        add_generation_prompt: Whether the text ends where the model has to go on.

    Raises:
        MaskError: the template refuses the messages.
        TemplateLimitError: it takes too long or writes too much.
    """
    try:
        text = call_limited(
            chat.name,
            chat.compiled.render,
            messages=list(messages),
            tools=list(tools) if tools is not None else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **chat.variables,
        )
    except TemplateLimitError:
        raise
    except Exception as error:
        number = len(messages)
        role = messages[-1].get("role") if messages else None
        raise MaskError(
            "template_error",
            f"{chat.name} refuses the conversation up to message {number} ({role}): {type(error).__name__}: {error}: "
            "set model.chat_template to a template that takes it, such as chatml",
        ) from None
    return str(text)


def plain_messages(chat: Chat, messages: Sequence[Message]) -> list[Message]:
    """Copy messages as the template will see them.

    Raises:
        MaskError: a message is not a mapping with a role, or its content is no text.
    """
    try:
        return normalize_messages(messages, chat.forms)
    except RequestError as error:
        raise MaskError("bad_message", str(error)) from None
