"""Addresses of SQLite files as SQLAlchemy, MLflow and Prefect take them, for paths with any character."""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote, unquote

_PREFIX, _FILE, _QUERY = "sqlite:///", "file:", "?uri=true"
_LEAST_SHARE = 10
"""A file is written anew when at least so small a part of it, one of ten pages, is not used."""


def make_address(path: Path, *, driver: str = "") -> str:
    """Return the address of a SQLite file.

    Args:
        path: absolute, or relative to the working folder.
        driver: SQLAlchemy's name of one, such as `aiosqlite`.
    """
    # SQLAlchemy takes a path as it is, up to a question mark. SQLite's own form of addresses can quote one.
    place = f"{_FILE}{quote(str(path))}{_QUERY}" if "?" in str(path) else str(path)
    return f"{_PREFIX if not driver else f'sqlite+{driver}:///'}{place}"


def find_path(address: str) -> Path | None:
    """Return the file of an address as `make_address` makes it without a driver; None for other databases."""
    if not address.startswith(_PREFIX):
        return None
    place = address.removeprefix(_PREFIX)
    if place.startswith(_FILE):
        return Path(unquote(place.removeprefix(_FILE).partition("?")[0]))
    return Path(place)


def compact(path: Path, *, wait_seconds: float = 30.0) -> int:
    """Give the pages that a SQLite file does not use any more back to the disk, and return the bytes of that.

    Others may go on using it. What they hold for too long, or a disk without room for a copy, is left as it is: SQLite
    fills unused pages before a file grows.
    """
    before = _measure(path)
    with (
        closing(sqlite3.connect(path, timeout=wait_seconds, isolation_level=None)) as database,
        suppress(sqlite3.Error),
    ):
        (unused,), (pages,) = (
            database.execute(f"PRAGMA {what}").fetchone() for what in ("freelist_count", "page_count")
        )
        if unused * _LEAST_SHARE >= pages:
            database.execute("VACUUM")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return max(0, before - _measure(path))


def _measure(path: Path) -> int:
    files = (path.with_name(path.name + suffix) for suffix in ("", "-wal"))
    return sum(file.stat().st_size for file in files if file.is_file())
