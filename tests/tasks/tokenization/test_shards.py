"""Shards give what the whole gives, wherever they are made, and a finished one is not made again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest

from schemas.artifacts import DatasetRef, ModelRef
from schemas.config import TokenizationConfig
from tasks import execution
from tasks.partitions import name_part
from tasks.storage import digest_folder
from tasks.tokenization import shards
from tasks.tokenization.examples import TokenizationError, tokenize_dataset
from tasks.tokenization.shards import plan_shards, work_on_shard
from tasks.tokenization.templates import PreparedTokenizer, prepare_tokenizer
from tests.prefect_server import prefect_server
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import say
from tests.tasks.tokenization.test_examples import write

CONVERSATIONS = [
    [*say(f"u:Question {n}", f"a:Answer {n} <|im_end|>" if n % 7 == 0 else f"a:Answer {n}")] if n % 11 else say("u:?")
    for n in range(100)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(CHATML).save_pretrained(str(folder))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def prepared(model: Path) -> PreparedTokenizer:
    return prepare_tokenizer(model, None)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset of ten row groups of ten rows."""
    folder = write(tmp_path / "data", CONVERSATIONS, [say("u:Hello", "a:Hi")])
    pl.read_parquet(folder / "train.parquet").write_parquet(folder / "train.parquet", row_group_size=10)
    return folder


def test_row_groups_are_never_divided(dataset: Path) -> None:
    table = dataset / "train.parquet"
    assert plan_shards(table, 30) == [(table, groups) for groups in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9])]
    assert plan_shards(table, 5) == [(table, [number]) for number in range(10)]
    assert plan_shards(dataset / "eval.parquet") == [(dataset / "eval.parquet", [0])]


def test_a_part_of_a_table_is_a_shard(dataset: Path) -> None:
    """Of six row groups in two parts, those of one part are never in a shard with those of the other."""
    table = dataset / "rows.parquet"
    table.mkdir()
    for number in range(2):
        pl.DataFrame({"n": range(30)}).write_parquet(name_part(table, number), row_group_size=10)
    parts = [name_part(table, number) for number in range(2)]
    assert plan_shards(table, 100) == [(part, [0, 1, 2]) for part in parts]
    assert plan_shards(table, 20) == [(part, groups) for part in parts for groups in ([0, 1], [2])]


def test_large_tables_have_large_shards(dataset: Path) -> None:
    rows = pl.DataFrame({"number": range(480_000)})
    rows.write_parquet(dataset / "rows.parquet", row_group_size=10_000)
    assert {len(shard.row_groups) for shard in plan_shards(dataset / "rows.parquet")} == {3}
    rows.head(30_000).write_parquet(dataset / "rows.parquet", row_group_size=10_000)
    assert [shard.row_groups for shard in plan_shards(dataset / "rows.parquet")] == [[0], [1], [2]]


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_the_same_whatever_the_shards_and_the_number_of_workers(
    tmp_path: Path, dataset: Path, prepared: PreparedTokenizer
) -> None:
    config = TokenizationConfig()
    whole = tokenize_dataset(dataset, prepared, tmp_path / "whole", config)
    assert (whole.rows_train, whole.rows_rejected) == (90, {"no_trained_tokens": 10})
    expected = read_all(tmp_path / "whole")
    assert {"train.parquet", "eval.parquet", "rejects.parquet", "masks.json"} < expected.keys()
    cores = os.sched_getaffinity(0)
    for some, rows_per_shard in (({min(cores)}, 30), (cores, 30), (cores, 10), (cores, 70)):
        place = tmp_path / f"{len(some)}-{rows_per_shard}"
        os.sched_setaffinity(0, some)  # there is a worker for each core
        try:
            parts = tokenize_dataset(dataset, prepared, place, config, rows_per_shard=rows_per_shard)
        finally:
            execution.stop()
            os.sched_setaffinity(0, cores)
        assert parts == whole
        assert read_all(place) == expected


def test_a_tokenizer_is_opened_again_when_its_folder_changes(tmp_path: Path, dataset: Path, model: Path) -> None:
    changing = tmp_path / "changing"
    shutil.copytree(model, changing)
    made = []
    for name in ("one", "other"):
        work_on_shard(dataset / "train.parquet", [0], changing, None, TokenizationConfig(), tmp_path / name)
        made.append(read_all(tmp_path / name)["000000/examples.arrow"])
        make_tokenizer(CHATML.replace("{{ m.role }}", "{{ m.role }}s")).save_pretrained(str(changing))
    assert made[0] != made[1]


# As templates with today's date are at midnight: what is written around the contents is not what it was a moment ago.
CLOCK = "<|im_start|>system\n{{ strftime_now('%S') }}<|im_end|>\n" + CHATML


def test_a_template_that_changes_under_way_has_its_rows_rendered_and_is_named(
    tmp_path: Path, dataset: Path, model: Path
) -> None:
    (tmp_path / "clock.jinja").write_text(CLOCK)
    clock = prepare_tokenizer(model, str(tmp_path / "clock.jinja"))
    tokenize_dataset(dataset, clock, tmp_path / "first", TokenizationConfig())
    second = time.strftime("%S")
    while time.strftime("%S") == second:
        time.sleep(0.01)
    begin = time.time()
    counts = tokenize_dataset(dataset, clock, tmp_path / "later", TokenizationConfig())
    anew = [warning for warning in counts.warnings if "rendered one by one" in warning]
    assert len(anew) == 2  # of the training part and of the held-out one
    assert anew[0].startswith(
        "the chat template clock.jinja, training rows: 100 conversations in 10 row groups rendered"
    )
    assert "data.jsonl, line 2 became" in anew[0]
    masks = json.loads((tmp_path / "later" / "masks.json").read_text(encoding="utf-8"))["train"]
    assert (masks["num_rendered_anew"], masks["num_groups_rendered"]) == (100, 10)
    seconds = {time.strftime("%S", time.localtime(begin + passed)) for passed in range(int(time.time() - begin) + 2)}
    for ids in pl.read_parquet(tmp_path / "later" / "train.parquet")["input_ids"].to_list():
        text = str(clock.tokenizer.decode(ids))
        assert text.removeprefix("<|im_start|>system\n")[:2] in seconds


def test_workers_end_with_the_process_that_made_them_however_it_dies() -> None:
    script = (
        "import os, time\nfrom tasks import execution\n"
        "print(execution.call(os.getpid), flush=True)\nexecution.submit(time.sleep, 600)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert psutil.pid_exists(worker)
        os.kill(parent.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, f"worker {worker} outlives its parent"
        time.sleep(0.05)


@pytest.mark.slow
def test_finished_shards_are_found_again_after_the_whole_has_failed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow

    from tasks import tracking
    from tasks.tokenization.task import tokenize

    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(tmp_path / "results"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(shards, "FEWEST_ROWS_PER_SHARD", 10)
    experiment = tracking.client().create_experiment("shards", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = tracking.client().create_run(experiment).info.run_id
    folder = write(tmp_path / "data", [*CONVERSATIONS[:19], say("u:q", "a:" + "word " * 99)], [say("u:Hello", "a:Hi")])
    pl.read_parquet(folder / "train.parquet").write_parquet(folder / "train.parquet", row_group_size=10)
    rows: dict[str, Any] = {"rows_in": 21, "rows_train": 20, "rows_eval": 1, "rows_rejected": {}}
    data = DatasetRef(
        uri=str(folder), digest=digest_folder(folder), source_digest="s", rows_duplicate=0, rows_leaked=0, **rows
    )
    made: list[str] = []
    call = execution.call

    def call_and_note(function: Callable[..., Any], table: Path, row_groups: list[int], *rest: Any) -> Any:
        made.append(f"{table.stem} {row_groups}")
        return call(function, table, row_groups, *rest)

    monkeypatch.setattr(execution, "call", call_and_note)

    @flow
    def tokenize_all() -> None:
        config = TokenizationConfig(max_length=64, max_truncated_fraction=0.0)
        base_model = ModelRef(uri=str(model), digest=digest_folder(model), name="m")
        tokenize(data, base_model, config, chat_template=None, template_file_digest=None, parent_run_id=run_id)

    try:
        with prefect_server(tmp_path / "home" / "prefect"):
            for _ in range(2):
                with pytest.raises(TokenizationError, match=r"1 of 18 training examples"):
                    tokenize_all()
    finally:
        execution.stop()
    assert sorted(made) == ["eval [0]", "train [0]", "train [1]"]
