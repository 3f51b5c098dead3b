import pickle
from collections import Counter
from typing import Any

import pytest

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.messages import check_messages, read_messages


def roles(text: str) -> list[dict[str, Any]]:
    """Spell a conversation by the first letters of its roles; c is an assistant with a tool call."""
    names = {"s": "system", "u": "user", "a": "assistant", "c": "assistant", "t": "tool"}
    call = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    return [
        {"role": names[letter], "content": "" if letter == "c" else letter, **(call if letter == "c" else {})}
        for letter in text
    ]


@pytest.mark.parametrize(
    "text", ["ua", "sua", "uaua", "uaa", "ucta", "ucttaua", "uccta", "uc", "suatta", "uata", "a", "sa", "aua", "saua"]
)
def test_orders_that_are_conversations(text: str) -> None:
    check_messages(roles(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty_conversation"),
        ("s", "no_assistant"),
        ("u", "ends_with_user"),
        ("uau", "ends_with_user"),
        ("uct", "ends_with_tool"),
        ("au", "ends_with_user"),
        ("asa", "wrong_role_order"),
        ("ssua", "wrong_role_order"),
        ("usa", "wrong_role_order"),
        ("uas", "wrong_role_order"),
        ("uua", "wrong_role_order"),
        ("uta", "wrong_role_order"),
        ("uctua", "wrong_role_order"),
        ("tua", "wrong_role_order"),
    ],
)
def test_orders_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        check_messages(roles(text))
    assert caught.value.reason == reason


def test_error_names_the_message_and_survives_pickling() -> None:
    with pytest.raises(RowError) as caught:
        check_messages([*roles("uaua"), {"role": "user", "content": "x"}, {"role": "assistant", "content": "\n "}])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.detail) == ("empty_answer", "message 6: the assistant says nothing")


@pytest.mark.parametrize(
    ("given", "role"),
    [("human", "user"), ("gpt", "assistant"), ("developer", "system"), ("observation", "tool"), ("function", "tool")],
)
def test_aliases_of_roles(given: str, role: str) -> None:
    assert read_messages([{"from": given, "value": "x"}]) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    ("item", "reason", "word"),
    [
        ({"role": "narrator", "content": "x"}, "unknown_role", "narrator"),
        ({"role": 3, "content": "x"}, "unknown_role", "3"),
        ({"content": "x"}, "bad_message", "no role"),
        ({"role": None, "content": "x"}, "bad_message", "no role"),
        ({"role": "user"}, "bad_message", "no content"),
        ("hello", "bad_message", "str"),
        (None, "bad_message", "NoneType"),
        ({"role": "user", "content": None}, "null_content", "message 2"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "null_content", "message 2"),
        ({"role": "user", "content": 5}, "not_text", "int"),
        ({"role": "user", "content": []}, "not_text", "list"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "not_text", "image_url"),
        ({"role": "assistant", "content": "x", "reasoning_content": ["a"]}, "not_text", "reasoning_content"),
        ({"role": "assistant", "content": "x", "train": "no"}, "bad_train_flag", "'no'"),
        ({"role": "assistant", "content": "x", "weight": 1.5}, "bad_train_flag", "1.5"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "bad_tool_call", "user"),
    ],
)
def test_message_that_is_none_has_a_fixed_reason(item: Any, reason: str, word: str) -> None:
    with pytest.raises(RowError) as caught:
        read_messages([{"role": "user", "content": "first"}, item])
    assert caught.value.reason == reason
    assert word in caught.value.detail


@pytest.mark.parametrize("value", [None, "text", {"role": "user"}, 3])
def test_messages_must_be_a_list(value: Any) -> None:
    with pytest.raises(RowError):
        read_messages(value)


def test_text_parts_are_joined_as_they_are() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a b"}]


def test_what_templates_and_masks_read_is_kept_and_the_rest_counted() -> None:
    unused: Counter[str] = Counter()
    messages = read_messages(
        [
            {"role": "user", "content": "x", "name": "Ann", "weight": 1, "audio": None},
            {"role": "assistant", "content": "y", "reasoning_content": "z", "train": False, "refusal": "no"},
            {"role": "assistant", "content": "y", "reasoning": "z", "weight": 0},
            {"role": "tool", "content": "r", "tool_call_id": "call_1"},
        ],
        unused=unused,
    )
    assert messages == [
        {"role": "user", "content": "x", "name": "Ann"},
        {"role": "assistant", "content": "y", "reasoning_content": "z", "train": False},
        {"role": "assistant", "content": "y", "reasoning_content": "z", "train": False},
        {"role": "tool", "content": "r", "tool_call_id": "call_1"},
    ]
    assert unused == {"message key refusal": 1}


def test_conversation_must_train_something() -> None:
    messages = roles("uaua")
    messages[1]["train"] = False
    check_messages(messages)
    messages[3]["train"] = False
    with pytest.raises(RowError, match="nothing_to_train"):
        check_messages(messages)


def test_openai_tool_calls_get_arguments_as_an_object_and_empty_content() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
    }
    (older,) = read_messages([{"role": "assistant", "function_call": {"name": "add", "arguments": ""}}])
    assert older["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {}}}]


def test_sharegpt_function_call_and_observation() -> None:
    messages = read_messages(
        [
            {"from": "human", "value": "x"},
            {
                "from": "function_call",
                "value": '<think>\nhm\n</think>\n\n[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]',
            },
            {"from": "observation", "value": '{"ok": true}'},
            {"from": "gpt", "value": "done"},
        ]
    )
    check_messages(messages)
    assert messages[1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
            {"type": "function", "function": {"name": "g", "arguments": {}}},
        ],
    }
    assert messages[2] == {"role": "tool", "content": '{"ok": true}'}
