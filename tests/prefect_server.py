"""A Prefect server for flows that a test runs in its own process: the one that a run by hand has."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def prefect_server(folder: Path) -> Iterator[None]:
    """Run the body's flows on a server with its database in a folder, which stays until this process ends.

    Prefect sends logs and events in threads of its own, and waits for them no sooner than then.
    """
    from prefect.context import refresh_global_settings_context

    from flows.environment import DATABASE_VARIABLE
    from flows.temporary_server import starting_server
    from tasks.sqlite_files import make_address

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATABASE_VARIABLE, make_address(folder / "prefect.db", driver="aiosqlite"))
        patch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "240")
        refresh_global_settings_context()
        with starting_server():
            pass
        yield
    refresh_global_settings_context()
