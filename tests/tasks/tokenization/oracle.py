"""A second opinion on labels, from `apply_chat_template` and a hand-written table alone.

Nothing of the implementation is used: prompts are asked of transformers, answers are cut from its texts at the end of
turn that a person read in each template.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Verdict:
    """`kept`, `refused` or `wrong`, and why."""

    kind: str
    why: str = ""


def serve(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Any, *, prompt: bool
) -> tuple[str, list[int]]:
    """Return text and ids of what a server would build."""
    plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    try:
        plain = [parse_arguments(message) for message in plain]
        tokenizer.apply_chat_template(plain, tools=tools, add_generation_prompt=prompt, tokenize=False)
    except (TypeError, TemplateError):  # a template that takes arguments as text
        plain = [parse_arguments(message, as_text=True) for message in plain]
    plain = shape_contents(tokenizer, plain)
    text = tokenizer.apply_chat_template(plain, tools=tools, add_generation_prompt=prompt, tokenize=False)
    ids = tokenizer.apply_chat_template(plain, tools=tools, add_generation_prompt=prompt, return_dict=False)
    return str(text), list(ids)


def shape_contents(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages with contents as lists of parts for a template that loops over such."""
    if "part.type ==" not in str(tokenizer.chat_template):
        return messages
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def parse_arguments(message: dict[str, Any], *, as_text: bool = False) -> dict[str, Any]:
    """Copy a message with its calls' arguments as objects, or as JSON text, and an empty content for a null one."""
    message = {**message, "content": message.get("content") or ""}
    calls = []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        arguments = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls} if calls else message


def serve_sanitized(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Any
) -> list[int] | None:
    """Return the prompt's ids with control tokens of the contents as text; None when the contents hold none."""
    contents = str([message.get("content") for message in messages])
    if not any(token.content in contents for token in tokenizer.added_tokens_decoder.values() if token.special):
        return None
    plain = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    plain = shape_contents(tokenizer, plain)
    named, tokenizer.chat_control_tokens = tokenizer.chat_control_tokens, []  # special tokens, and no other
    try:
        ids = tokenizer.apply_chat_template(
            plain, tools=tools, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
    finally:
        tokenizer.chat_control_tokens = named
    return list(ids)


def trained_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return the borders of the runs of trained labels."""
    runs: list[tuple[int, int]] = []
    start = None
    for position, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and start is None:
            start = position
        if label == IGNORED and start is not None:
            runs.append((start, position))
            start = None
    return runs


def check(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Any,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    end_of_turn: str | None,
) -> Verdict:
    """Judge the examples (ids and labels) of a conversation trained on all its turns.

    Args:
        end_of_turn: Read in the template by a person; None where it writes none, so that eos has to follow.
    """
    indices = [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("train") is not False
    ]
    runs = [(ids, labels, start, stop) for ids, labels in examples for start, stop in trained_runs(labels)]
    if len(runs) != len(indices):
        return Verdict("wrong", f"{len(indices)} turns, but {len(runs)} trained runs")
    for index, (ids, labels, start, stop) in zip(indices, runs, strict=True):
        if len(ids) != len(labels) or list(ids[start:stop]) != list(labels[start:stop]):
            return Verdict("wrong", f"message {index}: labels are not the ids")
        prompt, prompt_ids = serve(tokenizer, messages[:index], tools, prompt=True)
        if list(ids[:start]) not in (prompt_ids, serve_sanitized(tokenizer, messages[:index], tools)):
            return Verdict("wrong", f"message {index}: the ids before the answer are not those served")
        verdict = _judge_answer(tokenizer, messages, index, tools, prompt, list(ids), (start, stop), end_of_turn)
        if verdict:
            return verdict
    for ids, labels in examples:
        last = trained_runs(labels)[-1][1]
        if last != len(ids):
            return Verdict("wrong", "something follows the last end of turn")
    return Verdict("kept")


def _judge_answer(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    index: int,
    tools: Any,
    prompt: str,
    ids: list[int],
    run: tuple[int, int],
    end_of_turn: str | None,
) -> Verdict | None:
    """Compare the decoded run with the text of the message, behind the prompt."""
    whole, _ = serve(tokenizer, messages[: index + 1], tools, prompt=False)
    start, stop = run
    said = str(tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    before = str(tokenizer.decode(ids[:start], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    both = str(tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    readings = {said} | ({both[len(before) :]} if both.startswith(before) else set())
    if not whole.startswith(prompt):
        # The history is rendered differently: compare from the message before the answer on, given a word of its own.
        named = [*messages[: index - 1], {**messages[index - 1], "content": "Praeteritum"}]
        prompt = serve(tokenizer, named, tools, prompt=True)[0].rpartition("Praeteritum")[2]
        whole = serve(tokenizer, [*named, messages[index]], tools, prompt=False)[0].rpartition("Praeteritum")[2]
    if not whole.startswith(prompt):
        if end_of_turn and (opened := re.search(r"<think>\s*(</think>\s*)?\Z", prompt)):
            return _judge_thought(messages[index], said, bool(opened[1]), end_of_turn)
        return Verdict("wrong", f"message {index}: {prompt[-40:]!r} is not how the turn begins, but it was kept")
    wanted = _until_end(whole[len(prompt) :], end_of_turn, str(tokenizer.eos_token))
    # Some tokenizers compose characters before anything else.
    if not readings & {wanted, unicodedata.normalize("NFC", wanted)}:
        return Verdict("wrong", f"message {index}: wanted {wanted!r}, trained {said!r}")
    return None


def _judge_thought(message: dict[str, Any], said: str, is_closed: bool, end_of_turn: str) -> Verdict | None:
    """Compare what follows a thought that the prompt opens, or that it opens and closes; spaces do not count."""
    thought, _, answer = str(message["content"]).rpartition("</think>")
    reasoning = message.get("reasoning_content") or thought.replace("<think>", "")
    wanted = ("" if is_closed else f"{reasoning}</think>") + answer
    if "".join(said.split()) not in {"".join(wanted.split()) + end for end in end_of_turn.split(" or ")}:
        return Verdict("wrong", f"wanted {wanted!r} behind the thought of the prompt, trained {said!r}")
    return None


def _until_end(written: str, end_of_turn: str | None, eos: str) -> str:
    """Cut a rendered message behind its last end of turn; add eos where there is none."""
    if end_of_turn is None:
        return written if written.endswith(eos) else written + eos
    for ending in end_of_turn.split(" or "):
        if ending in written:
            return written[: written.rindex(ending) + len(ending)]
    return written + eos
