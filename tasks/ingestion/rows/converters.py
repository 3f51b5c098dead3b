"""One converter a format: it makes the messages of a row, and its tools where the format has its own way for them."""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.layouts import Layout
from tasks.ingestion.rows.messages import Message, read_messages
from tasks.ingestion.rows.toolcalls import read_tool_calls

Converter = Callable[[dict[str, Any], Layout, dict[str, Any] | None, Counter[str]], list[Message]]
"""Of a row, its layout, schemas of its tools where nulls may be invented, and the counter of what is not read."""


def convert_pair(prompt: str, answer: str, further: str = "input") -> Converter:
    """Return the converter of a prompt and an answer; `further` is joined to the prompt, and history goes before."""

    def convert(
        row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
    ) -> list[Message]:
        messages: list[Message] = []
        for pair in read_history(layout.get(row, "history")):
            messages += _make_turn(*pair)
        return messages + _make_turn(layout.join_prompt(row, prompt, further), layout.require_text(row, answer))

    return convert


def convert_prompt_completion(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """Take prompt and completion as texts, or as lists of messages."""
    prompt, completion = row[layout.columns["prompt"]], row[layout.columns["completion"]]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _make_turn(layout.join_prompt(row, "prompt"), layout.require_text(row, "completion"))
    parts: list[Any] = []
    for value, role in ((prompt, "user"), (completion, "assistant")):
        parts += value if isinstance(value, list) else [{"role": role, "content": value}]
    return read_messages(parts, tags=layout.tags, schemas=schemas, unused=unused)


def convert_messages(field_name: str) -> Converter:
    """Return the converter of one column of messages, in any of the ways in which they are written."""

    def convert(
        row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
    ) -> list[Message]:
        value = row[layout.columns[field_name]]
        return read_messages(_spread_pairs(value), tags=layout.tags, schemas=schemas, unused=unused)

    return convert


def _spread_pairs(value: Any) -> Any:
    """Write pairs `{human, assistant}` (Firefly) and lists of texts by turns (LIMA) as messages."""
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(item, str) and not item.lstrip().startswith("{") for item in value):
        return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(value)]
    messages: list[Any] = []
    for item in value:
        if isinstance(item, dict) and item.keys() == {"human", "assistant"}:
            messages += [{"role": role, "content": item[key]} for role, key in (("user", "human"), ("assistant",) * 2)]
        else:
            messages.append(item)
    return messages


def convert_xlam(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """Turn xLAM's query into the prompt, and its list of calls into the answer."""
    answers = row[layout.columns["answers"]]
    if isinstance(answers, str):
        try:
            answers = json.loads(answers)
        except (ValueError, RecursionError) as error:
            raise RowError("bad_tool_call", f"answers are not JSON ({error}): {answers[:120]}") from None
    calls = read_tool_calls(answers, schemas, unused)
    if not calls:
        raise RowError("empty_answer", "answers hold no call")
    query = layout.require_text(row, "query")
    return [{"role": "user", "content": query}, {"role": "assistant", "content": "", "tool_calls": calls}]


_MOSS_TAG = re.compile(r"^\s*<\|[A-Za-z ]+\|>:\s*|\s*<eo[a-z]>\s*$")


def convert_moss(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """Turn the numbered turns of a MOSS row into messages, without their tags; commands to plugins are refused."""
    chat = row[layout.columns["chat"]]
    if not isinstance(chat, dict) or not all(isinstance(turn, dict) for turn in chat.values()):
        raise RowError("bad_message", f"chat is {str(chat)[:120]!r}: an object of turns is wanted")
    instruction = layout.get_text(row, "meta_instruction")
    messages: list[Message] = [{"role": "system", "content": instruction}] if instruction else []
    # A turn_10 comes after turn_9, whatever the order of the keys.
    for name in sorted(chat, key=lambda name: (len(name), name)):
        said = {key: _MOSS_TAG.sub("", text) for key, text in chat[name].items() if isinstance(text, str)}
        if said.get("Commands", "None") not in ("None", ""):
            raise RowError(
                "unread_meaning", f"{name} has the command {said['Commands'][:80]!r}: MOSS's plugins are not read"
            )
        if said.keys() < {"Human", "MOSS"}:
            raise RowError("bad_message", f"{name} has no Human or no MOSS: {', '.join(said)}")
        messages += _make_turn(said["Human"], said["MOSS"])
    return messages


def convert_tree(
    row: dict[str, Any], layout: Layout, schemas: dict[str, Any] | None, unused: Counter[str]
) -> list[Message]:
    """Follow the best-ranked reply of each message of an OASST tree; the other replies are counted as not read."""
    node: Any = row[layout.columns["prompt"]]
    messages: list[Any] = []
    while isinstance(node, dict):
        messages.append({"role": node.get("role"), "content": node.get("text")})
        replies = [reply for reply in node.get("replies") or () if isinstance(reply, dict) and not reply.get("deleted")]
        unused["replies of a tree beside the best-ranked one"] += max(0, len(replies) - 1)
        ranked = sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
        node = ranked[0] if ranked else None
    if len(messages) > 1 and messages[-1]["role"] == "prompter":
        unused["prompts at the end of a tree, which nobody answered"] += 1
        messages.pop()
    return read_messages(messages, tags=layout.tags, schemas=schemas, unused=unused)


def _make_turn(prompt: str, answer: str) -> list[Message]:
    """Return a user message and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def read_history(value: Any) -> list[tuple[str, str]]:
    """Return the earlier pairs of question and answer of a row."""
    if value is None or value == "":
        return []
    if isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value
    ):
        return [(question, answer) for question, answer in value]
    raise RowError("bad_history", f"history is {str(value)[:120]!r}: a list of [question, answer] is wanted")
