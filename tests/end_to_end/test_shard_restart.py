"""Killed while shards are made and started again: what is finished is found again, and the tokens are the same."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from schemas.config import DataConfig, TokenizationConfig
from tasks import storage
from tasks.ingestion import tables
from tasks.ingestion.dataset import build_dataset
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.templates import prepare_tokenizer
from tests.end_to_end.conftest import BASE_MODEL, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("SFT_SERVICE_TESTS") != "all", reason="starts three runs: SFT_SERVICE_TESTS=all"),
]
_TIMEOUT_SECONDS = 400
GROUP_ROWS = 50
# `sft run` as it is, with shards that are small enough for a test: of both stages about a dozen. One begins a
# second after another, so that the kill comes among them on any machine.
PROGRAM = f"""
import threading, time
from flows.console import prepare_environment
prepare_environment(cache=True)
from flows.cli import main
from tasks import execution
from tasks.ingestion import tables, task
from tasks.tokenization import shards
call, turn = execution.call, threading.Lock()
def call_slowly(*args):
    with turn:
        time.sleep(1)
    return call(*args)
execution.call = call_slowly
task.SHARD_BYTES, tables.GROUP_ROWS, shards.FEWEST_ROWS_PER_SHARD = 6000, {GROUP_ROWS}, {GROUP_ROWS}
main()
"""
NUM_READ, NUM_TOKENIZED = 11, 13


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}. " * 2} for n in range(600)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": tmp_path.name,
        "model": {"base_model": str(BASE_MODEL)},
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "evaluation": {"max_new_tokens": 8, "num_resamples": 100},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
    return tmp_path / "run.yaml"


def run_until(environment: dict[str, str], config: Path, reached: Callable[[], bool]) -> None:
    """Start a run, and kill it with SIGKILL once something is reached."""
    command = [sys.executable, "-c", PROGRAM, "run", str(config)]
    with (
        config.with_name("log.txt").open("ab") as log,
        subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log) as process,
    ):
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not (there := reached()) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
    assert there, config.with_name("log.txt").read_text()
    assert process.returncode == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == [], "a killed run left processes behind"


def count_tasks(environment: dict[str, str], run: int) -> Counter[tuple[str, str]]:
    """Count the tasks of a flow run (from 0) by what they do and their states, from Prefect's tables."""
    path = Path(environment["PREFECT_HOME"]) / "prefect.db"
    if not path.is_file():
        return Counter()
    query = """
        select name, state_name from task_run
        where flow_run_id = (select id from flow_run order by created limit 1 offset ?)
    """
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        try:
            rows = database.execute(query, (run,)).fetchall()
        except sqlite3.OperationalError:  # the tables are not made yet
            return Counter()
    # The parts of one stage as apart from the stage itself.
    names = {"tokenize rows": "tokenize-shard", "tokenize for": "tokenize"}
    return Counter((names.get(" ".join(name.split()[:2]), name.split()[0]), str(state)) for name, state in rows)


def test_a_run_killed_among_its_shards_goes_on_behind_the_last_finished_one(
    tmp_path: Path, config: Path, command_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        **command_environment,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "SFT_HOME": str(tmp_path / "home"),
    }

    def wait_for(run: int, name: str, number: int) -> Callable[[], bool]:
        return lambda: count_tasks(environment, run)[name, "Completed"] >= number

    run_until(environment, config, wait_for(0, "read", 3))
    run_until(environment, config, wait_for(1, "tokenize-shard", 3))
    run_until(environment, config, wait_for(2, "tokenize", 1))
    read, again, last = (count_tasks(environment, run) for run in range(3))
    assert 3 <= read["read", "Completed"] <= NUM_READ
    assert again["read", "Cached"] >= 3
    assert again["read", "Cached"] + again["read", "Completed"] == NUM_READ
    assert 3 <= again["tokenize-shard", "Completed"] <= NUM_TOKENIZED
    assert (last["ingest", "Cached"], last["read", "Completed"]) == (1, 0)
    assert last["tokenize-shard", "Cached"] >= 3
    assert last["tokenize-shard", "Cached"] + last["tokenize-shard", "Completed"] == NUM_TOKENIZED

    # What came of it all is what one undisturbed process makes.
    monkeypatch.setattr(tables, "GROUP_ROWS", GROUP_ROWS)
    build_dataset(DataConfig(source=str(tmp_path / "rows.jsonl")), seed=0, folder=tmp_path / "dataset")
    prepared = prepare_tokenizer(BASE_MODEL, None)
    tokenize_dataset(tmp_path / "dataset", prepared, tmp_path / "tokens", TokenizationConfig())
    monkeypatch.setenv("SFT_HOME", environment["SFT_HOME"])
    assert storage.cached_folder(storage.digest_folder(tmp_path / "tokens")) is not None
