"""A database in a folder of any name is opened where it is, by SQLAlchemy's drivers and by MLflow."""

import asyncio
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from tasks import tracking
from tasks.sqlite_files import find_path, make_address

_NAMES = ["plain", "a b", "a%41b", "a#b", "a?b=c", "a🦆b", "a&b;c", "a+b'c"]


@pytest.mark.parametrize("name", _NAMES)
def test_both_drivers_open_the_file_at_its_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "x.db"
    path.parent.mkdir()

    async def write() -> None:
        engine = create_async_engine(make_address(path, driver="aiosqlite"))
        async with engine.begin() as connection:
            await connection.execute(sa.text("CREATE TABLE t (n INTEGER)"))
        await engine.dispose()

    asyncio.run(write())
    with sa.create_engine(make_address(path)).begin() as connection:
        connection.execute(sa.text("INSERT INTO t VALUES (7)"))
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT n FROM t").fetchall() == [(7,)]
    assert [each.name for each in tmp_path.rglob("*.db")] == ["x.db"]
    assert find_path(make_address(path)) == path


def test_other_databases_have_no_path() -> None:
    assert find_path("http://127.0.0.1:5000") is None
    assert find_path("postgresql://a@b/c") is None


@pytest.mark.parametrize("name", ["a%41b #", "a?b=c🦆"])
def test_a_home_of_any_name_keeps_runs_and_artifacts(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("SFT_HOME", str(tmp_path / name))
    run = tracking.client().create_run(tracking.open_experiment("odd")).info.run_id
    (tmp_path / "note.txt").write_text("kept")
    tracking.client().log_artifact(run, str(tmp_path / "note.txt"))
    assert (tmp_path / name / "mlflow.db").is_file()
    (kept,) = (tmp_path / name / "artifacts").rglob("note.txt")
    assert kept.read_text() == "kept"
    assert Path(tracking.client().download_artifacts(run, "note.txt")).read_text() == "kept"
