"""Old flow runs leave Prefect's database with their task runs, logs, artifacts and events."""

import asyncio
from collections.abc import Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL
from sqlalchemy.engine import make_url

from tasks.sqlite_files import find_path

OURS = ("sft-pipeline", "train", "evaluate", "promote", "rollback", "publish", "clean")
"""Names of our flows: a server may have others too."""
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_PAGE = 200

T = TypeVar("T")


def find_old_flow_runs(before: float, kept: Collection[str]) -> list[UUID]:
    """Return our flow runs that ended before a time, in seconds since 1970, but those to be kept.

    They are those of the server in force; without one, those that runs without a server have left in the home.
    """
    moment = datetime.fromtimestamp(before, UTC)
    if PREFECT_API_URL.value():
        found = _find_on_server(moment)
    elif local_database() is not None:
        found = _run(_find_in_database(moment))
    else:
        found = []
    return [each for each in found if str(each) not in kept]


def delete_flow_runs(runs: Collection[UUID]) -> None:
    """Delete flow runs; a server deletes their logs soon after, and artifacts and events by its own vacuum."""
    if PREFECT_API_URL.value():
        _delete_on_server(runs)
    elif local_database() is not None:
        _run(_delete_in_database(list(runs)))


def local_database() -> Path | None:
    """Return the SQLite file of runs without a server, or None where there is none."""
    url = make_url(PREFECT_API_DATABASE_CONNECTION_URL.value())
    if url.get_backend_name() != "sqlite":
        return None
    path = find_path(url.set(drivername="sqlite").render_as_string(hide_password=False))
    return path if path is not None and path.is_file() else None


def _filters(schemas: Any, moment: datetime) -> dict[str, Any]:
    """Return what a flow run has to be, in the client's or the server's classes."""
    return {
        "flow_filter": schemas.FlowFilter(name=schemas.FlowFilterName(any_=list(OURS))),
        "flow_run_filter": schemas.FlowRunFilter(
            end_time=schemas.FlowRunFilterEndTime(before_=moment),
            state=schemas.FlowRunFilterState(type=schemas.FlowRunFilterStateType(any_=list(_ENDED))),
        ),
    }


def _find_on_server(moment: datetime) -> list[UUID]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters

    found: list[UUID] = []
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(**_filters(filters, moment), limit=_PAGE, offset=len(found)):
            found += [run.id for run in page]
    return found


def _delete_on_server(runs: Collection[UUID]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for run in runs:
            try:
                client.delete_flow_run(run)
            except ObjectNotFound:
                continue  # somebody else was faster


async def _find_in_database(moment: datetime) -> list[UUID]:
    from prefect.server import models
    from prefect.server.database import provide_database_interface
    from prefect.server.schemas import filters

    database = provide_database_interface()
    await database.create_db()  # brings one of an older release up to date
    found: list[UUID] = []
    async with database.session_context() as session:
        read: Any = models.flow_runs.read_flow_runs  # its wrapper's annotations lose that it is awaited
        while page := await read(session=session, **_filters(filters, moment), limit=_PAGE, offset=len(found)):
            found += [run.id for run in page]
    return found


async def _delete_in_database(runs: list[UUID]) -> None:
    """Delete flow runs, and what the vacuum of a server that stays would delete then."""
    from prefect.server import models
    from prefect.server.database import provide_database_interface
    from prefect.server.services import db_vacuum

    database = provide_database_interface()
    delete: Any = models.flow_runs.delete_flow_run
    for start in range(0, len(runs), _PAGE):
        async with database.session_context(begin_transaction=True, with_for_update=True) as session:
            for run in runs[start : start + _PAGE]:
                await delete(session=session, flow_run_id=run)
    await db_vacuum.vacuum_orphaned_logs(db=database)
    await db_vacuum.vacuum_orphaned_artifacts(db=database)
    await db_vacuum.vacuum_stale_artifact_collections(db=database)
    await db_vacuum.vacuum_events_with_retention_overrides(db=database)
    await db_vacuum.vacuum_old_events(db=database)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Do it in a thread of its own: the caller may have an event loop, as a flow or a notebook has."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()
