"""Pairs of answers become two examples with one prompt, each labelled as it would be by itself."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import TokenizationConfig
from tasks.tokenization.examples import TokenizationError, tokenize_dataset
from tasks.tokenization.masking import build_examples
from tasks.tokenization.templates import PreparedTokenizer, prepare_tokenizer
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import say


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedTokenizer:
    make_tokenizer(CHATML).save_pretrained(str(tmp_path / "model"))
    return prepare_tokenizer(tmp_path / "model", None)


def write(folder: Path, pairs: list[tuple[list[Any], list[Any]]]) -> Path:
    """Write a dataset of pairs, the same rows to train and to hold out."""
    folder.mkdir()
    schema = dict.fromkeys(("example_id", "source", "line", "messages", "tools", "rejected"), pl.String)
    rows = [
        (f"{number:032d}", "a.jsonl", number + 1, json.dumps(chosen), None, json.dumps(rejected))
        for number, (chosen, rejected) in enumerate(pairs)
    ]
    for part in ("train", "eval"):
        pl.DataFrame(rows, schema | {"line": pl.Int64}, orient="row").write_parquet(folder / f"{part}.parquet")
    return folder


def mark(messages: list[Any], count: int) -> list[Any]:
    """Have the assistant's messages among the first ones be context."""
    return [
        {**message, "train": False} if place < count and message["role"] == "assistant" else message
        for place, message in enumerate(messages)
    ]


def test_both_answers_have_the_labels_that_they_would_have_alone(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    short = say("u:Hello", "a:Hi"), say("u:Hello", "a:Go away, please")
    long = [mark(say("u:a", "a:b", "u:Why?", answer), 2) for answer in ("a:Because.", "a:No")]
    dataset = write(tmp_path / "data", [short, (long[0], long[1])])
    config = TokenizationConfig()
    counts = tokenize_dataset(dataset, prepared, tmp_path / "tokens", config)
    frame = pl.read_parquet(tmp_path / "tokens" / "train.parquet")
    assert (counts.rows_train, counts.num_examples, frame.height) == (2, 2, 2)
    for row, pair in zip(frame.iter_rows(named=True), (short, long), strict=True):
        for messages, ids, labels in zip(
            pair, ("input_ids", "rejected_ids"), ("labels", "rejected_labels"), strict=True
        ):
            (expected,) = build_examples(messages, prepared.tokenizer, config=config)
            assert (row[ids], row[labels]) == (expected.input_ids, expected.labels)
    lists = frame.select(pl.col("input_ids", "rejected_ids").list.len().sum()).row(0)
    assert counts.total_tokens == sum(lists)
    masks = json.loads((tmp_path / "tokens" / "masks.json").read_text())["train"]
    assert masks["num_pairs"] == 2
    text = "".join(run["text"] for run in masks["rejected_samples"][0] if run["trained"])
    assert text.startswith("Go away, please")


def test_a_pair_is_refused_with_either_answer_and_never_cut_to_two_prompts(
    tmp_path: Path, prepared: PreparedTokenizer
) -> None:
    good = say("u:Hello", "a:Hi"), say("u:Hello", "a:No")
    null = say("u:Hello", "a:Hi"), [*say("u:Hello"), {"role": "assistant", "content": None}]
    words = " ".join(["word"] * 60)
    uneven = say(f"u:{words}", "a:Hi"), say(f"u:{words}", "a:" + " ".join(["no"] * 12))
    dataset = write(tmp_path / "data", [good, null, uneven])
    config = TokenizationConfig(max_length=160, max_truncated_fraction=0.9)
    counts = tokenize_dataset(dataset, prepared, tmp_path / "tokens", config)
    assert counts.rows_rejected == {"null_content": 2, "prompt_too_long": 2}
    details = pl.read_parquet(tmp_path / "tokens" / "rejects.parquet")["detail"].to_list()
    assert details[0].startswith("in the rejected answer: message 2: the content of a trained answer is null")
    assert "its two prompts were cut at different places" in details[1]
    strict = config.model_copy(update={"max_truncated_fraction": 0.1})
    with pytest.raises(TokenizationError, match=r"1 of 2 training examples \(50\.0%\) had to be cut or rejected"):
        tokenize_dataset(dataset, prepared, tmp_path / "again", strict)


def test_a_pair_whose_answers_become_the_same_tokens_is_refused(tmp_path: Path) -> None:
    make_tokenizer(CHATML.replace("m.content", "m.content.strip()")).save_pretrained(str(tmp_path / "model"))
    prepared = prepare_tokenizer(tmp_path / "model", None)
    good = say("u:Hello", "a:Hi"), say("u:Hello", "a:No")
    spaced = say("u:Hello", "a:Hi"), say("u:Hello", "a:Hi  ")
    late = tuple(say("u:Hello", "a:" + " ".join(["no"] * 60) + end) for end in (" yes", " never"))
    dataset = write(tmp_path / "data", [good, spaced, (late[0], late[1])])
    config = TokenizationConfig(max_length=64, truncation="cut_answer", max_truncated_fraction=1)
    counts = tokenize_dataset(dataset, prepared, tmp_path / "tokens", config)
    assert (counts.rows_train, counts.num_examples) == (1, 1)
    assert counts.rows_rejected == {"same_answers": 4}
    details = pl.read_parquet(tmp_path / "tokens" / "rejects.parquet")["detail"].to_list()
    assert details[0].startswith("the chat template writes both answers alike")
    assert details[1] == "cut to tokenization.max_length = 64, both answers are the same: raise it"


def test_pairs_that_contradict_each_other_are_counted_and_named(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    hi, no, yes = say("u:Hello", "a:Hi"), say("u:Hello", "a:No"), say("u:Hello", "a:Yes")
    elsewhere = say("u:Bye", "a:No"), say("u:Bye", "a:Hi")
    dataset = write(tmp_path / "data", [(hi, no), (yes, no), (no, hi), elsewhere, (hi, yes)])
    counts = tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())
    assert counts.num_examples == 5
    (told,) = [warning for warning in counts.warnings if "contradict" in warning]
    assert told.startswith("2 pairs contradict each other")
    assert f"example_id {0:032d}, {2:032d})" in told
    agreeing = write(tmp_path / "agreeing", [(hi, no), (yes, no), (hi, yes)])
    counts = tokenize_dataset(agreeing, prepared, tmp_path / "others", TokenizationConfig())
    assert not [warning for warning in counts.warnings if "contradict" in warning]
