from pathlib import Path

import datasets
import polars as pl
import pytest

from schemas.config import DataConfig, DatasetConfig
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError
from tasks.ingestion.sources.sources import digest_source, find_sources


def _locate(config: DataConfig) -> list[Path]:
    return [file.path for dataset in config.datasets for source in find_sources(dataset) for file in source.files]


def _locate_held_out(config: DataConfig) -> list[Path]:
    held_out = config.held_out_dataset
    return [] if held_out is None else [file.path for source in find_sources(held_out) for file in source.files]


def find_kinds(source: Path) -> dict[str, str]:
    return {file.name: file.kind for file in find_sources(DatasetConfig(source=str(source)))[0].files}


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", b"", "json"),
        ("a.JSONL", b"", "jsonl"),
        ("a.ndjson", b"", "jsonl"),
        ("a.csv", b"", "csv"),
        ("a.tsv", b"", "tsv"),
        ("a.parquet", b"", "parquet"),
        ("a.arrow", b"", "arrow"),
        ("data.json.demo", b"", "json"),
        ("unnamed", b"PAR1....", "parquet"),
        ("unnamed", b"ARROW1....", "arrow"),
        ("unnamed", b'\xef\xbb\xbf  {"a": 1}', "json"),
    ],
)
def test_kind_of_a_file_is_told_by_its_ending_or_else_by_its_first_bytes(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert find_kinds(tmp_path / name) == {name: kind}


def test_folder_gives_its_dataset_files_by_path_and_says_what_it_left_out(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "sub/c.parquet", "README.md", "dataset_info.json", ".hidden/d.json", "e.json.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (source,) = find_sources(DatasetConfig(source=str(tmp_path)))
    assert [file.name for file in source.files] == ["a.csv", "b.jsonl", "sub/c.parquet"]
    assert source.warnings == ("no rows, and not read: 3 files of the folder: README.md, dataset_info.json, e.json.gz",)


@pytest.mark.parametrize("name", ["test.jsonl", "validation-00000-of-00001.parquet", "eval/rows.json"])
def test_folder_warns_of_held_out_files_read_among_the_others(tmp_path: Path, name: str) -> None:
    for file in ("train.jsonl", name):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (warning,) = find_sources(DatasetConfig(source=str(tmp_path)))[0].warnings
    assert warning.startswith(f"{name}: named like held-out data")
    assert "data.eval_source" in warning


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/no/such/folder", "a/b/c", "org/rows.parquet", "~/missing", "rows.csv.gz"]
)
def test_missing_path_is_named_and_never_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(DataError, match="no such file or folder") as caught:
        _locate(DataConfig(source=name))
    assert str(caught.value).startswith(f"{name}: ")


def test_name_that_neither_disk_nor_hub_knows_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"neither a file or folder .* nor a readable dataset of the hub") as caught:
        _locate(DataConfig(source="no-such-org/no-such-dataset", revision="abc123"))
    assert "split train, revision abc123" in str(caught.value)


def fill_hub_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, *splits: str) -> None:
    """Leave org/rows in the cache as the library does after a download; it is made with the library itself."""
    (folder / "files").mkdir()
    for split in splits:
        lines = [f'{{"prompt": "{split} {number}", "completion": "b"}}\n' for number in range(3)]
        (folder / "files" / f"{split}.jsonl").write_text("".join(lines))
    cache = folder / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.load_dataset(str(folder / "files"), cache_dir=str(cache))
    built = next(cache.rglob("*-train.arrow")).parent
    target = cache / "org___rows" / "default" / "0.0.0" / ("0" * 40)
    target.parent.mkdir(parents=True)
    built.rename(target)
    for file in target.glob("*.arrow"):
        file.rename(target / f"rows-{file.stem.rpartition('-')[2]}.arrow")


def test_hub_dataset_in_the_local_cache_is_read_from_its_arrow_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_hub_cache(tmp_path, monkeypatch, "train")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (path,) = _locate(DataConfig(source="org/rows"))
    assert path.name == "rows-train.arrow"
    assert _locate(DataConfig(source="org/rows", revision="0" * 40)) == [path]
    with pytest.raises(DataError, match=f"has commit {'0' * 40} and data.revision is {'1' * 40}"):
        _locate(DataConfig(source="org/rows", revision="1" * 40))


def test_held_out_split_of_the_same_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_hub_cache(tmp_path, monkeypatch, "train", "test")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = DataConfig(source="org/rows", eval_source="org/rows", eval_split="test")
    assert [path.name for path in _locate(config)] == ["rows-train.arrow"]
    assert [path.name for path in _locate_held_out(config)] == ["rows-test.arrow"]
    assert build_dataset(config, seed=0, folder=tmp_path / "out") == DatasetCounts(6, 3, 3, {}, 0, 0)
    held_out = pl.read_parquet(tmp_path / "out" / "eval.parquet")
    assert all('"content": "test ' in messages for messages in held_out["messages"])
    assert set(held_out["source"]) == {"org/rows/rows-test.arrow"}


def test_unknown_and_compressed_files_and_empty_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("hello")
    with pytest.raises(DataError, match=r"known endings are .*\.parquet"):
        _locate(DataConfig(source=str(tmp_path / "notes")))
    (tmp_path / "rows.csv.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="unpack it"):
        _locate(DataConfig(source=str(tmp_path / "rows.csv.gz")))
    with pytest.raises(DataError, match="holds no dataset file"):
        _locate(DataConfig(source=str(tmp_path)))


def test_hub_split_with_a_slice_is_refused_before_any_download() -> None:
    with pytest.raises(DataError, match=r"train\[:10\].*data\.max_rows"):
        _locate(DataConfig(source="org/name", split="train[:10]"))


def test_eval_source_has_its_own_files(tmp_path: Path) -> None:
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).touch()
    config = DataConfig(source=str(tmp_path / "train.jsonl"), eval_source=str(tmp_path / "eval.jsonl"))
    assert _locate(config) == [tmp_path / "train.jsonl"]
    assert _locate_held_out(config) == [tmp_path / "eval.jsonl"]
    assert _locate_held_out(DataConfig(source="x")) == []


def test_digest_follows_names_and_contents_and_not_the_place(tmp_path: Path) -> None:
    def digest(folder: str, name: str, content: str, eval_content: str | None = None) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(content)
        held_out = None
        if eval_content is not None:
            held_out = tmp_path / folder / "held_out.json"
            held_out.write_text(eval_content)
        source = str(tmp_path / folder / name)
        return digest_source(DataConfig(source=source, eval_source=None if held_out is None else str(held_out)))

    def digest_mixture(*names: str) -> str:
        sources = [{"source": str(tmp_path / name)} for name in names]
        return digest_source(DataConfig(source=str(tmp_path / "one" / "a.json"), mixture=sources))

    first = digest("one", "a.json", "[1]")
    assert len(first) == 64
    assert digest("two", "a.json", "[1]") == first
    others = [digest("three", "b.json", "[1]"), digest("four", "a.json", "[2]"), digest("five", "a.json", "[1]", "[3]")]
    others += [digest_mixture("one/a.json"), digest_mixture("three/b.json"), digest_mixture("four/a.json")]
    assert digest_mixture() == first
    assert digest_mixture("two/a.json") == others[3]
    assert len({first, *others}) == 7
