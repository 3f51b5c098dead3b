import hashlib
import json
from typing import Any

import pytest

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.identity import UsableRow, make_conversation, normalize_text


def make(*texts: str, system: str | None = None, tools: Any = None) -> UsableRow:
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return make_conversation(messages, tools, "rows.json", 1)


def test_example_id_is_the_sha256_of_the_canonical_json() -> None:
    text = '{"messages":[{"content":"é?","role":"user"},{"content":"yo","role":"assistant"}],"tools":null}'
    assert make("é?", "yo").example_id == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_example_id_differs_by_any_character_and_not_by_the_order_of_keys() -> None:
    variants = [make("a", "b"), make("a", "b "), make("A", "b"), make("a", "b", system=""), make("a", "b", tools=[])]
    assert len({row.example_id for row in variants}) == 5
    tools = [{"name": "f", "x": 1}], [{"x": 1, "name": "f"}]
    assert make("a", "b", tools=tools[0]).example_id == make("a", "b", tools=tools[1]).example_id


def test_written_messages_keep_the_order_of_keys_and_the_characters() -> None:
    row = make_conversation(
        [{"role": "user", "content": "山"}, {"role": "assistant", "content": "\x00", "b": 1, "a": 2}], None, "s", 1
    )
    assert row.messages == (
        '[{"role": "user", "content": "山"}, {"role": "assistant", "content": "\\u0000", "b": 1, "a": 2}]'
    )
    assert json.loads(row.messages)[1]["content"] == "\x00"


@pytest.mark.parametrize(
    ("text", "normalized"),
    [("  Hello\n\tWorld ", "hello world"), ("ＡＢＣ　１", "abc 1"), ("Straße", "strasse"), ("é", "é"), ("", "")],
)
def test_normalization_folds_case_width_and_spaces(text: str, normalized: str) -> None:
    assert normalize_text(text).decode() == normalized


def test_key_is_loose_and_there_is_one_for_each_answer() -> None:
    row = make("What?", "This.", "And?", "That.")
    assert len(row.keys) == 2
    assert make("what? ", "THIS.", system="x").keys == row.keys[:1]
    assert make("What?", "This.", "And?", "other").keys[0] == row.keys[0]
    assert make("What?", "This.", "And?", "other").keys[1] != row.keys[1]
    assert make("What?", "This.", "And?", "other").prompt_key == row.prompt_key
    assert make("This.", "What?").keys != row.keys[:1]


def test_key_knows_tool_calls() -> None:
    def call(name: str) -> UsableRow:
        calls = [{"type": "function", "function": {"name": name, "arguments": {}}}]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        return make_conversation(messages, None, "s", 1)

    assert call("f").keys == call("f").keys
    assert call("f").keys != call("g").keys


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "\ud83d"}], "broken_text"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": float("nan")}}]}],
            "bad_tool_call",
        ),
    ],
)
def test_what_cannot_be_written_is_rejected(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        make_conversation(messages, None, "s", 1)
    assert caught.value.reason == reason
