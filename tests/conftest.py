"""Settings that libraries read at import, for every test, and what makes all tests quicker: no law depends on it."""

import gc
import os
import sqlite3
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from tasks.lean_imports import shorten_imports

shorten_imports()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait do not spin on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_collection_finish() -> None:
    """Take what the tests' modules have imported out of the collector's passes: each looked at a million objects."""
    gc.collect()
    gc.freeze()


@event.listens_for(Engine, "connect")
def _do_not_wait_for_the_disk(connection: Any, _record: Any) -> None:
    """Let the tests' own process leave it to the system when a database is written: no test takes the power away."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")
