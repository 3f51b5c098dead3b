"""A run that MLflow has as finished ends with exit code 0, whatever happens to its process or its server then."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import BASE_MODEL, ROOT

pytestmark = pytest.mark.slow
_TIMEOUT_SECONDS = 300


def _send_signals(process: subprocess.Popen[str]) -> None:
    """Send what terminals and schedulers send, until the process is gone."""
    while process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            process.send_signal(number)
            time.sleep(0.01)


def _kill_server(process: subprocess.Popen[str]) -> None:
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            if "flows.service.temporary" in child.cmdline():
                child.kill()


_REGISTERING = "SELECT count(*) FROM tags WHERE key = 'sft.stage' AND value = 'register'"
_FINISHED = """
SELECT count(*) FROM runs WHERE status = 'FINISHED'
AND run_uuid NOT IN (SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId')
"""  # of the runs, the pipeline's has no parent
_DESCRIBED = "SELECT count(*) FROM tags WHERE key = 'mlflow.note.content'"  # the last but one thing that it does


def _finds(database: Path, query: str) -> bool:
    if not database.is_file():
        return False
    with suppress(sqlite3.Error), sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5) as connection:
        return bool(connection.execute(query).fetchone()[0])
    return False


@pytest.mark.parametrize(
    ("moment", "happens"), [(_FINISHED, _send_signals), (_DESCRIBED, _kill_server)], ids=["signals", "no server"]
)
def test_a_finished_run_ends_with_code_0(
    moment: str, happens: Callable[[subprocess.Popen[str]], None], command_environment: dict[str, str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "ending",
        "model": {"base_model": str(BASE_MODEL)},
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "training": {"rank": 2, "max_steps": 2},
        "evaluation": {"max_new_tokens": 2, "num_resamples": 100},
        "registry": {"name": "ending"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))  # JSON is YAML
    home, report = tmp_path / "home", tmp_path / "report.json"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "run", str(tmp_path / "run.yaml"), "--report", str(report)],
            env={
                **command_environment,
                "SFT_HOME": str(home),
                "OMP_NUM_THREADS": "1",
                "PREFECT_CLIENT_MAX_RETRIES": "1",
            },
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        # The moment is short; until the last stage has begun there is time, and looking is not free.
        for wanted, wait in ((_REGISTERING, 0.1), (moment, 0.005)):
            while not _finds(home / "mlflow.db", wanted):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(wait)
        assert process.poll() is None, "it ended before anything could happen"
        happens(process)
        assert process.wait(_TIMEOUT_SECONDS) == 0, (tmp_path / "log").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert json.loads(report.read_text())["registry"]["version"] == "1"
    assert "ending version 1" in (tmp_path / "log").read_text()
