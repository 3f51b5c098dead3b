import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import TokenizationConfig
from tasks.models import load_tokenizer
from tasks.tokenization.examples import TokenizationError, tokenize_dataset
from tasks.tokenization.masking import MaskError, build_examples
from tasks.tokenization.rendering import open_chat, plain_messages
from tasks.tokenization.templates import PreparedTokenizer, prepare_tokenizer
from tasks.training.table_writer import write_examples
from tasks.training.token_table import open_table
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import CONVERSATIONS, call, say


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedTokenizer:
    make_tokenizer(CHATML).save_pretrained(str(tmp_path / "model"))
    return prepare_tokenizer(tmp_path / "model", None)


def write(folder: Path, train: list[Any], held_out: list[Any]) -> Path:
    """Write a dataset of conversations, each a list of messages."""
    folder.mkdir()
    for part, conversations in (("train", train), ("eval", held_out)):
        rows = [
            (f"{part}{number:016d}", "data.jsonl", number + 1, json.dumps(messages, ensure_ascii=False), None, None)
            for number, messages in enumerate(conversations)
        ]
        names = ["example_id", "source", "line", "messages", "tools", "rejected"]
        types = [pl.String, pl.String, pl.Int64, pl.String, pl.String, pl.String]
        frame = pl.DataFrame(rows, schema=dict(zip(names, types, strict=True)), orient="row")
        frame.write_parquet(folder / f"{part}.parquet")
    return folder


def test_every_row_becomes_examples_or_a_reject_and_the_files_say_so(
    tmp_path: Path, prepared: PreparedTokenizer
) -> None:
    plain = [messages for name, (messages, tools) in CONVERSATIONS.items() if tools is None and name != "reasoning"]
    train = [*plain, say("a:Nobody asked."), [*say("u:q"), call({"city": "Rome"})]]
    dataset = write(tmp_path / "data", train, [say("u:Hello", "a:Hi"), say("u:q")])
    config = TokenizationConfig(max_length=8192)
    counts = tokenize_dataset(dataset, prepared, tmp_path / "tokens", config)
    assert (counts.rows_train, counts.rows_eval) == (len(plain), 1)
    assert counts.rows_rejected == {"no_prompt": 1, "dropped_tool_calls": 1, "no_trained_tokens": 1}
    frame = pl.read_parquet(tmp_path / "tokens" / "train.parquet")
    assert frame.height == counts.num_examples
    assert frame.schema["input_ids"] == pl.List(pl.Int32)
    assert counts.total_tokens == frame["input_ids"].list.len().sum()
    expected = [
        example for messages in plain for example in build_examples(messages, prepared.tokenizer, config=config)
    ]
    assert frame["input_ids"].to_list() == [example.input_ids for example in expected]
    assert frame["labels"].to_list() == [example.labels for example in expected]
    rejects = pl.read_parquet(tmp_path / "tokens" / "rejects.parquet")
    assert rejects.select("line", "reason").rows() == [
        (len(plain) + 1, "no_prompt"),
        (len(plain) + 2, "dropped_tool_calls"),
        (2, "no_trained_tokens"),
    ]


def test_question_and_reference_are_those_of_the_last_answer(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    messages = say("u:Hello", "a:Hi", "u:Why?", "a:Because.\n")
    dataset = write(tmp_path / "data", [messages], [messages])
    tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())
    frame = pl.read_parquet(tmp_path / "tokens" / "eval.parquet")
    assert frame.select("question", "reference").row(0) == ("Why?", "Because.\n")


def test_the_held_out_part_never_trains_the_prompt(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    dataset = write(tmp_path / "data", [say("u:q", "a:x")], [say("u:q", "a:x")])
    tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig(train_on_prompt=True))
    assert -100 not in pl.read_parquet(tmp_path / "tokens" / "train.parquet")["labels"][0]
    assert -100 in pl.read_parquet(tmp_path / "tokens" / "eval.parquet")["labels"][0]


def test_the_mask_report_counts_what_a_person_has_to_know(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    train = [say("u:q", "a:<|im_end|>"), say("u:" + "word " * 400, "a:x"), say("u:q", "a:x")]
    dataset = write(tmp_path / "data", train, [say("u:q", "a:x")])
    config = TokenizationConfig(max_length=64, max_truncated_fraction=0.5)
    counts = tokenize_dataset(dataset, prepared, tmp_path / "tokens", config)
    assert [warning for warning in counts.warnings if "cut" in warning] == [
        "1 of 3 training examples had to be cut to 64 tokens (their prompts): raise tokenization.max_length, where the "
        "model has positions for more, to keep them whole"
    ]
    report = json.loads((tmp_path / "tokens" / "masks.json").read_text(encoding="utf-8"))
    train_report = report["train"]
    assert (train_report["num_literals"], train_report["num_truncated"]) == (1, 1)
    assert train_report["share_ending_in_end_of_turn"] == 1.0
    assert train_report["samples"][2] == [
        {"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "trained": False},
        {"text": "x<|im_end|>", "trained": True},
    ]
    assert report["template_digest"] == prepared.template_digest


def test_the_shipped_tokenizer_gives_the_same_prompt(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    messages = say("u:Hello", "a:Hi")
    dataset = write(tmp_path / "data", [messages], [messages])
    tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())
    shipped = load_tokenizer(tmp_path / "tokens" / "tokenizer")
    ids: Any = shipped.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    trained = pl.read_parquet(tmp_path / "tokens" / "train.parquet")["input_ids"][0].to_list()
    assert trained[: len(ids)] == ids
    stops = json.loads((tmp_path / "tokens" / "tokenizer" / "generation_config.json").read_text(encoding="utf-8"))
    assert stops["eos_token_id"] == list(prepared.stop_token_ids)


def test_too_many_long_rows_fail_the_run(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    dataset = write(tmp_path / "data", [say("u:" + "word " * 400, "a:x"), say("u:q", "a:x")], [say("u:q", "a:x")])
    with pytest.raises(TokenizationError, match=r"1 of 2 training examples \(50\.0%\).*max_truncated_fraction is 10"):
        tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig(max_length=64))


def test_a_dataset_of_which_nothing_is_left_fails_with_the_reasons(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    dataset = write(tmp_path / "data", [say("u:q")], [])
    with pytest.raises(TokenizationError, match=r"no training example is left \(no_trained_tokens: 1\).*line 1"):
        tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())


def test_labels_weigh_what_their_answers_do(tmp_path: Path, prepared: PreparedTokenizer) -> None:
    def weigh(messages: list[Any], **weights: float) -> list[Any]:
        return [
            {**message, "weight": weights[f"m{n}"]} if f"m{n}" in weights else message
            for n, message in enumerate(messages)
        ]

    chat = say("u:One", "a:First", "u:Two", "a:Second")
    train = [chat, weigh(chat, m1=0.5), weigh(chat, m1=0.5, m3=0.25)]
    dataset = write(tmp_path / "data", train, [say("u:Hello", "a:Hi")])
    tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())
    frame = pl.read_parquet(tmp_path / "tokens" / "train.parquet")
    assert len(set(map(tuple, frame["input_ids"].to_list()))) == 1
    # No template sees a weight, also one that writes all keys of a message.
    assert plain_messages(open_chat(prepared.tokenizer, None), [{**chat[1], "weight": 0.5, "train": True}]) == [chat[1]]
    first, second = build_examples(chat, prepared.tokenizer)[0].spans
    labels = frame["labels"].to_list()
    assert labels[0] == labels[1] == labels[2]
    found = frame["weights"].to_list()
    assert found[0] is None
    for weights, (one, two) in ((found[1], (0.5, 1.0)), (found[2], (0.5, 0.25))):
        wanted = [0.0] * len(labels[0])
        wanted[slice(*first)] = [one] * (first[1] - first[0])
        wanted[slice(*second)] = [two] * (second[1] - second[0])
        assert weights == wanted
    write_examples(tmp_path / "tokens" / "train.parquet", tmp_path / "table")
    table = open_table(tmp_path / "table")
    assert table.weights is not None
    trained = table.targets >= 0
    assert sorted(set(table.weights[trained].tolist())) == [0.25, 0.5, 1.0]
    assert table.weights[: table.offsets[1]][trained[: table.offsets[1]]].min() == 1.0
    write_examples(tmp_path / "tokens" / "eval.parquet", tmp_path / "table")
    assert open_table(tmp_path / "table").weights is None


def test_one_weight_for_a_prompt_that_is_trained(prepared: PreparedTokenizer) -> None:
    chat = say("u:One", "a:First", "u:Two", "a:Second")
    chat[1]["weight"] = 0.5
    config = TokenizationConfig(train_on_prompt=True)
    with pytest.raises(MaskError, match="different weights"):
        build_examples(chat, prepared.tokenizer, config=config)
    chat[3]["weight"] = 0.5
    assert len(build_examples(chat, prepared.tokenizer, config=config)[0].spans) == 1
    chat[3]["weight"] = 1.5
    with pytest.raises(MaskError, match=r"weight is 1.5, above 0 and at most 1 is wanted"):
        build_examples(chat, prepared.tokenizer)
