"""Rows with two answers, of which one is preferred, in the layouts of known datasets: pairs, or rejects by name."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import DataConfig
from schemas.records import Conversations
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError, RowError
from tasks.ingestion.rows.conversations import Converted, convert_row
from tasks.ingestion.rows.layouts import Reading
from tasks.ingestion.rows.matching import find_layout
from tests.tasks.ingestion.conftest import WriteLines

HI = {"role": "user", "content": "hi"}
GOOD, BAD = {"role": "assistant", "content": "hello"}, {"role": "assistant", "content": "go away"}


def read(row: dict[str, Any], unused: Counter[str] | None = None, **reading: Any) -> Converted:
    """Return the pair that a row is read as."""
    layout = find_layout([row], Reading("preference", **reading), "rows.jsonl")
    assert layout is not None
    return convert_row(row, layout, invented_nulls=False, unused=Counter() if unused is None else unused)


def say(*pairs: str) -> list[dict[str, Any]]:
    """Write messages as `u:text` and `a:text`; `-:text` is the assistant's and not trained."""
    roles = {"u": "user", "s": "system", "a": "assistant", "-": "assistant"}
    return [
        {"role": roles[pair[0]], "content": pair[2:], **({"train": False} if pair[0] == "-" else {})} for pair in pairs
    ]


@pytest.mark.parametrize(
    ("row", "before"),
    [
        pytest.param({"prompt": "hi", "chosen": "hello", "rejected": "go away"}, ["u:hi"], id="texts"),
        pytest.param(
            {"system": "s", "question": "hi", "chosen": "hello", "rejected": "go away"}, ["s:s", "u:hi"], id="orca"
        ),
        pytest.param(
            {
                "prompt": "hi",
                "prompt_id": "1",
                "chosen": [HI, GOOD],
                "rejected": [HI, BAD],
                "messages": [HI, GOOD],
                "score_chosen": 8.0,
            },
            ["u:hi"],
            id="ultrafeedback",
        ),
        pytest.param({"chosen": [HI, GOOD], "rejected": [HI, BAD], "score_chosen": 8.0}, ["u:hi"], id="trl-implicit"),
        pytest.param({"prompt": [HI], "chosen": [GOOD], "rejected": [BAD]}, ["u:hi"], id="trl-explicit"),
        pytest.param(
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: hi\n\nAssistant: hello",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: hi\n\nAssistant: go away",
            },
            ["u:a", "-:b", "u:hi"],
            id="hh-rlhf",
        ),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "hello"},
                "rejected": {"from": "gpt", "value": "go away"},
            },
            ["u:hi"],
            id="llamafactory-sharegpt",
        ),
        pytest.param(
            {"instruction": "say", "input": "hi", "chosen": "hello", "rejected": "go away", "history": [["a", "b"]]},
            ["u:a", "-:b", "u:say\nhi"],
            id="llamafactory-alpaca",
        ),
        pytest.param(
            {"input": {"messages": [HI], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            ["u:hi"],
            id="openai",
        ),
        pytest.param(
            {"prompt": json.dumps([HI]), "chosen": "hello", "rejected": "go away"},
            ["u:" + json.dumps([HI])],
            id="text-that-looks-like-json",
        ),
    ],
)
def test_layouts_of_known_datasets_become_pairs(row: dict[str, Any], before: list[str]) -> None:
    found = read(row)
    assert found.messages == say(*before, "a:hello")
    assert found.rejected == say(*before, "a:go away")


def test_answers_of_several_turns_begin_where_they_differ() -> None:
    first = say("u:a", "a:b", "u:c", "a:d", "u:e", "a:f")
    second = say("u:a", "a:b", "u:c", "a:x", "u:y", "a:z")
    found = read({"chosen": first, "rejected": second})
    assert found.messages == say("u:a", "-:b", "u:c", "a:d", "u:e", "a:f")
    assert found.rejected == say("u:a", "-:b", "u:c", "a:x", "u:y", "a:z")


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"prompt": "hi", "chosen": "a", "rejected": "a"}, "same_answers", "both are 'a'"),
        ({"prompt": "hi", "chosen": "a", "rejected": " "}, "empty_answer", "message 2"),
        ({"prompt": "hi", "chosen": None, "rejected": "a"}, "null_content", "chosen is null"),
        ({"prompt": "hi", "chosen": 4, "rejected": 5}, "bad_message", "chosen is of type int: a text or messages"),
        ({"prompt": "hi", "chosen": "a"}, "missing_field", "no rejected"),
        ({"chosen": "a", "rejected": "b"}, "missing_field", "chosen is a text without its prompt"),
        ({"chosen": say("u:a", "a:b"), "rejected": say("u:x", "a:b")}, "different_prompts", "from message 1 on"),
        ({"chosen": say("u:a", "a:b"), "rejected": say("u:a", "a:b", "u:c", "a:d")}, "different_prompts", "goes on"),
        ({"prompt": "hey", "chosen": [HI, GOOD], "rejected": [HI, BAD]}, "different_prompts", "'hey'"),
        ({"prompt": [HI, GOOD], "chosen": "a", "rejected": "b"}, "wrong_role_order", "prompt ends with an assistant"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "weight": 0.5}, "unread_meaning", "weight"),
        (
            {"input": {"messages": [HI], "tools": [{}]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "unread_meaning",
            "tools",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_refused_by_name(row: dict[str, Any], reason: str, words: str) -> None:
    layout = find_layout([{**row, "rejected": 1} if "input" not in row else row], Reading("preference"), "rows.jsonl")
    assert layout is not None
    with pytest.raises(RowError) as caught:
        convert_row(row, layout, invented_nulls=False, unused=Counter())
    assert caught.value.reason == reason
    assert words in caught.value.detail


def test_what_is_not_read_is_counted_once() -> None:
    unused: Counter[str] = Counter()
    shared = {"role": "user", "content": "hi", "mood": "good"}
    read({"chosen": [shared, {**GOOD, "score": 1}], "rejected": [shared, BAD], "source": "x"}, unused)
    assert unused == {"message key mood": 1, "message key score": 1, "column source": 1}


def test_pairs_become_validated_tables_and_every_row_is_accounted_for(write_lines: WriteLines, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"mail ann@acme.org {n}"} for n in range(10)]
    rows += [rows[0], {**rows[0], "rejected": "another"}, {**rows[1], "rejected": rows[1]["chosen"]}]
    config = DataConfig(source=str(write_lines("pairs.jsonl", rows)), eval_fraction=0.2, screen="redact").as_pairs()
    counts = build_dataset(
        config.model_copy(update={"max_rejected_fraction": 0.1}), seed=0, folder=tmp_path / "dataset"
    )
    assert (counts.rows_in, counts.rows_rejected, counts.rows_duplicate) == (13, {"same_answers": 1}, 1)
    assert counts.rows_train + counts.rows_eval + counts.rows_leaked == 11
    train = pl.read_parquet(tmp_path / "dataset" / "train.parquet")
    Conversations.validate(train)
    rejected = [json.loads(text)[-1]["content"] for text in train["rejected"]]
    assert any(text.startswith("mail [EMAIL]") for text in rejected)
    assert not any("ann@" in text for text in rejected)


def test_single_answers_and_pairs_are_not_taken_for_each_other(write_lines: WriteLines, tmp_path: Path) -> None:
    pairs = DataConfig(source=str(write_lines("a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3)))
    with pytest.raises(DataError, match=r"training\.objective dpo"):
        build_dataset(pairs, seed=0, folder=tmp_path / "a")
    single = DataConfig(source=str(write_lines("b.jsonl", [{"prompt": "q", "completion": "a"}] * 3)))
    with pytest.raises(DataError, match=r"do not make format preference .*chosen"):
        build_dataset(single.as_pairs(), seed=0, folder=tmp_path / "b")


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        (
            {"columns": {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "bad"}},
            {"instruction": "say", "input": "hi", "good": "hello", "bad": "go away"},
        ),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
                "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "u", "assistant_tag": "a"},
            },
            {
                "talk": [{"who": "u", "what": "say\nhi"}],
                "good": {"who": "a", "what": "hello"},
                "bad": {"who": "a", "what": "go away"},
            },
        ),
    ],
    ids=["alpaca", "sharegpt"],
)
def test_rankings_of_llamafactory_are_pairs(
    write_lines: WriteLines, tmp_path: Path, entry: dict[str, Any], row: dict[str, Any]
) -> None:
    write_lines("rank.jsonl", [row])
    index = tmp_path / "dataset_info.json"
    index.write_text(
        json.dumps({"rank": {"file_name": "rank.jsonl", "ranking": True, **entry}, "one": {"file_name": "x"}})
    )
    config = DataConfig(source=f"{index}#rank", eval_fraction=0.0)
    build_dataset(config.as_pairs(), seed=0, folder=tmp_path / "dataset")
    (found,) = pl.read_parquet(tmp_path / "dataset" / "train.parquet").select("messages", "rejected").rows()
    assert [json.loads(text) for text in found] == [say("u:say\nhi", "a:hello"), say("u:say\nhi", "a:go away")]
    with pytest.raises(DataError, match=r"#rank: a preference dataset \(ranking\): set training.objective to dpo"):
        build_dataset(config, seed=0, folder=tmp_path / "x")
    with pytest.raises(DataError, match=r"#one: its entry says no ranking"):
        build_dataset(DataConfig(source=f"{index}#one").as_pairs(), seed=0, folder=tmp_path / "x")
