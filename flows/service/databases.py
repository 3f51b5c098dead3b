"""The servers' databases: SQLite files under SFT_HOME, or databases of one PostgreSQL server, made when missing."""

import asyncio
from dataclasses import dataclass

import asyncpg
from sqlalchemy.engine import URL, make_url

from flows.service.settings import ServiceError, ServiceSettings
from tasks import storage
from tasks.sqlite_files import make_address
from tasks.tracking.database import prepare_database

_MAINTENANCE = "postgres"
_CONNECT_SECONDS = 10


@dataclass(frozen=True)
class DatabaseUrls:
    """What each server is given; with passwords, so never an argument of a command or part of a message."""

    prefect: str
    mlflow: str
    mlflow_users: str


def prepare_databases(settings: ServiceSettings) -> DatabaseUrls:
    """Return the servers' databases, made in PostgreSQL when they are missing.

    Raises:
        ServiceError: PostgreSQL is not reached, refuses the log-in, or does not let this user make databases.
    """
    if settings.database_url is None:
        home = storage.make_home()
        prepare_database(home / "mlflow.db", artifact_root="mlflow-artifacts:/")
        return DatabaseUrls(
            prefect=make_address(home / "prefect.db", driver="aiosqlite"),
            mlflow=make_address(home / "mlflow.db"),  # the file of runs without servers: they appear on the pages
            mlflow_users=make_address(settings.folder / "users.db"),
        )
    url = make_url(settings.database_url)
    prefix = url.database or "sft"
    names = [f"{prefix}_prefect", f"{prefix}_mlflow", f"{prefix}_users"]
    try:
        asyncio.run(_create_missing(url, names))
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        where = f"{url.host or 'localhost'}:{url.port or 5432}"
        raise ServiceError(
            f"PostgreSQL at {where} (SFT_DATABASE_URL): {str(error) or type(error).__name__}. Make it reachable, or "
            f"create the databases {', '.join(names)} for user {url.username}"
        ) from None
    prefect, mlflow, users = (url.set(database=name) for name in names)
    return DatabaseUrls(
        prefect=_render(prefect, "postgresql+asyncpg"),
        mlflow=_render(mlflow, "postgresql+psycopg2"),
        mlflow_users=_render(users, "postgresql+psycopg2"),
    )


def find_mlflow(settings: ServiceSettings) -> str:
    """Return the address of the MLflow server's database, whether or not it is there."""
    if settings.database_url is None:
        return make_address(storage.home() / "mlflow.db")
    url = make_url(settings.database_url)
    return _render(url.set(database=f"{url.database or 'sft'}_mlflow"), "postgresql+psycopg2")


def _render(url: URL, driver: str) -> str:
    return url.set(drivername=driver).render_as_string(hide_password=False)


async def _create_missing(url: URL, names: list[str]) -> None:
    for name in names:
        try:
            await (await _connect(url, name)).close()
        except asyncpg.InvalidCatalogNameError:
            connection = await _connect(url, _MAINTENANCE)
            try:
                await connection.execute(f'CREATE DATABASE "{name.replace(chr(34), chr(34) * 2)}"')
            except asyncpg.DuplicateDatabaseError:
                pass  # made by another machine meanwhile
            finally:
                await connection.close()


async def _connect(url: URL, database: str) -> asyncpg.Connection:
    dsn = _render(url.set(database=database), "postgresql")
    return await asyncpg.connect(dsn, timeout=_CONNECT_SECONDS)
