"""A dataset read in shards is the dataset; a killed run goes on; memory does not grow with the rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import DataConfig
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.errors import DataError
from tasks.ingestion.shards import name_sources, plan_shards
from tests.tasks.ingestion.conftest import WriteLines

ROWS: list[Any] = [{"prompt": f"question {number} é", "completion": f"answer {number}"} for number in range(400)]
ROWS[7] = ROWS[300] = ROWS[5]
ROWS[11], ROWS[211], ROWS[399] = (
    "{broken",
    {"prompt": "x", "completion": " "},
    {"prompt": "mail", "completion": "ann@acme.org"},
)
NAMES = ("train.parquet", "eval.parquet", "rejects.parquet", "quality.json")


def build(source: Path | str, folder: Path, shard_bytes: int, **settings: Any) -> DatasetCounts:
    config = DataConfig.model_validate({"source": str(source), "max_rejected_fraction": 0.1, **settings})
    return build_dataset(config, seed=0, folder=folder, shard_bytes=shard_bytes)


def read_all(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in NAMES]


def count_shards(source: Path, shard_bytes: int) -> int:
    config = DataConfig(source=str(source))
    return len(list(plan_shards(config, name_sources(config), shard_bytes)))


def test_lines_read_in_shards_give_the_same_bytes(tmp_path: Path, write_lines: WriteLines) -> None:
    source = write_lines("rows.jsonl", ["", *ROWS[:200], "  ", *ROWS[200:]])
    assert [count_shards(source, size) for size in (1 << 20, 4000, 300)] == [1, 6, 77]
    counts = build(source, tmp_path / "whole", 1 << 20)
    assert counts == DatasetCounts(400, 356, 40, {"broken_json": 1, "empty_answer": 1}, 2, 0)
    for size in (4000, 300):
        assert build(source, tmp_path / str(size), size) == counts
        assert read_all(tmp_path / str(size)) == read_all(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "300").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_row_groups_and_record_batches_read_in_shards_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    frame = pl.DataFrame([row for row in ROWS if isinstance(row, dict)])
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        frame.write_parquet(path, row_group_size=50, compression="uncompressed")
    else:
        frame.write_ipc(path, record_batch_size=50)
    assert count_shards(path, 3000) > 3
    assert build(path, tmp_path / "whole", 1 << 20) == build(path, tmp_path / "shards", 3000)
    assert read_all(tmp_path / "shards") == read_all(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_list_and_csv_read_in_shards_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    path = write_long_file(tmp_path / f"rows.{kind}")
    assert [count_shards(path, size) for size in (1 << 20, 4000)] == [1, -(-path.stat().st_size // 4000)]
    counts = build(path, tmp_path / "whole", 1 << 20)
    assert counts == DatasetCounts(400, 357, 40, {"empty_answer": 1}, 2, 0)
    for size in (4000, 300):
        assert build(path, tmp_path / str(size), size) == counts
        assert read_all(tmp_path / str(size)) == read_all(tmp_path / "whole")
    lines = pl.read_parquet(tmp_path / "300" / "rejects.parquet").select("source", "line").rows()
    assert lines == [(path.name, 212)]


def write_long_file(path: Path) -> Path:
    """Write the rows, texts with quotes and ends of lines among them, as one list or as CSV."""
    rows = [{**row, "prompt": f'{row["prompt"]}\n"a", [{{\\'} if isinstance(row, dict) else ROWS[0] for row in ROWS]
    rows[11] = {"prompt": "eleven", "completion": "x"}
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        pl.DataFrame(rows).write_csv(path, include_bom=True, line_terminator="\r\n")
    return path


def test_mixture_with_weights_in_shards_gives_the_same_bytes(tmp_path: Path, write_lines: WriteLines) -> None:
    a = write_lines("a/rows.jsonl", ROWS)
    b = write_lines("b/rows.jsonl", [{"prompt": f"b {number}", "completion": "c"} for number in range(300)])
    settings: dict[str, Any] = {"weight": 0.5, "mixture": [{"source": str(b), "weight": 2.5}]}
    counts = build(a, tmp_path / "whole", 1 << 20, **settings)
    assert (counts.rows_train, counts.rows_eval, counts.rows_repeated) == (178 + 675, 40 + 30, 405)
    assert build(a, tmp_path / "shards", 3000, **settings) == counts
    assert read_all(tmp_path / "shards") == read_all(tmp_path / "whole")


def test_row_that_a_worker_cannot_decode_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row).encode() for row in ROWS[12:100]]
    lines[70] = b'{"prompt": "\xff"}'
    path.write_bytes(b"\n".join(lines))
    place = sum(len(line) + 1 for line in lines[:70]) + 12
    with pytest.raises(DataError, match=rf"byte {place + 1} \(offset {place}\) is 0xFF, on line 71"):
        build(path, tmp_path / "out", 1000)


def test_divided_file_without_any_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + "no json\n" * 2000)
    with pytest.raises(DataError, match=r"2000 of 2001 rows"):
        build(path, tmp_path / "out", 1000)
    path.write_text("no json\n" * 2000)
    with pytest.raises(DataError, match=r"no line is JSON \(broken JSON on line 1, column 1"):
        build(path, tmp_path / "out", 1000)


SCRIPT = """
import sys, time
from pathlib import Path
from schemas.config import DataConfig
from tasks.ingestion import dataset, shard_runner
calls = []
def slow(*args):
    calls.append(args)
    time.sleep(0.2 if len(calls) < 3 else 60)  # two are finished, and the third waits to be killed
    return finish(*args)
finish, shard_runner.finish_shard = shard_runner.finish_shard, slow
shard_runner.is_small = lambda *_: True  # in place: one shard after the other
config = DataConfig(source=sys.argv[1], max_rejected_fraction=0.1)
dataset.build_dataset(config, seed=0, folder=Path(sys.argv[2]), shard_bytes=4000)
"""


def list_finished(folder: Path) -> list[Path]:
    """Return the summaries of the shards that are whole: another one's folder gets its name when all is in it."""
    return [path for path in sorted(folder.glob("shards/*/summary.json")) if path.parent.suffix != ".unfinished"]


def test_killed_run_goes_on_after_the_last_finished_shard(tmp_path: Path, write_lines: WriteLines) -> None:
    source, folder = write_lines("rows.jsonl", ROWS), tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(source), str(folder)])
    end = time.monotonic() + 60
    while len(done := list_finished(folder)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(done) < 6
    assert not (folder / "train.parquet").exists()
    # What stands is what a shard's own process would not be asked for again.
    for path in done:
        summary = json.loads(path.read_text())
        summary["parts"][0]["unused"] = {"column that only the first attempt saw": 1}
        path.write_text(json.dumps(summary))
    counts = build(source, folder, 4000)
    assert counts == build(source, tmp_path / "other", 1 << 20)
    assert (folder / "train.parquet").read_bytes() == (tmp_path / "other" / "train.parquet").read_bytes()
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["not_read"] == {"column that only the first attempt saw": len(done)}


def test_changed_file_is_read_anew(tmp_path: Path, write_lines: WriteLines) -> None:
    source, folder = write_lines("rows.jsonl", ROWS), tmp_path / "out"
    config = DataConfig(source=str(source))
    from tasks.ingestion.shard_runner import name_shard

    (shard,) = plan_shards(config, name_sources(config), 1 << 20)
    before = name_shard(shard, 0)
    assert name_shard(shard, 0) == before
    os.utime(source, (1, 1))
    assert name_shard(shard, 0) != before
    assert not folder.exists()


MEASURE = """
import resource, sys
from pathlib import Path
from schemas.config import DataConfig
from tasks.ingestion import dataset, shard_runner, tables
shard_runner.is_small = lambda *_: True
tables.GROUP_ROWS = 1000
dataset.build_dataset(DataConfig(source=sys.argv[1]), seed=0, folder=Path(sys.argv[2]), shard_bytes=1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """18 MB of text more: were texts kept, they would add to the 12 MB that the index and the heap grow by."""
    peaks = []
    for num_rows in (4000, 14_000):
        path = tmp_path / f"{num_rows}.jsonl"
        with path.open("w") as file:
            for number in range(num_rows):
                file.write(json.dumps({"prompt": f"p {number}", "completion": f"word {number} " * 180}) + "\n")
        output = subprocess.check_output([sys.executable, "-c", MEASURE, str(path), str(tmp_path / f"out{num_rows}")])
        peaks.append(int(output) / 1024)
    assert peaks[1] - peaks[0] < 20, peaks
