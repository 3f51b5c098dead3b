"""A place that machines share: a folder, or one of an object store, with what each of them needs to train.

A folder that is put there is whole once its list of files (name, size, sha256) is there, which is written last; what is
fetched from there is checked against that list. A list names files below its own folder only.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from tasks.addresses import AddressError, check_address, is_address
from tasks.object_stores import STORES, open_store
from tasks.training.records import TrainingError

logger = logging.getLogger(__name__)

TEAM_VARIABLE = "SFT_TEAM"
"""Folder or address (s3://bucket/team) that the machines of a team share."""
_LIST = "files.json"
_BLOCK_BYTES = 8 << 20
_NUM_THREADS = 8
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""After which an operation that failed is tried again."""

T = TypeVar("T")
Files = dict[str, tuple[int, str]]
"""Size and sha256 of each file of a folder, by its name below the folder."""


class PlaceError(TrainingError):
    """The place cannot be read or written."""


class DamageError(PlaceError):
    """What is there is not what was put there."""


@dataclass(frozen=True)
class Place:
    """A folder of this machine's, or of an object store; names in it are like `a/b`."""

    address: str

    def below(self, name: str) -> "Place":
        """Return a folder in it as a place of its own."""
        return Place(f"{self.address.rstrip('/')}/{name}")

    def put_folder(self, folder: Path, name: str) -> None:
        """Copy a folder to the place; one of that name is replaced, and in between is not there."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        assert _LIST not in names, folder
        self._try(lambda store, base: _delete_file(store, f"{base}/{name}/{_LIST}"))
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            listed = dict(zip(names, pool.map(lambda path: self._put(path, folder, name), files), strict=True))
        self.write_text(f"{name}/{_LIST}", json.dumps(listed))

    def fetch_folder(self, name: str, folder: Path, leave: Collection[str] = ()) -> None:
        """Make a folder of this machine the one of that name; files that are the same already are not read again.

        Args:
            name: of the folder in the place.
            folder: of this machine.
            leave: files that are not fetched; those that are here already stay.

        Raises:
            DamageError: it is not there, or not what was put there.
        """
        wanted = self.list_files(name)
        if wanted is None:
            raise DamageError(f"{self.address}/{name}: no such folder is there, or it was not written to its end")
        fetched = [(file, found) for file, found in wanted.items() if file not in leave]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(lambda item: self._fetch(f"{name}/{item[0]}", folder / item[0], *item[1]), fetched))
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if path.relative_to(folder).as_posix() not in wanted:
                path.unlink()

    def list_files(self, name: str) -> Files | None:
        """Return the files of a folder that is whole; None where there is none."""
        text = self.read_text(f"{name}/{_LIST}")
        if text is None:
            return None
        try:
            listed = {str(file): (int(size), str(digest)) for file, (size, digest) in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise DamageError(f"{self.address}/{name}/{_LIST}: it is damaged ({error}): delete the folder") from None
        for file in listed:
            path = PurePosixPath(file)
            if path.is_absolute() or ".." in path.parts or "\\" in file:
                raise PlaceError(f"{self.address}/{name}/{_LIST}: it names {file!r}, which is outside its folder")
        return listed

    def list_names(self, name: str) -> list[str]:
        """Return the names of what is directly in a folder, in order; nothing where there is no such folder."""
        return self._try(lambda store, base: _list_names(store, f"{base}/{name}"))

    def remove(self, name: str) -> None:
        """Delete a folder, its list first, or a file; nothing where there is none."""
        self._try(lambda store, base: _delete_file(store, f"{base}/{name}/{_LIST}"))
        self._try(lambda store, base: _delete(store, f"{base}/{name}"))

    def write_text(self, name: str, text: str) -> None:
        """Write a file."""

        def write(store: Any, base: str) -> None:
            _make_folder(store, f"{base}/{name}".rpartition("/")[0])
            partial = f"{base}/{name}" if self._is_store else f"{base}/{name}.partial"
            with store.open_output_stream(partial) as file:
                file.write(text.encode())
            if partial != f"{base}/{name}":
                store.move(partial, f"{base}/{name}")

        self._try(write)

    def read_text(self, name: str) -> str | None:
        """Return a file's text; None where there is none."""

        def read(store: Any, base: str) -> str | None:
            try:
                with store.open_input_stream(f"{base}/{name}") as file:
                    return bytes(file.read()).decode()
            except FileNotFoundError:
                return None

        return self._try(read)

    @property
    def _is_store(self) -> bool:
        return is_address(self.address)

    def _put(self, path: Path, folder: Path, name: str) -> tuple[int, str]:
        def put(store: Any, base: str) -> tuple[int, str]:
            target = f"{base}/{name}/{path.relative_to(folder).as_posix()}"
            _make_folder(store, target.rpartition("/")[0])
            digest, size = hashlib.sha256(), 0
            with path.open("rb") as source, store.open_output_stream(target) as file:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    file.write(block)
            return size, digest.hexdigest()

        return self._try(put)

    def _fetch(self, name: str, path: Path, size: int, digest: str) -> None:
        if path.is_file() and path.stat().st_size == size and _digest(path) == digest:
            return
        partial = path.with_name(f"{path.name}.partial")

        def fetch(store: Any, base: str) -> str:
            found = hashlib.sha256()
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                opened = store.open_input_stream(f"{base}/{name}")
            except FileNotFoundError:
                return "none: it is gone"
            with opened as file, partial.open("wb") as target:
                while block := file.read(_BLOCK_BYTES):
                    found.update(block)
                    target.write(block)
            return found.hexdigest()

        if self._try(fetch) != digest:
            partial.unlink(missing_ok=True)
            raise DamageError(f"{self.address}/{name}: it is damaged: its sha256 is not the one in {_LIST}")
        partial.replace(path)

    def _try(self, work: Callable[[Any, str], T]) -> T:
        """Do something with the client and the path of the place there; again, where it fails for a while.

        Raises:
            PlaceError: it fails each time.
        """
        with _explained(self.address):
            store, base = _open(self.address)
            for pause in _PAUSES_SECONDS:
                try:
                    return work(store, base)
                except OSError as error:
                    if not self._is_store or isinstance(error, FileNotFoundError):
                        raise
                    logger.warning("%s: %s: trying again in %.0f s", self.address, error, pause)
                    time.sleep(pause)
            return work(store, base)


def find_place(variables: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that the environment names, if any.

    Raises:
        PlaceError: no such addresses are written to.
    """
    address = variables.get(TEAM_VARIABLE, "")
    return open_place(address) if address else None


def open_place(address: str) -> Place:
    """Return the place at an address, or in a folder of this machine.

    Raises:
        PlaceError: no such addresses are written to.
    """
    if not is_address(address):
        return Place(str(Path(address).absolute()))
    try:
        check_address(address)
    except AddressError as error:
        raise PlaceError(f"{TEAM_VARIABLE}: {error}") from None
    if address.partition("://")[0] not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise PlaceError(f"{TEAM_VARIABLE} = {address}: nothing can be written there: give a folder, or {known}")
    return Place(address.rstrip("/"))


def _open(address: str) -> tuple[Any, str]:
    """Return the client for an address, and the path in it."""
    if is_address(address):
        scheme, _, path = address.partition("://")
        return open_store(scheme, path.split("/")[0]), path.rstrip("/")
    from pyarrow import fs  # type: ignore[import-untyped]

    return fs.LocalFileSystem(), address


def _make_folder(store: Any, path: str) -> None:
    """Make a folder where there are folders."""
    if store.type_name == "local":
        store.create_dir(path, recursive=True)


def _list_names(store: Any, path: str) -> list[str]:
    from pyarrow import fs

    found = store.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found)


def _delete(store: Any, path: str) -> None:
    from pyarrow import fs

    kind = store.get_file_info(path).type
    if kind == fs.FileType.Directory:
        store.delete_dir(path)
    elif kind == fs.FileType.File:
        store.delete_file(path)


def _delete_file(store: Any, path: str) -> None:
    from pyarrow import fs

    if store.get_file_info(path).type == fs.FileType.File:
        store.delete_file(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Raise a PlaceError for what a client says."""
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ArrowException, ImportError) as error:
        words = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        room = "" if is_address(address) else f" ({_count_free(Path(address)):,.1f} MB are free there)"
        raise PlaceError(
            f"{TEAM_VARIABLE} = {address}: it cannot be read or written ({type(error).__name__}: {words}){room}: "
            "correct the address, the rights there or the credentials in the environment, and start again"
        ) from error


def _count_free(folder: Path) -> float:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free / 1e6
