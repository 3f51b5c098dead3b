"""Requests whose answers tell a version from others: rows of its data, and questions that try one thing each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from tasks.prompts import PromptSettings, make_prompt

NUM_ROWS = 6
"""Of the data."""
_FIRST, _SECOND = "Who are you?", "Write two lines about the sea."
_ODD = "Say: naïve — 3,50 € x 1e5\n\n\t例子 🙂 <b>BOLD</b> "
_FILLER = "The sea is wide, and the ship is small. Line {number} of a long letter. "
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "The word"}}},
    },
}


class Question(NamedTuple):
    """A request and the ids of its prompt."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    prompt: list[int]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def choose_questions(tokenizer: Any, settings: PromptSettings, dataset: Path, *, longest: int) -> list[Question]:
    """Return the requests that a template takes.

    Args:
        tokenizer: that ships with the version.
        settings: beside it.
        dataset: folder with eval.parquet and train.parquet; the first is asked where it has rows.
        longest: tokens of the prompt that shows whether a context is cut; no prompt is longer.
    """
    greeted = [_user(_FIRST), {"role": "assistant", "content": "A model."}, _user(_SECOND)]
    asked: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None]] = [
        *((f"row {number}", messages, tools) for number, (messages, tools) in enumerate(_read_rows(dataset), 1)),
        ("without a system message", [_user(_FIRST)], None),
        ("with a system message", [{"role": "system", "content": "Answer in one word."}, _user(_SECOND)], None),
        ("several turns", greeted, None),
        ("odd characters", [_user(_ODD)], None),
        ("with a tool", [_user("What does the word sea mean?")], [_TOOL]),
    ]
    questions = []
    for name, messages, tools in asked:
        try:
            prompt = make_prompt(tokenizer, settings, messages, tools)
        except Exception:  # whatever a template refuses with: it would be refused when served too
            continue
        if 0 < len(prompt) <= longest:
            questions.append(Question(name, messages, tools, prompt))
    return [*questions, *_make_long(tokenizer, settings, longest)]


def _read_rows(dataset: Path) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """Return what stands before the last answer of some conversations, with their tools."""
    for name in ("eval", "train"):
        frame = pl.scan_parquet(dataset / f"{name}.parquet").select("messages", "tools").head(NUM_ROWS).collect()
        if frame.height:
            break
    rows = []
    for messages, tools in frame.rows():
        spoken = json.loads(messages)
        answers = [place for place, message in enumerate(spoken) if message["role"] == "assistant"]
        if answers and answers[-1] > 0:
            rows.append((spoken[: answers[-1]], json.loads(tools) if tools else None))
    return rows


def _make_long(tokenizer: Any, settings: PromptSettings, longest: int) -> list[Question]:
    """Return a request that nearly fills `longest` tokens, and whose beginning matters as much as its end."""

    def build(count: int) -> Sequence[int]:
        return make_prompt(tokenizer, settings, write(count))

    def write(count: int) -> list[dict[str, Any]]:
        return [_user("".join(_FILLER.format(number=n) for n in range(1, count + 1)) + _SECOND)]

    try:
        one, eleven = len(build(1)), len(build(11))
        count = 1 + max(0, (longest - one) * 10 // max(eleven - one, 1))
        while count > 1 and len(build(count)) > longest:
            count -= max(1, count // 50)
        prompt = list(build(count))
    except Exception:  # as above
        return []
    return [Question("long", write(count), None, prompt)] if len(prompt) <= longest else []
