"""Rows as peers write them, and columns that change what a row means: understood, or refused by name."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from schemas.config import DataConfig, RowFormat
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError, RowError
from tasks.ingestion.rows.conversations import convert_row
from tasks.ingestion.rows.formats import COMMON, FORMATS, Format
from tasks.ingestion.rows.layouts import Layout, Reading
from tasks.ingestion.rows.matching import find_layout
from tests.tasks.ingestion.conftest import WriteLines

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TURN = [("user", "hi"), ("assistant", "yo")]


def read(row: Any, reading: Reading | None = None, unused: Counter[str] | None = None) -> list[dict[str, Any]]:
    """Return the messages of a row that is read by its own columns."""
    layout = find_layout([row], reading or Reading(), "rows.json")
    assert layout is not None
    return convert_row(row, layout, invented_nulls=False, unused=Counter() if unused is None else unused)[0]


def said(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def v1(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "value": text}]


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        pytest.param(
            {"instruction": "when?", "context": "in 2003", "response": "2003", "category": "qa"},
            [("user", "when?\nin 2003"), ("assistant", "2003")],
            id="dolly",
        ),
        pytest.param({"instruction": "hi", "context": "", "response": "yo", "category": "x"}, TURN, id="dolly-bare"),
        pytest.param({"question": "hi", "answer": "yo"}, TURN, id="question-answer"),
        pytest.param(
            {"id": "1", "system_prompt": "s", "question": "hi", "response": "yo"},
            [("system", "s"), *TURN],
            id="openorca",
        ),
        pytest.param(
            {"query": "c", "response": "d", "history": [["a", "b"]], "system": "s"},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
            id="ms-swift",
        ),
        pytest.param(
            {"conversation_id": 1, "conversation": [{"human": "hi", "assistant": "yo"}] * 2}, TURN * 2, id="firefly"
        ),
        pytest.param({"kind": "NLI", "input": "hi", "target": "yo"}, TURN, id="firefly-train"),
        pytest.param(
            {
                "messages": [
                    {"role": "user", "content": v1("hi"), "loss_weight": 0.0},
                    {"role": "assistant", "content": v1("yo"), "loss_weight": 1.0},
                ]
            },
            TURN,
            id="llamafactory-v1",
        ),
        pytest.param({"conversations": ["hi", "yo", "hi", "yo"], "source": "multi_turn"}, TURN * 2, id="lima"),
        pytest.param(
            {
                "meta_instruction": "s",
                "num_turns": 10,
                "chat": {
                    f"turn_{n}": {
                        "Human": f"<|Human|>: {n}<eoh>\n",
                        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                        "Commands": "<|Commands|>: None<eoc>\n",
                        "MOSS": f"<|MOSS|>: a\n{n}<eom>\n",
                    }
                    for n in (10, 9)
                },
            },
            [("system", "s"), ("user", "9"), ("assistant", "a\n9"), ("user", "10"), ("assistant", "a\n10")],
            id="moss",
        ),
        pytest.param(
            {
                "message_tree_id": "t",
                "prompt": {
                    "text": "hi",
                    "role": "prompter",
                    "replies": [
                        {"text": "worse", "role": "assistant", "rank": 1, "replies": []},
                        {"text": "yo", "role": "assistant", "rank": 0, "replies": [{"text": "?", "role": "prompter"}]},
                    ],
                },
            },
            TURN,
            id="oasst-tree",
        ),
        pytest.param(
            {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "yo"}]},
            [("system", "s"), ("assistant", "yo")],
            id="openai-assistant-after-system",
        ),
    ],
)
def test_row_of_a_peer_becomes_the_conversation(row: Any, conversation: list[tuple[str, str]]) -> None:
    assert said(read(row)) == conversation


def test_xlam_answers_become_calls() -> None:
    row = {
        "query": "weather in Rome?",
        "answers": '[{"name": "weather", "arguments": {"city": "Rome"}}]',
        "tools": '[{"name": "weather", "parameters": {"city": {"type": "str"}}}]',
    }
    _, answer = read(row)
    assert answer["content"] == ""
    assert answer["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    ]


def test_arguments_that_are_encoded_twice_are_the_object() -> None:
    call = {"function": {"name": "f", "arguments": json.dumps(json.dumps({"a": 1}))}}
    messages = read({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_functions_are_tools() -> None:
    layout = find_layout([row := {"messages": CHAT, "functions": [{"name": "f"}]}], Reading(), "rows.json")
    assert layout is not None
    _, tools, _ = convert_row(row, layout, invented_nulls=False, unused=Counter())
    assert tools == [{"type": "function", "function": {"name": "f"}}]


def test_answer_before_every_question_is_context_and_not_trained() -> None:
    unused: Counter[str] = Counter()
    messages = read({"conversations": [{"from": "gpt", "value": "welcome"}, *CHAT]}, unused=unused)
    assert [message.get("train") for message in messages] == [False, None, None]
    assert unused == {"first messages that are the assistant's: kept as context, not trained": 1}
    with pytest.raises(RowError, match="nothing_to_train"):
        read({"conversations": [{"from": "gpt", "value": "welcome"}]})


def test_replies_that_a_tree_has_besides_are_counted() -> None:
    unused: Counter[str] = Counter()
    replies = [{"text": str(n), "role": "assistant"} for n in range(3)]
    read({"message_tree_id": "t", "prompt": {"text": "hi", "role": "prompter", "replies": replies}}, unused=unused)
    assert unused["replies of a tree beside the best-ranked one"] == 2


@pytest.mark.parametrize(
    ("further", "reason", "words"),
    [
        ({"context": "in 2003"}, "unread_meaning", "data.columns: {input: context}"),
        ({"label": False}, "rated_bad", "data.ignored_columns: [label]"),
        ({"label": "false"}, "rated_bad", "remove the row"),
        ({"kto_tag": False}, "rated_bad", "data.ignored_columns: [kto_tag]"),
        ({"Label": False}, "rated_bad", "data.ignored_columns: [Label]"),
        ({"Context": "in 2003"}, "unread_meaning", "column Context"),
        ({"Complex_CoT": "Two and two are four."}, "unread_meaning", "reasoning_content of the answer"),
        ({"reasoning": "Two and two are four."}, "unread_meaning", "it belongs before the answer"),
        ({"documents": [{"text": "d"}]}, "unread_meaning", "write them into a message"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "unread_meaning", "tokenization.template_arguments"),
        ({"images": ["a.png"]}, "unread_meaning", "only text is trained"),
        ({"chosen": "x", "rejected": "y"}, "unread_meaning", "preference"),
        ({"history": [["a", "b"]]}, "unread_meaning", "earlier turns"),
        ({"weight": 75}, "unread_meaning", "a row weighs from 0 to 1"),
        ({"loss_weight": "heavy"}, "unread_meaning", "data.weight"),
        ({"mask": [0, 1]}, "unread_meaning", "train: false"),
        ({"system": "s", "system_prompt": "t"}, "unread_meaning", "system: system_prompt"),
        ({"tools": "[]", "functions": [{"name": "f"}]}, "unread_meaning", "tools: functions"),
    ],
)
def test_column_that_changes_the_meaning_is_refused_by_name(further: dict[str, Any], reason: str, words: str) -> None:
    with pytest.raises(RowError) as caught:
        read({"prompt": "hi", "completion": "yo", **further})
    assert caught.value.reason == reason
    assert words in caught.value.detail
    ignored = Reading(ignored_columns=tuple(further))
    assert said(read({"prompt": "hi", "completion": "yo", **further}, ignored))[-2:] == TURN


@pytest.mark.parametrize(
    "further",
    [
        *({"context": ""}, {"label": True}, {"label": "weather"}, {"images": []}, {"weight": 1}, {"mask": "User"}),
        *({"images": [None, ""]}, {"reasoning": "on"}, {"documents": []}),
    ],
)
def test_column_that_says_nothing_is_passed_over(further: dict[str, Any]) -> None:
    assert said(read({"prompt": "hi", "completion": "yo", **further})) == TURN


def test_chosen_answers_are_trained_where_a_person_names_them() -> None:
    row = {"prompt": "hi", "chosen": "yo", "rejected": "no"}
    with pytest.raises(DataError, match="completion: chosen"):
        read(row)
    assert said(read(row, Reading(columns={"completion": "chosen"}))) == TURN


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a book"}, "continued pretraining"),
        ({"segments": [{"label": True, "text": "x"}]}, "segments are text that a template already made"),
        ({"message_id": "1", "parent_id": None, "text": "x", "role": "prompter"}, "the file of whole trees"),
    ],
)
def test_rows_that_are_no_conversations_are_refused_with_the_way_out(row: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(row)


@pytest.mark.parametrize(
    ("flags", "train"),
    [
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"training": False}, False),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"loss_weight": 0.0, "train": False}, False),
    ],
)
def test_flag_of_an_answer_decides_whether_it_is_trained(flags: dict[str, Any], train: bool) -> None:
    messages = read({"messages": [*CHAT, CHAT[0], {**CHAT[1], **flags}]})
    assert messages[3]["train"] is train


@pytest.mark.parametrize(("flags", "weight"), [({"weight": 0.5}, 0.5), ({"train": True, "loss_scale": 0.25}, 0.25)])
def test_answer_keeps_its_weight(flags: dict[str, Any], weight: float) -> None:
    messages = read({"messages": [*CHAT, CHAT[0], {**CHAT[1], **flags}]})
    assert [message.get("weight") for message in messages] == [None, None, None, weight]


def test_row_that_weighs_less_has_all_its_answers_weigh_less() -> None:
    chat = [*CHAT, CHAT[0], {**CHAT[1], "weight": 0.5}, CHAT[0], {**CHAT[1], "train": False}]
    messages = read({"messages": chat, "weight": "0.5"})
    assert [message.get("weight") for message in messages[1::2]] == [0.5, 0.25, None]
    assert [message.get("weight") for message in read({"messages": CHAT, "loss_weight": 1.0})] == [None, None]
    assert [message.get("weight") for message in read({"messages": CHAT, "Weight": 0.25})] == [None, 0.25]
    with pytest.raises(RowError) as caught:
        read({"messages": CHAT, "weight": 0})
    assert caught.value.reason == "nothing_to_train"


@pytest.mark.parametrize(
    ("place", "flags", "reason", "words"),
    [
        (1, {"weight": -0.5}, "bad_train_flag", "weight is -0.5"),
        (1, {"train": 0.5}, "bad_train_flag", "train is 0.5"),
        (1, {"weight": 0.5, "loss_weight": 0.25}, "bad_train_flag", "disagree"),
        (1, {"loss": "yes"}, "bad_train_flag", "loss is 'yes'"),
        (1, {"loss": False, "train": True}, "bad_train_flag", "disagree"),
        (0, {"training": True}, "bad_train_flag", "only the assistant's"),
        (1, {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, "unread_meaning", "train_detail"),
        (1, {"mask": True}, "unread_meaning", "mask"),
        (0, {"images": ["a.png"]}, "unread_meaning", "only text"),
        (0, {"documents": [{"text": "d"}]}, "unread_meaning", "into the message"),
        (1, {"tool_plan": "I ask."}, "unread_meaning", "reasoning_content"),
    ],
)
def test_message_key_that_cannot_be_carried_is_refused(
    place: int, flags: dict[str, Any], reason: str, words: str
) -> None:
    messages = [dict(message) for message in CHAT]
    messages[place] |= flags
    with pytest.raises(RowError) as caught:
        read({"messages": messages})
    assert caught.value.reason == reason
    assert words in caught.value.detail


def test_question_at_the_end_is_cut_where_the_config_says_so() -> None:
    row = {"messages": [*CHAT, CHAT[0]]}
    with pytest.raises(RowError, match="ends_with_user"):
        read(row)
    unused: Counter[str] = Counter()
    assert said(read(row, Reading(trim_trailing_user=True), unused)) == TURN
    assert unused == {"user messages at the end, cut by data.trim_trailing_user": 1}


def test_settings_reach_the_rows_and_placeholders_are_a_warning(tmp_path: Path, write_lines: WriteLines) -> None:
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": f"I am {n}"}, *CHAT[1:], CHAT[0]], "label": False} for n in range(8)
    ]
    rows.append({"messages": [{"role": "user", "content": "I am {{name}}"}, *CHAT[1:]]})
    source = str(write_lines("rows.jsonl", rows))
    config = DataConfig(source=source, trim_trailing_user=True, ignored_columns=("label",), max_rejected_fraction=0)
    counts = build_dataset(config, seed=0, folder=tmp_path / "out")
    assert (counts.rows_in, counts.rows_rejected) == (9, {})
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert any("placeholder" in warning and "rows.jsonl:9" in warning for warning in quality["warnings"])


def test_system_message_that_is_answered_is_the_prompt(tmp_path: Path, write_lines: WriteLines) -> None:
    rows = [
        {"messages": [{"role": "system", "content": f"Is {n} even?"}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(("yes", "no") * 10)
    ]
    counts = build_dataset(DataConfig(source=str(write_lines("rows.jsonl", rows))), seed=0, folder=tmp_path / "out")
    assert (counts.rows_train, counts.rows_eval, counts.rows_leaked) == (18, 2, 0)
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["num_shared_prompts"] == 0


def _convert_poem(row: dict[str, Any], layout: Layout, schemas: Any, unused: Counter[str]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"a poem on {layout.require_text(row, 'theme')}"},
        {"role": "assistant", "content": layout.require_text(row, "poem")},
    ]


def test_format_is_one_entry_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "poem", Format((("theme",), ("poem", "text")), COMMON, _convert_poem))
    row = {"theme": "rain", "text": "drip", "system": "s"}
    assert said(read(row)) == [("system", "s"), ("user", "a poem on rain"), ("assistant", "drip")]


def test_config_knows_the_formats_of_the_table() -> None:
    assert set(get_args(RowFormat)) == {"auto", *FORMATS}
