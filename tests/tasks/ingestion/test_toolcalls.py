import json
from collections import Counter
from typing import Any

import pytest

from tasks.ingestion.errors import RowError
from tasks.ingestion.rows.toolcalls import KEPT_NULL, name_schemas, read_function_call_text, read_tool_calls, read_tools

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
WRAPPED = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "value",
    [
        [WRAPPED],
        [FUNCTION],
        FUNCTION,
        [{"type": "function", **FUNCTION}],
        json.dumps([FUNCTION]),
        [{**FUNCTION, "parameters": '{"type": "object", "properties": {"a": {"type": "string"}}}'}],
    ],
)
def test_definitions_come_to_the_one_wrapped_form(value: Any) -> None:
    assert read_tools(value, invented_nulls=False) == [WRAPPED]


@pytest.mark.parametrize("value", [None, "", "  ", [], "[]", {}])
def test_no_definitions_are_none(value: Any) -> None:
    assert read_tools(value, invented_nulls=False) is None


@pytest.mark.parametrize("value", ["no json", 3, [3], [{"description": "nameless"}], [{"function": {"name": ""}}]])
def test_bad_definitions_are_rejected(value: Any) -> None:
    with pytest.raises(RowError) as caught:
        read_tools(value, invented_nulls=False)
    assert caught.value.reason == "bad_tools"


@pytest.mark.parametrize(
    "value",
    [
        "text",
        [None],
        [{"arguments": {}}],
        [{"function": {"name": "f", "arguments": "{broken"}}],
        [{"function": {"name": "f", "arguments": "[1]"}}],
        [{"function": {"name": "f", "arguments": [1]}}],
        [{"type": "web_search", "name": "f"}],
    ],
)
def test_bad_calls_are_rejected(value: Any) -> None:
    with pytest.raises(RowError) as caught:
        read_tool_calls(value, None, Counter())
    assert caught.value.reason == "bad_tool_call"


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"a": 1}}',
        '[{"name": "f", "arguments": "{\\"a\\": 1}"}]',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    ],
)
def test_function_call_texts(text: str) -> None:
    calls, reasoning = read_function_call_text(text, Counter())
    assert calls == [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert reasoning is None


@pytest.mark.parametrize(
    "text", ["", "f(a=1)", "[]", '<tool_call>{"name": "f"}</tool_call> and words', "<think>only</think>"]
)
def test_function_call_texts_that_are_none(text: str) -> None:
    with pytest.raises(RowError) as caught:
        read_function_call_text(text, Counter())
    assert caught.value.reason == "bad_tool_call"


def test_nulls_that_arrow_invented_go_and_those_that_may_be_meant_stay() -> None:
    # As a struct column gives it: every object has the keys of all others.
    properties = {
        "city": {"type": "string", "description": None, "default": None},
        "unit": {"type": ["string", "null"], "description": "or null", "default": None},
        "text": None,
    }
    tools = read_tools(
        [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties, "required": None}}}],
        invented_nulls=True,
    )
    assert tools == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {
                    "properties": {
                        "city": {"type": "string"},
                        "unit": {"type": ["string", "null"], "description": "or null"},
                    }
                },
            },
        }
    ]
    unused: Counter[str] = Counter()
    arguments = {"city": "Bern", "unit": None, "text": None}
    (call,) = read_tool_calls([{"name": "f", "arguments": arguments}], name_schemas(tools), unused)
    assert call["function"]["arguments"] == {"city": "Bern", "unit": None}
    assert unused == {KEPT_NULL: 1}


def test_nulls_of_json_are_all_kept() -> None:
    (call,) = read_tool_calls([{"name": "f", "arguments": {"a": None}}], None, Counter())
    assert call["function"]["arguments"] == {"a": None}


def test_nulls_without_a_definition_stay_and_are_counted() -> None:
    unused: Counter[str] = Counter()
    (call,) = read_tool_calls([{"name": "f", "arguments": {"a": None}}], {}, unused)
    assert call["function"]["arguments"] == {"a": None}
    assert unused[KEPT_NULL] == 1
