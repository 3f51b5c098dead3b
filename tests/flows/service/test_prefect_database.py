"""On SQLite, a transaction of Prefect's server that reads and then writes does not fail for another's write between."""

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import MODELS_DEPENDENCIES, provide_database_interface
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

from flows.service.prefect_database import ImmediateSqlite, use_immediate_transactions

_COUNT, _ADD = sa.text("SELECT COUNT(*) FROM t"), sa.text("INSERT INTO t VALUES (1)")


async def _read_then_write(config: AioSqliteConfiguration) -> int:
    """Let a transaction write between another's reading and writing; return the rows in the end."""
    engine = await config.engine()
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE t (n INTEGER)"))

    async def slow() -> None:
        async with await config.session(engine) as session, config.begin_transaction(session):
            await session.execute(_COUNT)
            await asyncio.sleep(0.5)
            await session.execute(_ADD)

    async def quick() -> None:
        await asyncio.sleep(0.2)
        async with await config.session(engine) as session, config.begin_transaction(session):
            await session.execute(_ADD)

    await asyncio.gather(slow(), quick())
    async with engine.connect() as connection:
        return int((await connection.execute(_COUNT)).scalar_one())


def test_both_write(tmp_path: Path) -> None:
    assert asyncio.run(_read_then_write(ImmediateSqlite(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}"))) == 2


def test_prefects_own_transactions_still_fail(tmp_path: Path) -> None:
    """When this one fails, Prefect has mended it, and the module can go."""
    with pytest.raises(sa.exc.OperationalError, match="database is locked"):
        asyncio.run(_read_then_write(AioSqliteConfiguration(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}")))


def test_the_server_begins_so_on_sqlite_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, is_ours in ((f"sqlite+aiosqlite:///{tmp_path / 'a.db'}", True), ("postgresql+asyncpg://a@b/c", False)):
        monkeypatch.setitem(MODELS_DEPENDENCIES, "database_config", None)
        for name in ("query_components", "orm"):
            monkeypatch.setitem(MODELS_DEPENDENCIES, name, None)
        with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: url}):
            use_immediate_transactions()
            config = provide_database_interface().database_config
            assert isinstance(config, ImmediateSqlite) is is_ours
            assert config.connection_url == url
