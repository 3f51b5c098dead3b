"""Which tokens are trained: a conversation becomes examples with the spans of its trained turns.

An example is a prompt's ids as served, the ids of the answer behind it, and so on for the turns that continue it. A
span is an answer with its end of turn. A turn whose served prompt does not continue the example before it begins an
example of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.prompts import normalize_tools
from tasks.tokenization.batching import Encoded, encode_turns
from tasks.tokenization.containment import check_losses, check_said, find_losses
from tasks.tokenization.errors import MaskError
from tasks.tokenization.labels import Example, write_ids
from tasks.tokenization.literals import find_literal_endings
from tasks.tokenization.rendering import Chat, Message, Tool, open_chat, plain_messages
from tasks.tokenization.truncation import cut_turn
from tasks.tokenization.turns import Rendered, Turn, render_turns

__all__ = ["Conversation", "Example", "MaskError", "Masked", "build_examples", "build_many"]

MOST_PROMPT_MESSAGES = 125_000
"""Of all trained turns of a conversation together, each of which is rendered with all that comes before it: what 707
messages of two who take turns have."""


@dataclass(frozen=True)
class Conversation:
    """Messages and the tools they may call."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Masked:
    """What became of one conversation."""

    examples: list[Example]
    num_literals: int = 0
    """Control tokens spelled in contents and kept as text."""
    dropped: tuple[str, ...] = ()
    """What the template leaves out, as `tokenization.allow_dropped` names it."""
    literal_endings: tuple[str, ...] = ()
    """Control tokens spelled at the end of trained answers."""


@dataclass(frozen=True)
class Plan:
    """A conversation rendered, before it is encoded."""

    chat: Chat
    messages: list[Message]
    tools: Sequence[Tool] | None
    rendered: Rendered
    losses: tuple[str, ...]
    literal_endings: tuple[str, ...] = ()


def build_examples(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    config: TokenizationConfig = TokenizationConfig(),  # noqa: B008 - frozen
) -> list[Example]:
    """Return the examples of one conversation; several where the template renders history differently.

    Args:
        messages: Mappings with a role, a content, and what else the template reads; `train: False` keeps an
            assistant message as context only, and `weight` says what its tokens weigh.
        tokenizer: With a chat template; it is not changed.
        tools: Tool definitions, as `apply_chat_template` takes them.
        config: What to train on and how long an example may be.

    Raises:
        MaskError: the conversation cannot be mapped; the reason is in the error.
    """
    outcome = build_many([Conversation(messages, tools)], tokenizer, config)[0]
    if isinstance(outcome, MaskError):
        raise outcome
    return outcome.examples


def build_many(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, config: TokenizationConfig
) -> list[Masked | MaskError]:
    """Build the examples of many conversations at once, each as `build_examples` does.

    Returns:
        In order, the examples of each conversation or the error that refuses it.
    """
    return finish(plan_many(conversations, tokenizer, config), tokenizer, config)


def plan_many(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, config: TokenizationConfig
) -> list[Plan | MaskError]:
    """Render conversations, without encoding them."""
    plans: list[Plan | MaskError] = []
    for conversation in conversations:
        try:
            plans.append(plan(conversation, tokenizer, config))
        except MaskError as error:
            plans.append(error)
    return plans


def plan(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, config: TokenizationConfig) -> Plan:
    """Render the trained turns of one conversation.

    Raises:
        MaskError: as `build_examples`.
    """
    indices = choose_turns(conversation.messages, config)
    for index in indices:
        _check_answer(conversation.messages[index], index)
    chat = open_chat(tokenizer, conversation.tools or None)
    messages, tools = plain_messages(chat, conversation.messages), normalize_tools(conversation.tools)
    allow = config.allow_special_tokens
    rendered = render_turns(chat, messages, indices, tools, allow_special_tokens=allow)
    check_said(chat, messages, rendered.plain)
    losses = find_losses(chat, messages, rendered.plain, tools)
    check_losses(chat, losses, config.allow_dropped)
    literal_endings = find_literal_endings(chat, messages, indices) if rendered.marks else ()
    return Plan(chat, messages, tools, rendered, losses, literal_endings)


def _check_answer(message: dict[str, Any], index: int) -> None:
    """Refuse to train an answer that is null.

    Raises:
        MaskError: it is, and it calls no tool.
    """
    if message.get("content") is None and not message.get("tool_calls"):
        raise MaskError(
            "null_content",
            f"message {index + 1}: the content of a trained answer is null: give a text, or train: false",
        )


def choose_turns(messages: Sequence[dict[str, Any]], config: TokenizationConfig) -> list[int]:
    """Return the indices of the assistant messages to train on.

    Raises:
        MaskError: there is none, a `train` key is not a boolean, or their prompts are too much together.
    """
    assistants = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise MaskError(
                "bad_message", f"message {number + 1}: a mapping with a role is wanted, got {message!r:.200}"
            )
        if message.get("train", True) not in (True, False, None):
            raise MaskError(
                "bad_message", f"message {number + 1}: train is {message['train']!r}, true or false is wanted"
            )
        weight = message.get("weight", 1)
        if not isinstance(weight, (int, float)) or not 0 < weight <= 1:
            raise MaskError(
                "bad_message", f"message {number + 1}: weight is {weight!r}, above 0 and at most 1 is wanted"
            )
        if message["role"] == "assistant":
            assistants.append(number)
    chosen = assistants[-1:] if config.train_on == "last_turn" else assistants
    chosen = [number for number in chosen if messages[number].get("train") is not False]
    if not chosen:
        raise MaskError(
            "no_trained_tokens", "no assistant message is left to train on: mark one train: true, or leave the row out"
        )
    if config.train_on_prompt and len({messages[number].get("weight", 1) for number in chosen}) > 1:
        raise MaskError(
            "bad_message",
            "its answers have different weights, and tokenization.train_on_prompt trains all of it as one: turn that "
            "off, or write one weight",
        )
    if sum(chosen) > MOST_PROMPT_MESSAGES:
        raise MaskError(
            "too_many_turns",
            f"{len(chosen)} answers are trained, and their prompts have {sum(chosen):,} messages together, more than "
            f"{MOST_PROMPT_MESSAGES:,}, which would take minutes: divide the conversation, or set "
            "tokenization.train_on to last_turn",
        )
    return chosen


def finish(
    plans: Sequence[Plan | MaskError], tokenizer: PreTrainedTokenizerBase, config: TokenizationConfig
) -> list[Masked | MaskError]:
    """Encode rendered conversations in one batch and put their examples together."""
    ready = [item for item in plans if isinstance(item, Plan)]
    encoded = iter(encode_turns([(item.chat, item.rendered) for item in ready], tokenizer))
    outcomes: list[Masked | MaskError] = []
    for item in plans:
        if isinstance(item, MaskError):
            outcomes.append(item)
            continue
        rows = next(encoded)
        try:
            if isinstance(rows, MaskError):
                raise rows
            examples = _assemble(item, rows, config)
            outcomes.append(Masked(examples, item.rendered.num_literals, item.losses, item.literal_endings))
        except MaskError as error:
            outcomes.append(error)
    return outcomes


def _assemble(item: Plan, rows: Sequence[Encoded], config: TokenizationConfig) -> list[Example]:
    """Chain the turns that continue one another, and cut what is too long."""
    eos = item.chat.tokenizer.eos_token_id
    examples: list[Example] = []
    chain = _Chain()
    length = 0
    for turn, row in zip(item.rendered.turns, rows, strict=True):
        if not turn.closed and eos is None:
            raise MaskError(
                "no_end_of_turn",
                f"{item.chat.name} writes no end of turn, and the tokenizer has no eos token to put there: set "
                "eos_token in the tokenizer's folder",
            )
        target_ids = row.target_ids if turn.closed else [*row.target_ids, int(eos)]
        if not row.chained:
            examples += chain.close(config)
            chain, length = _Chain(), 0
        length += len(row.front_ids) + len(target_ids)
        if length <= config.max_length:
            chain.add(turn, row.front_ids, target_ids)
            continue
        # Every later turn of this chain is longer still, and is cut as well.
        examples += chain.close(config)
        chain = _Chain(truncated=True)
        cut = cut_turn(item.chat, item.messages, turn.index, item.tools, config)
        chain.add(cut.turn, cut.prompt_ids, cut.target_ids)
        examples += chain.close(config)
        chain = _Chain()
    return examples + chain.close(config)


@dataclass
class _Chain:
    """An example that grows turn by turn."""

    truncated: bool = False
    input_ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def add(self, turn: Turn, front_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Append what is served and what is said."""
        start = len(self.input_ids) + len(front_ids)
        self.input_ids += [*front_ids, *target_ids]
        self.spans.append((start, len(self.input_ids)))
        self.turns.append(turn)

    def close(self, config: TokenizationConfig) -> list[Example]:
        """Return the example, if a turn was added."""
        if not self.turns:
            return []
        last = self.turns[-1]
        spans = ((0, len(self.input_ids)),) if config.train_on_prompt else tuple(self.spans)
        indices = tuple(turn.index for turn in self.turns)
        return [Example(write_ids(self.input_ids), spans, indices, last.target, self.truncated, last.closed)]
