"""Addresses of SQLite files as SQLAlchemy, MLflow and Prefect take them, for paths with any character."""

from pathlib import Path
from urllib.parse import quote, unquote

_PREFIX, _FILE, _QUERY = "sqlite:///", "file:", "?uri=true"


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
