from collections import Counter
from typing import Any

import pytest

from tasks.ingestion.errors import DataError, RowError
from tasks.ingestion.rows.conversations import convert_row
from tasks.ingestion.rows.layouts import Reading
from tasks.ingestion.rows.matching import find_layout


def convert(row: Any, reading: Reading | None = None) -> list[tuple[str, str]]:
    """Return the (role, content) pairs of a row that is read by its own columns."""
    reading = reading or Reading()
    layout = find_layout([row], reading, "rows.json")
    assert layout is not None
    messages, *_ = convert_row(row, layout, invented_nulls=False, unused=Counter())
    return [(message["role"], message["content"]) for message in messages]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TURN = [("user", "hi"), ("assistant", "yo")]


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        ({"instruction": "hi", "input": "", "output": "yo"}, TURN),
        ({"instruction": "hi", "output": "yo"}, TURN),
        ({"instruction": "hi", "input": None, "response": "yo"}, TURN),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [("user", "add\n1 2"), ("assistant", "3")]),
        ({"instruction": " ", "input": "1 2", "output": " 3\n"}, [("user", "1 2"), ("assistant", " 3\n")]),
        (
            {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        ({"instruct": "诗：", "input": "山", "label": "水"}, [("user", "诗：\n山"), ("assistant", "水")]),
        ({"instruct": "hi", "label": "yo"}, TURN),
        ({"prompt": "hi", "completion": "yo"}, TURN),
        ({"prompt": "hi", "response": "yo"}, TURN),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, TURN),
        ({"prompt": CHAT[:1], "completion": "yo"}, TURN),
        ({"messages": CHAT}, TURN),
        ({"messages": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]'}, TURN),
        ({"messages": CHAT, "system": "s"}, [("system", "s"), *TURN]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, TURN),
        ({"conversations": CHAT}, TURN),
        ({"prompt": "unused", "messages": CHAT}, TURN),
        (
            {"instruction": "I am {{name}}", "output": "{{name}} {x} %s"},
            [("user", "I am {{name}}"), ("assistant", "{{name}} {x} %s")],
        ),
    ],
)
def test_row_becomes_the_conversation_word_for_word(row: Any, conversation: list[tuple[str, str]]) -> None:
    assert convert(row) == conversation


def test_column_map_gives_our_fields_the_names_of_the_data() -> None:
    row = {"question": "hi", "answer": "yo", "instruction": "not this"}
    assert convert(row, Reading(columns={"prompt": "question", "completion": "answer"})) == TURN
    assert convert(row, Reading(columns={"instruction": "question", "output": "answer"})) == TURN
    assert convert({"chat": CHAT}, Reading("sharegpt", {"conversations": "chat"})) == TURN


def test_named_format_wins_over_other_columns() -> None:
    row = {"messages": CHAT, "prompt": "p", "completion": "c"}
    assert convert(row, Reading("prompt_completion")) == [("user", "p"), ("assistant", "c")]


def test_format_is_that_of_most_rows_of_the_file() -> None:
    rows = [{"messages": CHAT, "instruction": "a", "output": "b"}] + [{"instruction": "a", "output": "b"}] * 2
    layout = find_layout(rows, Reading(), "rows.json")
    assert layout is not None
    assert layout.format == "alpaca"
    assert find_layout([1, "text", None], Reading(), "rows.json") is None


@pytest.mark.parametrize(
    ("row", "reading", "words"),
    [
        (
            {"a": 1, "b": 2},
            Reading(),
            ["the columns 'a', 'b' do not make any known format", "data.columns", "instruction"],
        ),
        ({"prompt": "x", "text": "y"}, Reading("alpaca"), ["the columns 'prompt', 'text' do not make format alpaca"]),
        ({"prompt": "x", "completion": "y"}, Reading(columns={"prompt": "q"}), ["do not make", "'prompt': 'q'"]),
        ({"messages": CHAT}, Reading(columns={"messages": "messages", "tools": "functions"}), ["tools: functions"]),
        ({"messages": CHAT}, Reading(columns={"reply": "a"}), ["fields reply", "no format has all of them"]),
        ({"messages": CHAT}, Reading("messages", {"prompt": "a"}), ["fields prompt", "messages: messages, system"]),
        (
            {"instruction": "a", "output": "b", "response": "c"},
            Reading(),
            ["output and response could both be the output", "data.columns: {output: output}"],
        ),
        (
            {"prompt;completion": "x;y"},
            Reading(),
            ["single column, 'prompt;completion'", "separated by ';'", "commas"],
        ),
        (
            {"version": 1, "rows": [{"prompt": "x", "completion": "y"}] * 2},
            Reading(),
            ["one object, and not a list", "'rows' in it holds a list of 2 objects", """jq '.["rows"]' FILE"""],
        ),
    ],
)
def test_wrong_columns_are_an_error_with_the_way_out(row: Any, reading: Reading, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        convert(row, reading)
    assert str(caught.value).startswith("rows.json: ")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (7, "not_an_object"),
        ([["a", "b"]], "not_an_object"),
        ({"instruction": "a"}, "missing_field"),
        ({"instruction": None, "output": "b"}, "null_content"),
        ({"instruction": "a", "output": None}, "null_content"),
        ({"instruction": "a", "output": 42}, "not_text"),
        ({"instruction": "a", "output": float("nan")}, "not_text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "not_text"),
        ({"instruction": "", "input": " \n", "output": "b"}, "empty_prompt"),
        ({"instruction": "a", "output": " \n\t\u3000"}, "empty_answer"),
        ({"instruction": "a", "output": "b", "history": "a, b"}, "bad_history"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "bad_history"),
        ({"instruction": "a", "output": "b", "history": [["a", " "]]}, "empty_answer"),
        ({"instruction": "a", "output": "b", "tools": "{"}, "bad_tools"),
    ],
)
def test_bad_row_has_a_fixed_reason(row: Any, reason: str) -> None:
    layout = find_layout([{"instruction": "a", "output": "b"}], Reading(), "rows.json")
    assert layout is not None
    with pytest.raises(RowError) as caught:
        convert_row(row, layout, invented_nulls=False, unused=Counter())
    assert caught.value.reason == reason
    assert caught.value.detail


def test_what_is_not_read_is_counted() -> None:
    unused: Counter[str] = Counter()
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": "a", "time": 1}, {"role": "assistant", "content": "b"}], "id": 7},
        {"messages": [{"role": "system", "content": "x"}, *CHAT], "system": "y", "id": 8},
    ]
    layout = find_layout(rows, Reading(), "rows.json")
    assert layout is not None
    for row in rows:
        convert_row(row, layout, invented_nulls=False, unused=unused)
    assert unused == {"column id": 2, "message key time": 1, "column system, where the messages have their own": 1}
