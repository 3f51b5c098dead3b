"""Rows with two answers to one prompt, of which one is preferred: a conversation with each.

The prompt stands apart (a text, messages, LLaMA-Factory's conversations, OpenAI's input), or at the front of both
answers, where these are whole conversations or transcripts.
"""

import re
from collections import Counter
from typing import Any

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.converters import Converter, read_history
from tasks.ingestion.rows.layouts import Layout
from tasks.ingestion.rows.messages import Message, read_messages

CHOSEN = ("chosen", "preferred_output", "chosen_response")
REJECTED = ("rejected", "non_preferred_output", "rejected_response")
PROMPTS = ("prompt", "question", "instruction", "query", "conversations", "conversation", "input", "messages")
"""Names of the column with the prompt, the usual ones first."""
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def convert_side(field_name: str) -> Converter:
    """Return the converter of a prompt and one of its answers."""

    def convert(
        row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
    ) -> list[Message]:
        prompt = _read_prompt(row, layout, schemas, unused)
        value = row[layout.columns[field_name]]
        if isinstance(value, str) and not prompt:
            answer = _read_transcript(value, layout.columns[field_name], schemas, layout, unused)
        elif isinstance(value, str):
            answer = [{"role": "assistant", "content": value}]
        elif value is None:
            raise RowError("null_content", f"{layout.columns[field_name]} is null")
        else:
            if not isinstance(value, dict | list):
                raise RowError(
                    "bad_message",
                    f"{layout.columns[field_name]} is of type {type(value).__name__}: a text or messages are wanted",
                )
            parts = [value] if isinstance(value, dict) else value
            answer = read_messages(parts, tags=layout.tags, schemas=schemas, unused=unused)
        if not answer or answer[0]["role"] == "assistant":
            if prompt and prompt[-1]["role"] == "assistant":
                raise RowError("wrong_role_order", "the prompt ends with an assistant message, behind which answers go")
            return prompt + answer
        _check_contained(prompt, answer, layout.columns[field_name])
        return answer

    return convert


def mark_answers(chosen: list[Message], rejected: list[Message]) -> None:
    """Have both conversations train what they do not have in common, which has to begin with an answer.

    Args:
        chosen: checked messages; those of the prompt become context.
        rejected: the same.

    Raises:
        RowError: same_answers, different_prompts or unread_meaning.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((place for place, (left, right) in pairs if left != right), min(len(chosen), len(rejected)))
    if shared == len(chosen) == len(rejected):
        raise RowError("same_answers", f"both are {str(chosen[-1]['content'])[:80]!r}")
    for name, messages, other in (("chosen", chosen, "rejected"), ("rejected", rejected, "chosen")):
        if shared == len(messages):
            raise RowError("different_prompts", f"{other} goes on where {name} ends, after message {shared}")
        if messages[shared]["role"] != "assistant":
            role = messages[shared]["role"]
            raise RowError(
                "different_prompts", f"they differ from message {shared + 1} on, which is of the {role} in {name}"
            )
        if any("weight" in message for message in messages):
            raise RowError("unread_meaning", f"a message of {name} has a weight, and pairs all weigh the same")
        for message in messages[:shared]:
            if message["role"] == "assistant":
                message["train"] = False
        answers = [message for message in messages[shared:] if message["role"] == "assistant"]
        if not any(message.get("train", True) for message in answers):
            raise RowError("nothing_to_train", f"every answer of {name} says train: false")


def _read_prompt(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """Return the messages of the prompt; none where it stands in the answers."""
    value = layout.get(row, "prompt")
    messages: list[Message] = []
    for question, answer in read_history(layout.get(row, "history")):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if value is None or value == "" or value == []:
        return messages
    if isinstance(value, dict):  # OpenAI's
        if further := [key for key, content in value.items() if key != "messages" and content]:
            raise RowError("unread_meaning", f"the prompt has {', '.join(further)}, which is not read")
        value = value.get("messages")
    if not isinstance(value, str):
        return messages + read_messages(value, tags=layout.tags, schemas=schemas, unused=unused)
    is_joined = layout.columns.get("input") != layout.columns["prompt"]
    text = layout.join_prompt(row, "prompt") if is_joined else value
    return [*messages, {"role": "user", "content": text}]


def _read_transcript(
    text: str, column: str, schemas: dict[str, Any] | None, layout: Layout, unused: Counter[str]
) -> list[Message]:
    """Return the messages of a conversation that is a text: JSON, or `Human:` and `Assistant:` after blank lines."""
    if text.lstrip().startswith("["):
        return read_messages(text, tags=layout.tags, schemas=schemas, unused=unused)
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise RowError(
            "missing_field",
            f"{column} is a text without its prompt: give the prompt in a column of its own (data.columns: {{prompt: "
            "NAME})",
        )
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[name], "content": said.strip()} for name, said in pairs]


def _check_contained(prompt: list[Message], answer: list[Message], column: str) -> None:
    """Refuse a prompt that says something else than the conversation that is given beside it.

    Raises:
        RowError: different_prompts.
    """
    said = [message["content"].strip() for message in answer if message["role"] != "assistant"]
    for message in prompt:
        if message["role"] != "assistant" and message["content"].strip() not in said:
            raise RowError(
                "different_prompts",
                f"{column} is a whole conversation, and the prompt beside it is not in it: {message['content'][:80]!r}",
            )
