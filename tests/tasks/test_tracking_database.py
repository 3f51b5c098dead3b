"""MLflow's database is whole or not there, whoever is killed while making it, and however many begin at once."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tasks import tracking
from tasks.tracking.database import WAIT_SECONDS, prepare_database

_OURS = "from tasks import tracking; tracking.client().search_experiments()"
# As MLflow makes it by itself, in its place: what earlier versions left behind when they were killed.
_MLFLOWS = """
import os
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
SqlAlchemyStore(f"sqlite:///{os.environ['SFT_HOME']}/mlflow.db", os.environ["SFT_HOME"])
"""
_DISK = """
import os, sqlalchemy
from pathlib import Path
from tasks.tracking import database
new, other = (Path(os.environ["SFT_HOME"]) / name for name in ("mlflow.db.new", "other.db"))
def read_pragma(path):
    with sqlalchemy.create_engine(f"sqlite:///{path}").connect() as connection:
        return connection.exec_driver_sql("PRAGMA synchronous").scalar()
with database._without_waiting_for_the_disk(new):
    assert (read_pragma(new), read_pragma(other)) == (0, 2)
assert read_pragma(new) == 2
"""


def _begin(home: Path, program: str) -> "subprocess.Popen[bytes]":
    environment = {"SFT_HOME": str(home), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _kill_at(home: Path, program: str, num_bytes: int) -> None:
    """Kill a process as soon as the database that it makes has this size; whole it has 950,000."""
    with _begin(home, program) as process:
        deadline = time.monotonic() + 60
        while not any(_size(home / name) >= num_bytes for name in ("mlflow.db", "mlflow.db.new")):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def _check_it_works(home: Path) -> None:
    """Begin anew: in this process, for the import of MLflow takes longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(home))
        prepare_database(home / "mlflow.db", artifact_root=str(home / "artifacts"))
    with sqlite3.connect(home / "mlflow.db") as database:
        assert database.execute("SELECT name FROM experiments").fetchall() == [("Default",)]
    assert sorted(path.name for path in home.glob("mlflow.db*")) == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.parametrize("program", [_OURS, _MLFLOWS], ids=["ours", "mlflows"])
def test_killed_at_any_moment_the_next_one_begins_well(tmp_path: Path, program: str) -> None:
    for num_bytes in (20_000, 150_000, 600_000):
        home = tmp_path / str(num_bytes)
        home.mkdir()
        _kill_at(home, program, num_bytes)
        _check_it_works(home)


def test_two_first_ones_at_once_both_succeed(tmp_path: Path) -> None:
    for process in [_begin(tmp_path, _OURS) for _ in range(2)]:
        _, error = process.communicate(timeout=180)
        assert process.returncode == 0, error.decode()
    _check_it_works(tmp_path)


def test_only_the_file_that_is_being_made_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    """In a process of its own: in that of the tests none waits."""
    with _begin(tmp_path, _DISK) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()


def test_one_with_contents_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    prepare_database(path, artifact_root="mlflow-artifacts:/")
    assert path.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT artifact_location FROM experiments").fetchall() == [("mlflow-artifacts:/0",)]
        database.execute("UPDATE experiments SET name = 'mine'")
    inode = path.stat().st_ino
    prepare_database(path, artifact_root="elsewhere")
    assert path.stat().st_ino == inode
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT name FROM experiments").fetchall() == [("mine",)]


def test_what_is_no_database_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ValueError, match=r"MLflow's database .*mlflow\.db: file is not a database"):
        prepare_database(path, artifact_root="artifacts")
    assert path.read_bytes() == b"not a database" * 100


def test_a_run_waits_for_who_else_writes_to_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = tracking.open_experiment("locked")
    waits: list[Any] = []

    def note(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO runs"):
            waits.extend(connection.exec_driver_sql("PRAGMA busy_timeout").scalars())

    event.listen(Engine, "before_cursor_execute", note)
    try:
        with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False) as other:
            other.execute("BEGIN EXCLUSIVE")
            threading.Timer(1.0, other.execute, ("COMMIT",)).start()
            run = tracking.client().create_run(experiment)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert tracking.find_status(run.info.run_id) == "RUNNING"
    assert waits == [WAIT_SECONDS * 1000]


_FULL = """
import resource
from tasks import tracking
run = tracking.client().create_run(tracking.open_experiment("full"))
resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
try:
    tracking.end_run(run.info.run_id, "FAILED")
except Exception:
    print("raised")
"""


def test_a_database_that_cannot_be_written_is_said_once_and_without_a_trace(tmp_path: Path) -> None:
    environment = {"SFT_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _FULL], env=environment, capture_output=True, text=True, check=False)
    assert "raised" in done.stdout
    assert "Traceback" not in done.stderr
