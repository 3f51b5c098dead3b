"""Rows that begin with the same exchange come from one conversation."""

import json
from pathlib import Path

import polars as pl

from schemas.config import EvaluationConfig
from tasks.evaluation.comparison import compare
from tasks.evaluation.conversations import find_conversations
from tests.tasks.evaluation.test_comparison import make_rows


def _talk(*turns: str) -> str:
    roles = ("user", "assistant")
    return json.dumps([{"role": roles[at % 2], "content": turn} for at, turn in enumerate(turns)])


def test_a_conversation_that_is_there_once_for_each_turn_is_one(tmp_path: Path) -> None:
    talks = [_talk("hi", "yes?"), _talk("hi", "yes?", "how?", "so."), _talk("hi", "no."), _talk("bye", "yes?")]
    ids = [f"{at:016x}" for at in range(4)]
    pl.DataFrame({"example_id": ids, "messages": talks}).write_parquet(tmp_path / "eval.parquet")
    found = find_conversations(tmp_path / "eval.parquet")
    assert found[ids[0]] == found[ids[1]]
    assert len(set(found.values())) == 3


def test_rows_of_one_conversation_are_drawn_together() -> None:
    # Each row four times under ids of its own: as certain as once when told that they are one, surer when not.
    exact = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1]
    many = [value for value in exact for _ in range(4)]
    before, after = make_rows([0] * 40), make_rows(many)
    one = {example: str(at // 4) for at, example in enumerate(before["example_id"])}
    config = EvaluationConfig(num_resamples=500)
    single = compare(make_rows([0] * 10), make_rows(exact), config, seed=1)
    grouped = compare(before, after, config, seed=1, conversations=one)
    apart = compare(before, after, config, seed=1)
    assert (grouped.num_conversations, grouped.num_examples, apart.num_conversations) == (10, 40, 40)
    assert grouped.delta["exact_match"] == single.delta["exact_match"]
    assert apart.delta["exact_match"].ci_low > grouped.delta["exact_match"].ci_low
