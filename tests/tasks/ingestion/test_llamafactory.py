import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import DataConfig, DatasetConfig
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError
from tasks.ingestion.rows.messages import alternate_strictly
from tasks.ingestion.sources.sources import digest_source, find_sources


def write_index(folder: Path, index: Any, **files: Any) -> str:
    (folder / "dataset_info.json").write_text(json.dumps(index), encoding="utf-8")
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(folder / "dataset_info.json")


def read(source: str, folder: Path, **settings: Any) -> tuple[DatasetCounts, list[list[tuple[str, str]]], Any]:
    """Build; return the counts, all conversations as (role, content) pairs, and the quality report."""
    config = DataConfig(source=source, eval_fraction=0.5, max_rejected_fraction=1.0, **settings)
    counts = build_dataset(config, seed=0, folder=folder / "out")
    frame = pl.concat([pl.read_parquet(folder / "out" / f"{side}.parquet") for side in ("train", "eval")])
    conversations = [
        [(message["role"], message["content"]) for message in json.loads(text)]
        for text in frame.sort("source", "line")["messages"]
    ]
    return counts, conversations, json.loads((folder / "out" / "quality.json").read_text(encoding="utf-8"))


def test_names_behind_the_index_choose_its_entries_and_their_formats(tmp_path: Path) -> None:
    source = write_index(
        tmp_path,
        {
            "one": {"file_name": "one.json"},
            "two": {"file_name": "two.json", "formatting": "sharegpt"},
            "three": {"file_name": "three.json"},
        },
        one=[{"instruction": "a", "input": "b", "output": "c", "system": "not read"}],
        two=[{"conversations": [{"from": "human", "value": "d"}, {"from": "gpt", "value": "e"}]}],
        three=[],
    )
    counts, conversations, quality = read(f"{source}#one, two", tmp_path)
    assert counts.rows_in == 2
    assert conversations == [[("user", "a\nb"), ("assistant", "c")], [("user", "d"), ("assistant", "e")]]
    assert quality["not_read"] == {"column system": 1}
    assert [file["name"] for file in quality["files"]] == ["one/one.json", "two/two.json"]


def test_columns_that_are_given_have_no_defaults_beside_them(tmp_path: Path) -> None:
    rows = [{"q": f"a{number}", "input": "x", "a": "b", "s": "c"} for number in range(2)]
    columns = {"prompt": "q", "response": "a", "system": "s"}
    source = write_index(tmp_path, {"one": {"file_name": "rows.json", "columns": columns}}, rows=rows)
    _, conversations, quality = read(source, tmp_path)
    assert conversations[0] == [("system", "c"), ("user", "a0"), ("assistant", "b")]
    assert "not read: column input (2 times)" in quality["warnings"]


def test_tags_without_a_system_tag_keep_the_rows_and_warn(tmp_path: Path) -> None:
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "kunde", "assistant_tag": "wir"}
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "chat"}, "tags": tags}
    question, answer = {"who": "kunde", "text": "a"}, {"who": "wir", "text": "b"}
    rows = [
        {"chat": [{"who": "system", "text": "s"}, question, answer]},
        {"chat": [{"who": "kunde", "text": "c"}, answer]},
        {"chat": [{"who": "kunde", "text": "d"}, answer, answer]},
    ]
    source = write_index(tmp_path, {"one": entry}, rows=rows)
    _, conversations, quality = read(source, tmp_path)
    assert len(conversations) == 3
    assert conversations[0][0] == ("system", "s")
    assert any("no system_tag" in warning for warning in quality["warnings"])
    assert any("1 row is kept here whose turns do not alternate" in warning for warning in quality["warnings"])


def test_turns_that_alternate_strictly() -> None:
    def spell(letters: str) -> list[dict[str, Any]]:
        names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
        return [{"role": names[letter], "content": "x"} for letter in letters]

    assert all(alternate_strictly(spell(text)) for text in ("ua", "sua", "uata", "uaua"))
    assert not any(alternate_strictly(spell(text)) for text in ("uaa", "uatta", "u"))


def test_num_samples_are_chosen_by_the_seed_and_accounted_for(tmp_path: Path) -> None:
    rows: list[Any] = [{"instruction": f"q{number}", "input": "", "output": "a"} for number in range(100)]
    rows += [{"instruction": "q", "input": "", "output": ""}] * 50
    source = write_index(tmp_path, {"one": {"file_name": "rows.json", "num_samples": 30}}, rows=rows)
    counts, first, _ = read(source, tmp_path)
    assert counts.rows_in == 30
    assert 0 < counts.rows_rejected["empty_answer"] < 30
    assert read(source, tmp_path)[1] == first
    source = write_index(tmp_path, {"one": {"file_name": "rows.json", "num_samples": 300}}, rows=rows)
    counts, _, quality = read(source, tmp_path)
    assert (counts.rows_in, counts.rows_duplicate) == (150, 0)
    assert any("each is taken once" in warning for warning in quality["warnings"])


def test_held_out_entry_is_another_name_of_the_index(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{number}", "input": "", "output": "a"} for number in range(10)]
    index = {"train": {"file_name": "train.json"}, "dev": {"file_name": "dev.json"}}
    source = write_index(tmp_path, index, train=rows[:8], dev=rows[6:])
    counts, _, _ = read(f"{source}#train", tmp_path, eval_source=f"{source}#dev")
    assert counts == DatasetCounts(12, 6, 4, {}, 0, rows_leaked=2)


def test_digest_follows_the_entry(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "input": "", "output": "a"}]
    source = write_index(tmp_path, {"one": {"file_name": "rows.json"}}, rows=rows)
    before = digest_source(DataConfig(source=source))
    write_index(tmp_path, {"one": {"file_name": "rows.json"}, "other": {"file_name": "gone.json"}})
    assert digest_source(DataConfig(source=f"{source}#one")) == before
    write_index(tmp_path, {"one": {"file_name": "rows.json", "num_samples": 1}})
    assert digest_source(DataConfig(source=source)) != before


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": "gone.json"}, "gone.json is missing"),
        ({"file_name": "rows.json", "ranking": True}, "preference dataset"),
        ({"file_name": "rows.json", "columns": {"messages": "m", "images": "images"}}, "only text"),
        ({"script_url": "code"}, "neither file_name nor hf_hub_url"),
        ({"file_name": "rows.json", "formatting": "chatml"}, "'chatml'"),
        ({"file_name": "rows.json", "columns": {"prompt": "q"}}, "do not name response.* response: output"),
        ({"file_name": "rows.json", "formatting": "sharegpt", "columns": {"system": "s"}}, "do not name messages"),
        ({"file_name": "rows.json", "num_samples": 0}, "num_samples is 0"),
    ],
)
def test_entry_that_cannot_be_trained_is_refused(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    source = write_index(tmp_path, {"one": entry}, rows=[])
    with pytest.raises(DataError, match=words) as caught:
        find_sources(DatasetConfig(source=source))
    assert "dataset_info.json#one: " in str(caught.value)


def test_index_without_such_a_name_lists_those_it_has(tmp_path: Path) -> None:
    source = write_index(tmp_path, {"one": {}, "two": {}})
    for name, words in ((f"{source}#three", "no dataset three in it"), (source, "several datasets in it")):
        with pytest.raises(DataError, match=f"{words}: write .*one, two"):
            find_sources(DatasetConfig(source=name))
    write_index(tmp_path, {"features": {}, "splits": [1]})
    with pytest.raises(DataError, match="give its folder"):
        find_sources(DatasetConfig(source=source))
    with pytest.raises(DataError, match="not a readable index"):
        find_sources(DatasetConfig(source="missing/dataset_info.json#one"))


def test_index_of_the_material(material: Path, tmp_path: Path) -> None:
    source = f"{material / 'llamafactory' / 'dataset_info.json'}#identity,alpaca_zh_demo,glaive_toolcall_en_demo"
    counts = build_dataset(DataConfig(source=source), seed=0, folder=tmp_path)
    assert counts == DatasetCounts(1391, 1213, 135, {}, rows_duplicate=43, rows_leaked=0)
