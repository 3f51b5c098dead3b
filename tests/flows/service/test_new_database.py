"""Prefect's database for a new home is copied from the one that the environment has, and is what Prefect would make."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from flows.service import new_database
from tasks.sqlite_files import make_address

_MAKE = "from flows.service.new_database import prepare_new_database; prepare_new_database()"


def _schema(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        made = sorted(database.execute("SELECT type, name, sql FROM sqlite_master").fetchall())
        return json.dumps([made, database.execute("SELECT * FROM alembic_version").fetchall()])


def _make(path: Path, prefix: Path) -> None:
    """Prepare a database in an interpreter whose environment is said to be elsewhere."""
    variables = {"PREFECT_API_DATABASE_CONNECTION_URL": make_address(path, driver="aiosqlite")}
    code = f"import sys; sys.prefix = {str(prefix)!r}; {_MAKE}"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, check=True, timeout=300)


def test_the_first_home_makes_it_and_the_next_copies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, homes = tmp_path / "environment", [tmp_path / name / "prefect.db" for name in ("first", "second", "third")]
    _make(homes[0], prefix)
    (kept,) = (prefix / "share" / "sft-pipeline").iterdir()
    assert kept.name.startswith("prefect-")
    assert _schema(kept) == _schema(homes[0])
    monkeypatch.setattr(sys, "prefix", str(prefix))
    assert new_database.copy_prepared(homes[1])
    assert _schema(homes[1]) == _schema(homes[0])
    assert [path.name for path in homes[1].parent.iterdir()] == ["prefect.db"]
    # A database that is there is somebody's: it stays as it is.
    homes[2].parent.mkdir()
    homes[2].write_bytes(b"")
    monkeypatch.setattr(new_database, "find_database", lambda: homes[2])
    new_database.prepare_new_database()
    assert homes[2].read_bytes() == b""


def test_an_environment_without_one_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert not new_database.copy_prepared(tmp_path / "prefect.db")
    assert list(tmp_path.iterdir()) == []
