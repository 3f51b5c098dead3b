"""What can be deleted from a home, and how many bytes it takes."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tasks import storage, tracking
from tasks.registry.retention import RESUMABLE

DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Waste:
    """A file or folder that can be deleted."""

    what: str
    """cached folder, kept result, checkpoints, interrupted run, or log."""
    path: Path
    num_bytes: int


def find_waste(*, days: float, interrupted: bool) -> list[Waste]:
    """Return what was not used for so many days and is found or made again where it is wanted.

    Args:
        days: since it was written or last used.
        interrupted: also checkpoints of runs that could still go on.
    """
    home, before = storage.home(), time.time() - days * DAY_SECONDS
    found = [
        Waste("cached folder", path, measure(path))
        for path in sorted((home / "cache").glob("[0-9a-f][0-9a-f]/*"))
        if path.stat().st_mtime < before
    ]
    found += [
        Waste("kept result", path, measure(path))
        for path in sorted((home / "results").glob("*"))
        if path.is_file() and path.stat().st_mtime < before
    ]
    for folder in sorted((home / "runs").glob("*")):
        held = storage.is_held(folder.name) or storage.is_held(f"{folder.name}/train")
        if folder.is_dir() and _last_change(folder) < before and not held:
            resumable = tracking.has_records() and tracking.find_status(folder.name) in RESUMABLE
            if interrupted or not resumable:
                what = "interrupted run" if resumable else "checkpoints"
                found.append(Waste(what, folder, measure(folder)))
    return found


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
    """Delete it; what is gone already is no error."""
    for item in waste:
        if item.path.is_dir() and not item.path.is_symlink():
            shutil.rmtree(item.path, ignore_errors=True)
        else:
            item.path.unlink(missing_ok=True)


def measure(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def _last_change(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.rglob("*")), default=folder.stat().st_mtime)
