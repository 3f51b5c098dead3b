"""Prefect's SQLite file, made once for an environment and copied into each home.

Prefect makes its tables by replaying some hundred changes to them, which takes longer than its server takes to start.
What comes out holds no data, and is the same for every home, so the first that is made leaves a copy beside the
environment's packages. Nothing depends on that copy: where it is not there, or cannot be written, each is made anew.
"""

import os
import shutil
import sqlite3
import sys
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import anyio
from anyio.to_thread import run_sync
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from sqlalchemy.engine import make_url

from tasks.sqlite_files import find_path


def prepare_new_database() -> None:
    """Make the server's SQLite file where it is not there yet; whoever calls has its folder for itself."""
    path = find_database()
    if path is None or path.exists() or copy_prepared(path):
        return
    from prefect.server.database.alembic_commands import alembic_upgrade

    path.parent.mkdir(parents=True, exist_ok=True)
    anyio.run(partial(run_sync, alembic_upgrade))  # it looks for the loop that its thread belongs to
    with suppress(OSError, sqlite3.Error):  # the environment may belong to somebody else
        _keep(path)


def copy_prepared(path: Path) -> bool:
    """Make a SQLite file from the environment's copy; say whether there is one."""
    if not _prepared().is_file():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        new.touch(mode=0o600)
        shutil.copyfile(_prepared(), new)
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    return True


def find_database() -> Path | None:
    """Return where Prefect's server keeps its data, if that is a SQLite file, whether or not it is there."""
    url = make_url(PREFECT_API_DATABASE_CONNECTION_URL.value())
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return find_path(url.set(drivername="sqlite").render_as_string(hide_password=False))


def _keep(path: Path) -> None:
    """Leave a copy of a new database with the environment, whole or not at all."""
    place = _prepared()
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f"{place.name}.{os.getpid()}")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(new)) as target:
        source.backup(target)
    for suffix in ("-wal", "-shm"):
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    new.replace(place)


def _prepared() -> Path:
    return Path(sys.prefix) / "share" / "sft-pipeline" / f"prefect-{version('prefect')}.db"
