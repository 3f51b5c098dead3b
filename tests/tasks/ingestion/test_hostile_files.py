"""One row, one value or one file never gives a traceback, a hang or a dead process: a reject, or an error by name."""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from schemas.config import DataConfig
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError
from tasks.ingestion.rows import messages
from tasks.ingestion.sources import json_files
from tasks.ingestion.sources.files import SourceFile
from tasks.ingestion.sources.readers import read_rows
from tasks.ingestion.sources.sources import find_sources
from tests.tasks.ingestion.conftest import WriteLines

GOOD = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(4)]


def reject(tmp_path: Path, source: Path) -> dict[str, int]:
    """Return what is rejected of a dataset of which GOOD is a part."""
    config = DataConfig(source=str(source), max_rejected_fraction=1.0)
    counts = build_dataset(config, seed=0, folder=tmp_path / "out")
    assert counts.rows_train + counts.rows_eval == len(GOOD)
    return counts.rows_rejected


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_line_longer_than_is_read_is_one_rows_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(json_files, "MOST_LINE_BYTES", 2000)
    monkeypatch.setattr(json_files, "READ_BYTES", 700)
    long = [json.dumps({"prompt": "x" * size, "completion": "y"}) for size in (1940, 2000, 2700, 9000, 30_000)]
    exact = json.dumps({"prompt": "x" * 1966, "completion": "y"})
    assert len(exact) == 2000 - len("\n")
    lines = [json.dumps(GOOD[0]), long[1], json.dumps(GOOD[1]), *long[2:4], json.dumps(GOOD[2]), exact, long[4]]
    text = "\n".join([*lines[:-1], "", json.dumps(GOOD[3]), lines[-1]]).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    config = DataConfig(source=str(tmp_path / name), max_rejected_fraction=1.0)
    counts = build_dataset(config, seed=0, folder=tmp_path / "out")
    assert counts.rows_rejected == {"too_large": 4}
    assert (counts.rows_in, counts.rows_train + counts.rows_eval) == (9, 5)
    rejects = pl.concat([pl.read_parquet(file) for file in (tmp_path / "out").glob("*reject*.parquet")])
    assert sorted(rejects["line"].to_list()) == [2, 4, 5, 10]


def test_a_conversation_longer_than_is_read_is_one_rows_reject(
    tmp_path: Path, write_lines: WriteLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MOST_CHARACTERS", 1000)
    long = {"prompt": "x" * 600, "completion": "y" * 600}
    assert reject(tmp_path, write_lines("rows.jsonl", [*map(json.dumps, GOOD), json.dumps(long)])) == {"too_large": 1}


def test_rows_that_no_memory_is_left_for_are_an_error_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "rows.parquet")

    def exhaust(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", exhaust)
    with pytest.raises(DataError, match=r"rows\.parquet: no memory is left for its rows"):
        list(read_rows(SourceFile(tmp_path / "rows.parquet", "rows.parquet", "parquet")))


@pytest.mark.parametrize("depth", [500, 985, 1000, 100_000])
def test_nesting_is_one_rows_reject(tmp_path: Path, write_lines: WriteLines, depth: int) -> None:
    deep = '{"messages": ' + "[" * depth + "]" * depth + "}"
    tools = '{"prompt": "x", "completion": "y", "tools": ' + '{"a":' * depth + "1" + "}" * depth + "}"
    rejected = reject(tmp_path, write_lines("rows.jsonl", [*GOOD, deep, tools]))
    assert sum(rejected.values()) == 2


def test_half_a_surrogate_in_a_name_of_a_column_is_no_error(tmp_path: Path, write_lines: WriteLines) -> None:
    odd = '{"prompt": "x", "completion": "y", "\\ud800": 1}'
    config = DataConfig(source=str(write_lines("rows.jsonl", [*GOOD, odd])), max_rejected_fraction=1.0)
    counts = build_dataset(config, seed=0, folder=tmp_path / "out")
    assert counts.rows_train + counts.rows_eval == len(GOOD) + 1
    assert "?" in (tmp_path / "out" / "quality.json").read_text(encoding="utf-8")


def test_nesting_in_the_arguments_of_a_call_is_one_rows_reject(tmp_path: Path, write_lines: WriteLines) -> None:
    call = '{"function": {"name": "f", "arguments": {"a": ' + "[" * 975 + "]" * 975 + "}}}"
    row = (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": ['
        + call
        + "]}]}"
    )
    rows = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
            for r in GOOD]  # fmt: skip
    config = DataConfig(source=str(write_lines("rows.jsonl", [*rows, row])), max_rejected_fraction=1.0)
    counts = build_dataset(config, seed=0, folder=tmp_path / "out")
    assert counts.rows_in == 5
    assert counts.rows_train + counts.rows_eval + sum(counts.rows_rejected.values()) == 5


def test_number_of_too_many_digits_is_one_rows_reject(tmp_path: Path, write_lines: WriteLines) -> None:
    long = '{"prompt": "x", "completion": "y", "id": ' + "9" * 5000 + "}"
    assert reject(tmp_path, write_lines("rows.jsonl", [*GOOD, long])) == {"broken_json": 1}
    (tmp_path / "rows.json").write_text(f"[{json.dumps(GOOD[0])}, {long}]")
    with pytest.raises(DataError, match=r"rows.json: a number that cannot be read"):
        list(read_rows(SourceFile(tmp_path / "rows.json", "rows.json", "json")))


def _table(**columns: Any) -> pa.Table:
    texts = {name: [*(row[name] for row in GOOD), "z"] for name in ("prompt", "completion")}
    return pa.table({**texts, **columns})


UTF8 = pa.array([*(row["prompt"].encode() for row in GOOD), b"caf\xe9"]).cast(pa.binary())
HOSTILE: dict[str, dict[str, Any]] = {
    "date": {"at": pa.array([0, 0, 0, 0, 2**40], pa.timestamp("s"))},
    "map": {
        "tags": pa.array([[("a", "1")]] * 4 + [[("a", "1"), ("a", "2")]], pa.map_(pa.string(), pa.string())),
    },
    "utf-8": {"prompt": pa.Array.from_buffers(pa.string(), 5, UTF8.buffers())},
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_value_of_a_column_that_cannot_be_read_is_one_rows_reject(tmp_path: Path, kind: str, suffix: str) -> None:
    table, path = _table(**HOSTILE[kind]), tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    rows = list(read_rows(SourceFile(path, path.name, suffix)))
    assert [row.line for row in rows if row.problem is not None] == [5]
    problem = rows[4].problem
    assert problem is not None
    assert problem.reason == "unreadable_value"
    assert problem.detail.startswith(f"column {next(iter(HOSTILE[kind]))} cannot be read")
    assert reject(tmp_path, path) == {"unreadable_value": 1}


READ = """
import sys
import tempfile
import time
from pathlib import Path
from tasks.ingestion.errors import DataError
from tasks.ingestion.rows import messages
from tasks.ingestion.sources import json_files
from tasks.ingestion.sources.files import SourceFile
from tasks.ingestion.sources.readers import read_rows
for path in map(Path, sys.argv[1:]):
    print(path.name, flush=True)
    try:
        for row in read_rows(SourceFile(path, path.name, path.suffix[1:])):
            repr(row.value)
    except DataError as error:
        assert path.name in str(error)
"""


def test_flipped_bytes_never_end_the_process(tmp_path: Path) -> None:
    draw = random.Random(7)
    paths = []
    columns = {"tags": pa.array([[n] * n for n in range(5)]), "kind": pa.array(list("aabbb")).dictionary_encode()}
    with pa.ipc.new_file(str(tmp_path / "good.arrow"), _table(**columns).schema) as writer:
        writer.write_table(_table(**columns))
    pq.write_table(_table(**columns), tmp_path / "good.parquet")
    for suffix in ("arrow", "parquet"):
        good = (tmp_path / f"good.{suffix}").read_bytes()
        for number in range(150):
            data = bytearray(good)
            for _ in range(draw.choice((1, 3, 20))):
                data[draw.randrange(len(data))] = draw.randrange(256)
            paths.append(tmp_path / f"{number}.{suffix}")
            paths[-1].write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, (done.stdout.splitlines()[-1], done.stderr[-2000:])


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    os.mkfifo(tmp_path / "dataset_info.json")
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "b.jsonl")
    (tmp_path / "data" / "a.jsonl").touch()
    for source in (str(tmp_path / "rows.jsonl"), "/dev/zero"):
        with pytest.raises(DataError, match="a pipe, socket or device"):
            find_sources(DataConfig(source=source).datasets[0])
    with pytest.raises(DataError, match="it is no file"):
        find_sources(DataConfig(source=str(tmp_path / "dataset_info.json")).datasets[0])
    (source_,) = find_sources(DataConfig(source=str(tmp_path / "data")).datasets[0])
    assert "b.jsonl" in source_.warnings[0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": 3}, "file_name is '3'"),
        ({"file_name": "a.json", "columns": ["prompt"]}, "columns is"),
        ({"file_name": "a.json", "columns": {"prompt": 3}}, "columns is"),
        ({"file_name": "a.json", "formatting": "sharegpt", "tags": "x"}, "tags is"),
        ({"hf_hub_url": {"a": 1}}, "hf_hub_url is"),
        ({"file_name": "a.json", "formatting": ["alpaca"]}, "formatting is"),
        ({"file_name": "a.json", "num_samples": "many"}, "num_samples is"),
        ({"file_name": "a.json", "columns": {"prompt": "p", "response": "r", "kto_tag": "label"}}, "kto_tag"),
    ],
)
def test_malformed_entry_of_an_index_is_refused_by_name(tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(DataError, match="#x: ") as caught:
        find_sources(DataConfig(source=f"{tmp_path}/dataset_info.json#x").datasets[0])
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["3", "[1]", '{"x": 3}', "[" * 100_000, '{"x": ' + "9" * 5000 + "}"])
def test_malformed_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset_info\.json"):
        find_sources(DataConfig(source=f"{tmp_path}/dataset_info.json#x").datasets[0])


def test_unknown_home_is_an_error_with_the_way_out() -> None:
    with pytest.raises(DataError, match="write the whole path"):
        find_sources(DataConfig(source="~nosuchuser/rows.jsonl").datasets[0])


def test_a_hole_in_a_file_is_one_reject_and_takes_no_time(tmp_path: Path) -> None:
    rows = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_bytes(rows)
        os.truncate(tmp_path / name, 12 << 20)  # as a crash leaves one: zero bytes that are on no disk
        config = DataConfig(source=str(tmp_path / name), max_rejected_fraction=1.0)
        began = time.process_time()
        counts = build_dataset(config, seed=0, folder=tmp_path / name.replace(".", "-"))
        assert counts.rows_rejected == {"broken_json": 1}
        assert counts.rows_in == 3
        assert time.process_time() - began < 3  # looking for secrets in all of it took 6


def test_a_file_whose_name_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text('{"prompt": "a", "completion": "b"}\n')
    config = DataConfig(source=str(tmp_path))
    with pytest.raises(DataError, match=r"udcff\.jsonl': the name is not UTF-8: rename it"):
        find_sources(config.datasets[0])


def test_a_name_that_no_file_can_have_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for source, said in (
        ("x" * 5000, "File name too long"),
        (str(tmp_path / "loop" / "a"), "levels of symbolic links"),
    ):
        with pytest.raises(DataError, match=said) as error:
            find_sources(DataConfig(source=source).datasets[0])
        assert len(str(error.value)) < 500


# root may read everything: the ones below are asked by a process that is nobody.
_AS_NOBODY = """
import os, sys
from schemas.config import DataConfig
from tasks.ingestion.errors import DataError
from tasks.ingestion.sources.sources import find_sources
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for source in sys.argv[1:]:
    try:
        find_sources(DataConfig(source=source).datasets[0])
        print("taken")
    except DataError as error:
        print(str(error).replace("\\n", " "))
"""


def test_what_this_user_may_not_read_is_an_error_and_no_row_is_missing_without_a_word() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        row = '{"prompt": "a", "completion": "b"}\n'
        for place in ("file", "folder/below", "open"):
            (folder / place).mkdir(parents=True)
            (folder / place / "rows.jsonl").write_text(row)
        (folder / "file" / "rows.jsonl").chmod(0)
        (folder / "folder" / "rows.jsonl").write_text(row)
        (folder / "folder" / "below").chmod(0)
        asked = ["file", "file/rows.jsonl", "folder", "folder/below/rows.jsonl", "open"]
        command = [sys.executable, "-c", _AS_NOBODY, *(str(folder / place) for place in asked)]
        if os.getuid() == 0 and not os.access(Path(sys.executable).resolve(), os.X_OK):
            pytest.skip("nobody may run this Python")
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
        assert done.returncode == 0, done.stderr
        (folder / "folder" / "below").chmod(0o700)
    said = done.stdout.splitlines()
    assert [line.split(": ", 1)[-1].split(":")[0] for line in said[:3]] == ["you may not read it"] * 3
    assert "Permission denied: give a path that you may read" in said[3]
    assert said[4] == "taken"
