"""What can be deleted from a home, and how many bytes it takes."""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from tasks import storage, tracking
from tasks.registry.retention import RESUMABLE

DAY_SECONDS = 86_400.0
LOG_BYTES = 8 << 20
"""Of each log of the service that stays where it is; as much of what was before goes beside it."""
LOG = "log"


@dataclass(frozen=True)
class Waste:
    """A file or folder that can be deleted."""

    what: str
    """cached folder, kept result, checkpoints, interrupted run, or log."""
    path: Path
    num_bytes: int
    last_used: float = float("inf")
    """When it was found, in seconds since 1970; what was used since stays."""


def find_waste(*, days: float, interrupted: bool) -> list[Waste]:
    """Return what was not used for so many days and is found or made again where it is wanted.

    Args:
        days: since it was written or last used.
        interrupted: also checkpoints of runs that could still go on.
    """
    home, before = storage.home(), time.time() - days * DAY_SECONDS
    kinds = {"cached folder": (home / "cache").glob("[0-9a-f][0-9a-f]/*"), "kept result": (home / "results").glob("*")}
    found = [
        Waste(what, path, measure(path), used)
        for what, paths in kinds.items()
        for path in sorted(paths)
        if (used := _last_use(path)) < before and (path.is_file() or what == "cached folder")
    ]
    for folder in sorted((home / "runs").glob("*")):
        used = _last_use(folder)
        if folder.is_dir() and used < before and not _is_held(folder):
            resumable = tracking.has_records() and tracking.find_status(folder.name) in RESUMABLE
            if interrupted or not resumable:
                what = "interrupted run" if resumable else "checkpoints"
                found.append(Waste(what, folder, measure(folder), used))
    return found + _find_long_logs()


def _find_long_logs() -> list[Waste]:
    """Return the logs of the service that are too long, with the bytes that shortening them gives back."""
    logs = [path for path in sorted((storage.home() / "service" / "logs").glob("*.log")) if path.is_file()]
    sizes = {path: path.stat().st_size for path in logs}
    return [
        Waste(LOG, path, size - LOG_BYTES + _size(_former(path))) for path, size in sizes.items() if size > LOG_BYTES
    ]


def find_results(runs: set[str]) -> list[Waste]:
    """Return the kept results that name one of these MLflow runs."""
    found = []
    for path in sorted((storage.home() / "results").glob("*")):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if any(run in text for run in runs):
                found.append(Waste("kept result", path, path.stat().st_size))
    return found


def delete(waste: list[Waste]) -> None:
    """Delete it, unless it was used since it was found; what is gone already is no error."""
    for item in waste:
        if _last_use(item.path) > item.last_used or _is_held(item.path):
            continue
        if item.what == LOG:
            _shorten(item.path)
        elif item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path, ignore_errors=True)
        else:
            item.path.unlink(missing_ok=True)


def _shorten(log: Path) -> None:
    """Move the end of a log to a file beside it, and empty the log itself, which others go on writing to.

    They append, so that what they write next is at the new beginning. Only a line that is written between the last look
    and the emptying, some microseconds, is in neither.
    """
    with suppress(FileNotFoundError), log.open("rb+") as source, _former(log).open("wb") as target:
        Path(target.name).chmod(0o600)
        source.seek(-min(LOG_BYTES, _size(log)), os.SEEK_END)
        source.readline()  # the rest of one that began before
        shutil.copyfileobj(source, target)
        os.fsync(target.fileno())
        target.write(source.read())
        source.truncate(0)


def _former(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def measure(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; what vanishes meanwhile has none."""
    return sum(each.st_size for each in _ask(_list_below(path)) if S_ISREG(each.st_mode))


def _list_below(path: Path) -> Iterator[Path]:
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder) / name for name in (*folders, *files))


def _ask(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    """Give what the system says of these paths, but of those that are gone."""
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):
            yield path.lstat()


def _is_held(folder: Path) -> bool:
    """Tell whether a process works on a run's folder."""
    is_run = folder.parent == storage.home() / "runs"
    return is_run and (storage.is_held(folder.name) or storage.is_held(f"{folder.name}/train"))


def _last_use(path: Path) -> float:
    """Return when something was written or used last, in seconds since 1970; what vanished meanwhile is in use.

    Cached folders get the time of their use; what is in them keeps that of its making. Runs have theirs within.
    """
    is_run = path.parent == storage.home() / "runs"
    found = _ask(_list_below(path) if is_run else [path])
    return max((each.st_mtime for each in found), default=float("inf"))
