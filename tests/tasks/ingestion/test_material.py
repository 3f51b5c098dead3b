"""Datasets that nobody here wrote: every row is kept, but for copies and leaks."""

import json
from pathlib import Path

import polars as pl
import pytest

from schemas.config import DataConfig
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.dataset import build_dataset


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("jieshen/data.json.demo", DatasetCounts(5, 4, 1, {}, 0, 0)),
        ("tinker", DatasetCounts(128, 115, 13, {}, 0, 0)),
        ("llamafactory", DatasetCounts(1391, 1213, 135, {}, 43, 0)),
        ("llamafactory/identity.json", DatasetCounts(91, 82, 9, {}, 0, 0)),
        ("llamafactory/glaive_toolcall_en_demo.json", DatasetCounts(300, 239, 26, {}, 35, 0)),
    ],
)
def test_counts(material: Path, tmp_path: Path, name: str, counts: DatasetCounts) -> None:
    assert build_dataset(DataConfig(source=str(material / name)), seed=0, folder=tmp_path) == counts


def test_gpteacher_has_its_answers_under_response_and_one_row_with_a_further_column(
    material: Path, tmp_path: Path
) -> None:
    counts = build_dataset(DataConfig(source=str(material / "gpteacher")), seed=0, folder=tmp_path)
    assert (counts.rows_in, counts.rows_eval, counts.rows_rejected, counts.rows_duplicate) == (14131, 1000, {}, 0)
    quality = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert quality["not_read"] == {"column example_input": 1}
    assert {file["columns"]["output"] for file in quality["files"]} == {"response"}


def test_placeholders_are_kept_word_for_word(material: Path, tmp_path: Path) -> None:
    build_dataset(DataConfig(source=str(material / "llamafactory" / "identity.json")), seed=0, folder=tmp_path)
    answers = [json.loads(text)[-1]["content"] for text in pl.read_parquet(tmp_path / "train.parquet")["messages"]]
    rows = json.loads((material / "llamafactory" / "identity.json").read_text(encoding="utf-8"))
    assert set(answers) <= {row["output"] for row in rows}
    assert any("{{name}}" in answer for answer in answers)


def test_sharegpt_tool_calls_become_calls_with_arguments_as_objects(material: Path, tmp_path: Path) -> None:
    source = material / "llamafactory" / "glaive_toolcall_en_demo.json"
    build_dataset(DataConfig(source=str(source)), seed=0, folder=tmp_path)
    frame = pl.concat([pl.read_parquet(tmp_path / f"{side}.parquet") for side in ("train", "eval")])
    messages = [message for text in frame["messages"] for message in json.loads(text)]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    # Of 300 rows 265 differ; these have 193 of the 211 calls, and 172 of them have tools.
    assert len(calls) == 193
    assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
    assert sum(message["role"] == "tool" for message in messages) == 193
    assert frame["tools"].is_not_null().sum() == 172
