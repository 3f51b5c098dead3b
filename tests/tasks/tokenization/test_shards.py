"""Shards give what the whole gives, wherever they are made, and a finished one is not made again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest

from schemas.artifacts import DatasetRef, ModelRef
from schemas.config import TokenizationConfig
from tasks import workers
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.shards import plan_shards
from tasks.tokenization.templates import PreparedTokenizer, prepare_tokenizer
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
    assert plan_shards(dataset / "train.parquet", 30) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert plan_shards(dataset / "train.parquet", 5) == [[number] for number in range(10)]
    assert plan_shards(dataset / "eval.parquet") == [[0]]


def test_shards_in_worker_processes_give_the_files_of_the_whole(
    tmp_path: Path, dataset: Path, prepared: PreparedTokenizer
) -> None:
    config = TokenizationConfig()
    whole = tokenize_dataset(dataset, prepared, tmp_path / "whole", config)
    try:
        parts = tokenize_dataset(dataset, prepared, tmp_path / "parts", config, rows_per_shard=30)
    finally:
        workers.stop()
    assert parts == whole
    assert (whole.rows_train, whole.rows_rejected) == (90, {"no_trained_tokens": 10})
    for name in ("train.parquet", "eval.parquet", "rejects.parquet"):
        assert pl.read_parquet(tmp_path / "parts" / name).equals(pl.read_parquet(tmp_path / "whole" / name))
    masks = [(tmp_path / place / "masks.json").read_text(encoding="utf-8") for place in ("parts", "whole")]
    # Each shard renders its own first conversations to compare.
    assert [line for line in masks[0].splitlines() if "num_checked" not in line] == [
        line for line in masks[1].splitlines() if "num_checked" not in line
    ]


def test_workers_end_with_the_process_that_made_them_however_it_dies() -> None:
    script = (
        "import os, time\nfrom tasks import workers\n"
        "print(workers.call(os.getpid), flush=True)\nworkers.submit(time.sleep, 600)\ntime.sleep(600)\n"
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
def test_a_finished_shard_is_found_again(
    tmp_path: Path, dataset: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow, unmapped
    from prefect.testing.utilities import prefect_test_harness

    from tasks import tracking
    from tasks.tokenization.task import tokenize_shard

    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_LOCAL_STORAGE_PATH", str(tmp_path / "results"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = tracking.client().create_experiment("shards", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = tracking.client().create_run(experiment).info.run_id
    rows: dict[str, Any] = {"rows_in": 100, "rows_train": 90, "rows_eval": 1, "rows_rejected": {}}
    data = DatasetRef(uri=str(dataset), digest="d", source_digest="s", rows_duplicate=0, rows_leaked=0, **rows)

    @flow
    def tokenize_some(shards: list[list[int]]) -> list[str]:
        states = tokenize_shard.map(
            unmapped(data),
            unmapped(ModelRef(uri=str(model), digest="m", name="m")),
            unmapped(TokenizationConfig()),
            part=unmapped("train"),
            row_groups=shards,
            chat_template=unmapped(None),
            template_file_digest=unmapped(None),
            parent_run_id=unmapped(run_id),
            return_state=True,
        )
        for state in states:
            assert (tracking.resolve(state.result()) / "examples.parquet").is_file()
        return [str(state.name) for state in states]

    try:
        with prefect_test_harness(server_startup_timeout=120):
            assert tokenize_some([[0, 1, 2]]) == ["Completed"]
            assert tokenize_some([[0, 1, 2], [3, 4]]) == ["Cached", "Completed"]
    finally:
        workers.stop()
