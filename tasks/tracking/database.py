"""MLflow's SQLite file, whole or not there: made beside its place under a lock, and moved there in one step.

MLflow makes its tables in dozens of transactions, without a lock. A process that is killed among them leaves a file
that MLflow refuses ever after, and of two first runs at once one fails.
"""

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tasks import storage
from tasks.sqlite_files import make_address

WAIT_SECONDS = 180
"""For whoever else writes: a backup, a shell, another run. MLflow alone would wait for 20."""
_log = logging.getLogger(__name__)
_MLFLOW_WAITS = "PRAGMA busy_timeout"
_SIDE_FILES = ("-journal", "-wal", "-shm")  # what SQLite keeps beside a database
# What MLflow's store has written last when it is whole: its first experiment. Without one there can be no run.
_CONTENTS = ("experiments", "registered_models")


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def _wait_longer(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
    """Let a transaction of MLflow's wait for so long as we say; it sets how long at the beginning of each."""
    if statement.startswith(_MLFLOW_WAITS):
        return f"{_MLFLOW_WAITS} = {WAIT_SECONDS * 1000};", parameters
    return statement, parameters


def prepare_database(path: Path, *, artifact_root: str) -> None:
    """Make sure that MLflow's database at this path is whole; safe for several processes at once, and however they end.

    A file that MLflow was killed in while making it holds nothing of anybody, and is made anew.

    Args:
        path: of the file.
        artifact_root: where MLflow's first experiment keeps artifacts; every other has a place of its own.

    Raises:
        ValueError: the file is no database, or cannot be read or made there.
    """
    try:
        if _is_whole(path):
            return
        storage.make_home()
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.make_lock(path.with_name(f"{path.name}.lock")):
            if not _is_whole(path):
                _make(path, artifact_root)
    except (OSError, sqlite3.Error) as error:
        raise ValueError(
            f"MLflow's database {path}: {error}. If another program holds it, wait for that; if it is damaged, put a "
            "copy back or move it away, and the next start makes a new one"
        ) from error


def _is_whole(path: Path) -> bool:
    """Tell whether MLflow has made its tables to the end; a file that is not there is not whole."""
    if not path.is_file():
        return False
    with closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as database:  # by its path: any character may be in it
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return any(database.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in _CONTENTS if name in tables)


@contextmanager
def _without_waiting_for_the_disk(path: Path) -> Iterator[None]:
    """Let SQLite leave it to the system when a file is written: one that is half made when power fails is made anew."""

    def relax(connection: Any, _record: Any) -> None:
        if any(Path(name) == path for _, _, name in connection.execute("PRAGMA database_list")):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", relax)
    try:
        yield
    finally:
        event.remove(Engine, "connect", relax)


def _make(path: Path, artifact_root: str) -> None:
    if path.exists():
        _log.warning("%s was left unfinished by a killed process and holds no data: it is made again", path)
    new = path.with_name(f"{path.name}.new")
    for each in (path, new):
        for suffix in ("", *_SIDE_FILES):
            each.with_name(each.name + suffix).unlink(missing_ok=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with _without_waiting_for_the_disk(new):
        store = SqlAlchemyStore(make_address(new), artifact_root)
        store.engine.dispose()
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    new.chmod(0o600)  # it names people, data and models
    new.replace(path)
