"""Begins transactions of Prefect's server on SQLite so that a concurrent write does not make them fail.

Prefect begins most transactions DEFERRED, reads, and then writes. When another connection wrote in between, SQLite
refuses at once (SQLITE_BUSY_SNAPSHOT: the snapshot that was read is old), whatever time-out is set. Prefect answers 503
then, logs a traceback in its messaging, and repeats the message three times before it drops it. Begun IMMEDIATE, a
transaction waits for its turn to write before it reads. Prefect does so itself where states of runs are set.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import MODELS_DEPENDENCIES
from prefect.server.utilities.database import get_dialect
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class ImmediateSqlite(AioSqliteConfiguration):
    """Prefect's way to use SQLite, with every transaction a writer's from its first statement on."""

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """Begin IMMEDIATE, whatever is asked for."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def use_immediate_transactions() -> None:
    """Let the server that this process is about to make begin so; one on PostgreSQL is left alone."""
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if get_dialect(url).name == "sqlite":
        MODELS_DEPENDENCIES["database_config"] = ImmediateSqlite(connection_url=url)
