import json
import tempfile
from pathlib import Path
from typing import Any

import pandera.polars as pa
import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import DataConfig
from schemas.records import Conversations, Rejects
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import REASONS, DataError
from tasks.ingestion.pieces import CONVERSATION_SCHEMA
from tasks.ingestion.tables import write_table
from tests.tasks.ingestion.conftest import WriteLines


def ask(number: int) -> dict[str, Any]:
    return {"instruction": f"question {number}", "input": "", "output": f"answer {number}"}


def build(source: Path, folder: Path, seed: int = 0, **settings: Any) -> DatasetCounts:
    return build_dataset(DataConfig(source=str(source), **settings), seed=seed, folder=folder)


def read_quality(folder: Path) -> Any:
    return json.loads((folder / "quality.json").read_text(encoding="utf-8"))


def test_rows_become_validated_tables_and_every_row_is_accounted_for(tmp_path: Path, write_lines: WriteLines) -> None:
    rows = [ask(number) for number in range(1, 21)]
    rows[4] = {"instruction": "q", "input": "", "output": "  "}
    source = write_lines("rows.jsonl", [*rows, ask(1), "{broken", ask(2)])
    counts = build(source, tmp_path / "out", eval_fraction=0.2, max_rejected_fraction=0.1)
    assert counts == DatasetCounts(
        rows_in=23,
        rows_train=15,
        rows_eval=4,
        rows_rejected={"empty_answer": 1, "broken_json": 1},
        rows_duplicate=2,
        rows_leaked=0,
    )
    train, held_out = (pl.read_parquet(tmp_path / "out" / f"{side}.parquet") for side in ("train", "eval"))
    rejects = pl.read_parquet(tmp_path / "out" / "rejects.parquet")
    for frame, schema in ((train, Conversations), (held_out, Conversations), (rejects, Rejects)):
        schema.validate(frame)
    assert sorted([*train["line"], *held_out["line"]]) == [line for line in range(1, 21) if line != 5]
    assert rejects.select("source", "line", "reason", "raw").rows() == [
        ("rows.jsonl", 5, "empty_answer", '{"instruction": "q", "input": "", "output": "  "}'),
        ("rows.jsonl", 22, "broken_json", "{broken"),
    ]
    first = train.row(0, named=True)
    assert json.loads(first["messages"]) == [
        {"role": "user", "content": f"question {first['line']}"},
        {"role": "assistant", "content": f"answer {first['line']}"},
    ]
    assert (first["source"], first["tools"]) == ("rows.jsonl", None)
    quality = read_quality(tmp_path / "out")
    assert quality["counts"]["rows_in"] == 23
    assert quality["duplicates"] == ["rows.jsonl:21", "rows.jsonl:23"]


def test_same_input_gives_the_same_bytes(tmp_path: Path, write_lines: WriteLines) -> None:
    source = write_lines("rows.jsonl", [ask(number) for number in range(50)])
    for name in ("one", "two"):
        build(source, tmp_path / name, seed=3)
    for name in ("train.parquet", "eval.parquet", "rejects.parquet", "quality.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_separate_held_out_dataset_is_never_trained(tmp_path: Path, write_lines: WriteLines) -> None:
    source = write_lines("train.jsonl", [*(ask(number) for number in range(10)), {"prompt": "x"} | ask(3)])
    shout = {"instruction": " QUESTION 7", "output": "Answer  7"}
    held_out = write_lines("eval.jsonl", [ask(2), shout, ask(100), ask(100)])
    counts = build(source, tmp_path / "out", eval_source=str(held_out), eval_fraction=0.0)
    assert counts == DatasetCounts(15, 8, 3, {}, rows_duplicate=2, rows_leaked=2)
    assert read_quality(tmp_path / "out")["leaks"] == ["train.jsonl:3", "train.jsonl:8"]
    assert pl.read_parquet(tmp_path / "out" / "eval.parquet")["source"].unique().to_list() == ["eval.jsonl"]


def test_limits_of_rows(tmp_path: Path, write_lines: WriteLines) -> None:
    source = write_lines("rows.jsonl", [ask(number) for number in range(100)])
    assert build(source, tmp_path / "a", max_rows=40) == DatasetCounts(40, 36, 4, {}, 0, 0)
    assert pl.read_parquet(tmp_path / "a" / "train.parquet")["line"].max() == 40
    assert build(source, tmp_path / "b", eval_fraction=0.5, max_eval_rows=7) == DatasetCounts(100, 93, 7, {}, 0, 0)
    other = write_lines("other.jsonl", [ask(number) for number in range(200, 230)])
    assert build(source, tmp_path / "c", eval_source=str(other), max_eval_rows=7) == DatasetCounts(
        107, 100, 7, {}, 0, 0, rows_left_out=23
    )
    assert read_quality(tmp_path / "c")["counts"]["rows_read"] == 130


def test_max_rows_goes_over_the_files_of_a_folder(tmp_path: Path, write_lines: WriteLines) -> None:
    write_lines("rows/a.jsonl", [ask(number) for number in range(10)])
    write_lines("rows/b.jsonl", [{"prompt": f"p {number}", "completion": "c"} for number in range(10)])
    counts = build(tmp_path / "rows", tmp_path / "out", max_rows=15)
    assert counts.rows_in == 15
    files = read_quality(tmp_path / "out")["files"]
    assert [(file["name"], file["num_rows"], file["format"]) for file in files] == [
        ("a.jsonl", 10, "alpaca"),
        ("b.jsonl", 5, "prompt_completion"),
    ]


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "rows.arrow"])
def test_one_dataset_in_any_file_gives_the_same_conversations(tmp_path: Path, name: str) -> None:
    rows = [ask(number) for number in range(30)]
    frame = pl.DataFrame(rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    frame.write_csv(tmp_path / "rows.csv")
    frame.write_parquet(tmp_path / "rows.parquet")
    frame.write_ipc(tmp_path / "rows.arrow")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ids = []
    for file in ("rows.jsonl", name):
        build(tmp_path / file, tmp_path / "out")
        ids.append(pl.read_parquet(tmp_path / "out" / "eval.parquet")["example_id"].to_list())
    assert len(ids[0]) == 3
    assert ids[0] == ids[1]


def test_struct_columns_invent_no_arguments(tmp_path: Path) -> None:
    def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        return {
            "messages": [
                {"role": "user", "content": name, "tool_calls": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
                },
            ],
            "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}],
        }

    rows = [call("weather", {"city": "Bern"}), call("mail", {"to": "Ann", "text": "hi"})]
    pl.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tables = []
    for name in ("rows.json", "rows.parquet"):
        build(tmp_path / name, tmp_path / "out", eval_fraction=0.5)
        sides = [pl.read_parquet(tmp_path / "out" / f"{side}.parquet") for side in ("train", "eval")]
        tables.append(pl.concat(sides).drop("source").rows())
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["rows.jsonl: empty", "at least two rows"]),
        ([ask(1)], ["no row is left to evaluate", "1 rows read", "two different"]),
        ([ask(1), ask(1)], ["no row is left to", "1 copies"]),
        ([{"a": 1}], ["columns 'a' do not make any known format", "data.columns"]),
        (["[1"], ["no line is JSON", "broken JSON on line 1"]),
        (
            [ask(1), "{", ask(2)],
            ["1 of 3 rows (33.3%)", "broken_json", "rows.jsonl:2", "line 2, column 2", "1.0%"],
        ),
        ([{"instruction": "q", "output": " "}] * 5, ["5 of 5 rows (100.0%)", "5 x empty_answer", "rows.jsonl:1"]),
        ([{"instruction": "q", "output": None}, ask(1)], ["null_content", "output is null"]),
        ([{"messages": [{"role": "user", "content": "x"}]}], ["ends_with_user", "message 1, the last, is the user's"]),
        ([1, 2, 3], ["3 x not_an_object"]),
    ],
)
def test_bad_dataset_fails_with_one_readable_message(
    tmp_path: Path, write_lines: WriteLines, rows: list[Any], words: list[str]
) -> None:
    source = write_lines("rows.jsonl", rows) if rows else tmp_path / "rows.jsonl"
    source.touch()
    with pytest.raises(DataError) as caught:
        build(source, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)


def test_every_row_rejected_fails_whatever_the_budget(tmp_path: Path, write_lines: WriteLines) -> None:
    source = write_lines("rows.jsonl", [{"instruction": "q", "output": ""}] * 5)
    with pytest.raises(DataError, match=r"no row is left to train \(5 rows read, 5 rejected.*") as caught:
        build(source, tmp_path / "out", max_rejected_fraction=1.0)
    assert "5 x empty_answer" in str(caught.value)


def test_rejects_are_written_also_where_the_dataset_is_refused(tmp_path: Path, write_lines: WriteLines) -> None:
    source = write_lines("rows.jsonl", [ask(1), {"instruction": "q", "output": ""}])
    with pytest.raises(DataError):
        build(source, tmp_path / "out")
    assert pl.read_parquet(tmp_path / "out" / "rejects.parquet")["reason"].to_list() == ["empty_answer"]


def test_held_out_side_must_not_be_empty(tmp_path: Path, write_lines: WriteLines) -> None:
    source = write_lines("rows.jsonl", [ask(1), ask(2)])
    with pytest.raises(DataError, match=r"no row is left to train .*2 leaked"):
        build(source, tmp_path / "out", eval_source=str(source))


def test_all_rows_are_trained_where_nothing_is_held_out(tmp_path: Path, write_lines: WriteLines) -> None:
    source = write_lines("rows.jsonl", [ask(1), ask(2), ask(3)])
    counts = build(source, tmp_path / "out", eval_fraction=0.0)
    assert (counts.rows_in, counts.rows_train, counts.rows_eval) == (3, 3, 0)
    assert pl.read_parquet(tmp_path / "out" / "eval.parquet").height == 0
    one = write_lines("one.jsonl", [ask(1)])
    assert build(one, tmp_path / "one", eval_fraction=0.0).rows_train == 1
    with pytest.raises(DataError, match=r"no row is left to evaluate .*at least two different usable conversations"):
        build(one, tmp_path / "two")
    none = write_lines("none.jsonl", [{"instruction": "q", "output": ""}])
    with pytest.raises(DataError, match=r"no row is left to train .*at least one usable conversation"):
        build(none, tmp_path / "none", eval_fraction=0.0, max_rejected_fraction=1.0)


def test_pandera_sees_every_row(tmp_path: Path) -> None:
    row = ("0" * 32, "a.json", 1, "[]", None, None)
    good = pl.DataFrame([row] * 25_000, schema=CONVERSATION_SCHEMA, orient="row")
    write_table([good[:7], good[7:]], CONVERSATION_SCHEMA, Conversations, tmp_path / "good.parquet")
    groups = pq.ParquetFile(tmp_path / "good.parquet").metadata
    assert [groups.row_group(place).num_rows for place in range(3)] == [10_000, 10_000, 5_000]
    for place in (0, 12_500, 24_999):
        bad = good.with_columns(line=pl.when(pl.int_range(pl.len()) == place).then(0).otherwise(1).cast(pl.Int64))
        with pytest.raises(AssertionError, match=r"bad\.parquet breaks its schema"):
            write_table([bad], CONVERSATION_SCHEMA, Conversations, tmp_path / "bad.parquet")
        assert not (tmp_path / "bad.parquet").exists()
        with pytest.raises(pa.errors.SchemaError):
            Conversations.validate(bad)


def test_counts_that_do_not_add_up_are_no_counts() -> None:
    with pytest.raises(AssertionError, match="do not add up"):
        DatasetCounts(10, 5, 1, {"not_text": 1}, 1, 1)


TEXT = st.one_of(st.sampled_from(["", " ", "a", "A ", "b", None, 1]), st.text(max_size=5))
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "x"]), "content": TEXT}
)
ROW = st.one_of(
    st.fixed_dictionaries({"instruction": TEXT, "input": TEXT, "output": TEXT}),
    st.fixed_dictionaries({"instruction": TEXT}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=5)}),
    st.integers(),
    st.none(),
)
LINE = st.one_of(ROW.map(json.dumps), st.sampled_from(["{", "]", '{"instruction": "\\ud800", "output": "x"}', "nan"]))


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(LINE, max_size=25), held_out=st.one_of(st.none(), st.lists(LINE, max_size=8)))
def test_rows_in_are_all_accounted_for_whatever_the_rows(lines: list[str], held_out: list[str] | None) -> None:
    good = [json.dumps(ask(number)) for number in range(3)]
    other = [json.dumps(ask(number)) for number in range(10, 12)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("\n".join([*good, *lines]))
        settings: dict[str, Any] = {"max_rejected_fraction": 1.0, "eval_fraction": 0.3}
        if held_out is not None:
            (folder / "eval.jsonl").write_text("\n".join([*other, *held_out]))
            settings["eval_source"] = str(folder / "eval.jsonl")
        counts = build(folder / "rows.jsonl", folder / "out", format="alpaca", **settings)
        tables = {name: pl.read_parquet(folder / "out" / f"{name}.parquet") for name in ("train", "eval", "rejects")}
    assert counts.rows_read == 3 + len(lines) + (0 if held_out is None else 2 + len(held_out))
    assert (tables["train"].height, tables["eval"].height) == (counts.rows_train, counts.rows_eval)
    assert tables["rejects"].height == sum(counts.rows_rejected.values())
    assert counts.rows_rejected.keys() <= REASONS.keys()
    ids = [*tables["train"]["example_id"], *tables["eval"]["example_id"]]
    assert len(ids) == len(set(ids))
