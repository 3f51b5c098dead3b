"""A content-addressed folder cache on this machine, and digests of files and folders.

`SFT_HOME` (default `.sft` in the working directory) holds everything that a run leaves on this machine:
`cache/` (folders by digest), `runs/` (checkpoints by MLflow run), `results/` (Prefect's task results) and,
without servers, `mlflow.db` and `artifacts/`.
"""

import errno
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import BaseFileLock, FileLock, Timeout

from tasks.stored_files import LIST_NAME, LostError, read_list

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_MAX_READERS = 8
_LOCK_SUFFIX = ".lock"
# Clocks of file systems tick every few milliseconds: within a tick a file can change and keep its times.
_SETTLED_NANOSECONDS = 50_000_000

_Stamp = tuple[int, int, int, int, int]
_cleared: set[Path] = set()
"""Where this process has looked for what killed ones have left."""
_digested: dict[_Stamp, str] = {}
"""Digests of files by their stamps, of this process."""


class HomeError(ValueError):
    """SFT_HOME cannot be used."""


def home() -> Path:
    """Return SFT_HOME as an absolute path; it need not exist yet."""
    return Path(os.environ.get("SFT_HOME", ".sft")).absolute()


def make_home() -> Path:
    """Return SFT_HOME, made for its owner alone when it is missing; one that is there keeps its mode.

    Raises:
        HomeError: it cannot be made.
    """
    folder = home()
    if not folder.is_dir():
        with _explained():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)  # names, data and models are in it
    return folder


@contextmanager
def _explained() -> Iterator[None]:
    """Raise a HomeError for what the system says of SFT_HOME."""
    try:
        yield
    except OSError as error:
        raise HomeError(
            f"SFT_HOME = {home()}: nothing can be written there ({error.strerror}): make room, or set SFT_HOME to a "
            "folder that you may write to"
        ) from error


def digest_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal, read in slices.

    A file that this process has digested before, and whose size, times and inode are as they were then, is not read
    again. The time of the inode's last change is among them: nobody can set it back.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        stamp = _read_stamp(file)
        if (known := _digested.get(stamp)) is not None:
            return known
        while block := file.read(_READ_BYTES):
            digest.update(block)
        if _read_stamp(file) == stamp and time.time_ns() - stamp[-1] > _SETTLED_NANOSECONDS:
            _digested[stamp] = digest.hexdigest()
    return digest.hexdigest()


def _read_stamp(file: BinaryIO) -> _Stamp:
    """Return device, inode, size, and the times of the last changes of content and of inode, in nanoseconds."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_folder(folder: Path) -> str:
    """Return the sha256 over the sorted relative names and contents of a folder's files.

    A file that is in a store only counts as its list says (see stored_files), and the list itself does not: the digest
    is the same wherever the files are.

    Raises:
        LostError: the list is damaged.
    """
    paths = [path for path in folder.rglob("*") if path.is_file()]
    stored = read_list(folder) if folder / LIST_NAME in paths else {}
    if folder / LIST_NAME in paths:
        paths.remove(folder / LIST_NAME)
    with ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1)) as pool:  # hashing frees the interpreter
        found = dict(zip((path.relative_to(folder) for path in paths), pool.map(digest_file, paths), strict=True))
    whole = {Path(name): file.sha256 for name, file in stored.items()} | found
    digest = hashlib.sha256()
    for path in sorted(whole):
        digest.update(f"{path.as_posix()}\0{whole[path]}\n".encode())
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Return when all bytes of a folder's files are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def new_folder() -> Iterator[Path]:
    """Give an empty folder on the cache's own file system; what is still there at the end is deleted.

    What killed processes have left is deleted too, when a process asks for its first folder.

    Raises:
        HomeError: nothing can be written there.
    """
    root = make_home() / "cache" / "new"
    with _explained():
        root.mkdir(parents=True, exist_ok=True)
        if root not in _cleared:
            _cleared.add(root)
            clear_abandoned(root)
        folder = root / uuid.uuid4().hex
        lock = folder.with_suffix(_LOCK_SUFFIX)
        held = make_lock(lock).acquire()
    with held:
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def make_lock(path: Path, *, wait_seconds: float = -1.0) -> BaseFileLock:
    """Return a lock on a file, which is held within `with`; the kernel frees it however the process dies.

    Args:
        path: of the file, made where it is missing.
        wait_seconds: until `Timeout`, an OSError, is raised; below 0 it is waited for as long as it takes.
    """
    return FileLock(path, timeout=wait_seconds, thread_local=False, fallback_to_soft=False)


def check_home() -> None:
    """Make SFT_HOME where it is missing; raise HomeError where nothing can be written there."""
    with new_folder():
        pass


def clear_abandoned(root: Path) -> list[Path]:
    """Delete the new folders that no living process holds, and return them."""
    gone = []
    for lock in root.glob(f"*{_LOCK_SUFFIX}"):
        with suppress(OSError), make_lock(lock, wait_seconds=0):  # OSError: it is held
            folder = lock.with_name(lock.name.removesuffix(_LOCK_SUFFIX))
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink()
            gone.append(folder)
    return gone


def cached_folder(digest: str) -> Path | None:
    """Return the cached folder of this digest, or None; a damaged one is taken out of the cache, which the log says."""
    place = _place(digest)
    if not os.path.lexists(place):
        return None
    damage = _find_damage(place, digest)
    if damage is None:
        with suppress(OSError):  # a home that may only be read
            os.utime(place)  # when it was last used, for who cleans up
        return place
    logger.warning("%s is damaged (%s): it leaves the cache, to be fetched or made again", place, damage)
    with new_folder() as aside, suppress(FileNotFoundError):  # unless another process was faster
        place.rename(aside / "damaged")
    return None


def _find_damage(place: Path, digest: str) -> str | None:
    """Return in which way a folder is not what its digest says, or None."""
    if not place.is_dir():
        return "it is no folder"
    try:
        found = digest_folder(place)
    except (OSError, LostError) as error:
        return str(error)
    return None if found == digest else f"its digest is {found[:12]}"


def keep_folder(folder: Path, digest: str) -> Path:
    """Move a finished folder into the cache, whole or not at all; an equal one that is there already stays."""
    place = _place(digest)
    place.parent.mkdir(parents=True, exist_ok=True)
    if cached_folder(digest) is not None:
        return place
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno == errno.EXDEV:  # checkpoints or the cache on a volume of its own
            return _keep_copy(folder, digest)
        if not place.is_dir():  # another process did not win the race: a real error
            raise
    return place


def _keep_copy(folder: Path, digest: str) -> Path:
    """Move a folder from another file system: copied beside its place first, so that half a copy is never found."""
    with new_folder() as beside:
        copy = beside / "copy"
        shutil.copytree(folder, copy, symlinks=True)
        place = keep_folder(copy, digest)
    shutil.rmtree(folder)
    return place


def run_folder(mlflow_run_id: str) -> Path:
    """Return the folder of one pipeline run's checkpoints, made when missing."""
    folder = make_home() / "runs" / mlflow_run_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def hold_run(mlflow_run_id: str, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of a pipeline run; the kernel frees it however the process dies.

    Raises:
        ValueError: a living process has the run, and kept it for so long.
    """
    try:
        held = make_lock(run_folder(mlflow_run_id) / "lock", wait_seconds=wait_seconds).acquire()
    except Timeout:
        raise ValueError(
            f"run {mlflow_run_id} is being worked on by another process on this machine: wait for it or stop it"
        ) from None
    with held:
        yield


def is_held(mlflow_run_id: str) -> bool:
    """Tell whether a living process of this machine has the run."""
    path = home() / "runs" / mlflow_run_id / "lock"
    if not path.is_file():
        return False
    try:
        with make_lock(path, wait_seconds=0):
            return False
    except Timeout:
        return True


def _place(digest: str) -> Path:
    return home() / "cache" / digest[:2] / digest
