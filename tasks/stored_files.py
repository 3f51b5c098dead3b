"""Files that workers put into an object store by themselves, and the list by which a folder knows those of its own.

A folder of which some files are in a store has `stored-files.json`: name, size, sha256 and rows of each. Its digest is
that of the whole folder (storage.digest_folder), so that the list is checked by the digest, and each file by the list
when it is fetched. Nobody needs all of them to know that they are the right ones.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from tasks.object_stores import STORES, open_store

logger = logging.getLogger(__name__)

LIST_NAME = "stored-files.json"
_BLOCK_BYTES = 8 << 20
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)
"""After which an operation that failed is tried again."""

T = TypeVar("T")


class StoreError(ValueError):
    """A store cannot be read or written."""


class LostError(StoreError):
    """What is in the store is not what was put there."""


class StoredFile(NamedTuple):
    """A file as it was put into a store."""

    num_bytes: int
    sha256: str
    num_rows: int = 0
    """Where it is a part of a table."""


def is_store(address: str) -> bool:
    """Tell whether workers can put files below an address themselves."""
    return address.partition("://")[0] in STORES


def put_file(path: Path, address: str, num_rows: int = 0, *, sha256: str | None = None) -> StoredFile:
    """Put a file at an address, whole or not at all.

    Args:
        path: of the file.
        address: where it is put.
        num_rows: of a part of a table.
        sha256: its digest, where it is known already.

    Raises:
        StoreError: it cannot be written.
    """

    def put(store: Any, name: str) -> StoredFile:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as source, store.open_output_stream(name) as file:
            while block := source.read(_BLOCK_BYTES):
                if sha256 is None:
                    digest.update(block)
                size += len(block)
                file.write(block)
        return StoredFile(size, sha256 or digest.hexdigest(), num_rows)

    return _try(address, put)


def read_file(address: str, stored: StoredFile) -> bytes:
    """Return a file's content.

    Raises:
        LostError: it is gone, or another one.
        StoreError: it cannot be read.
    """

    def read(store: Any, name: str) -> bytes:
        with store.open_input_file(name) as file:  # one request; a stream's would be one for each 16 KB
            return bytes(file.read_at(stored.num_bytes, 0)) if file.size() == stored.num_bytes else b""

    content = _try(address, read)
    if len(content) != stored.num_bytes or hashlib.sha256(content).hexdigest() != stored.sha256:
        raise LostError(f"{address} is damaged: its sha256 is not {stored.sha256[:12]}: start the run again")
    return content


def read_span(address: str, start: int, stop: int, sha256: str) -> bytes:
    """Return some bytes of a file, compared with their own digest.

    Raises:
        LostError: the file is gone, or the bytes are others.
        StoreError: it cannot be read.
    """

    def read(store: Any, name: str) -> bytes:
        with store.open_input_file(name) as file:
            return bytes(file.read_at(stop - start, start))

    content = _try(address, read)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise LostError(f"{address} is damaged from byte {start} to {stop}: start the run again")
    return content


def list_sizes(address: str) -> dict[str, int]:
    """Return the size of each file below an address, by its name below it; nothing where nothing is there."""

    def read(store: Any, name: str) -> dict[str, int]:
        from pyarrow import fs  # type: ignore[import-untyped]

        found = store.get_file_info(fs.FileSelector(name, allow_not_found=True, recursive=True))
        return {info.path[len(name) + 1 :]: info.size for info in found if info.type == fs.FileType.File}

    return _try(address, read)


def remove_files(address: str) -> None:
    """Delete all files below an address."""

    def remove(store: Any, name: str) -> None:
        from pyarrow import fs

        if store.get_file_info(name).type == fs.FileType.Directory:
            store.delete_dir(name)

    _try(address, remove)


def try_store(address: str) -> str:
    """Write a file below an address and delete it; return why that cannot be done, or nothing."""
    try:
        _try(f"{address}/trial", lambda store, name: _write_trial(store, name), pauses=())
    except StoreError as error:
        return str(error)
    return ""


def _write_trial(store: Any, name: str) -> None:
    with store.open_output_stream(name) as file:
        file.write(b"written by a worker, and deleted again")
    store.delete_file(name)


def write_list(folder: Path, files: Mapping[str, StoredFile]) -> None:
    """Write which files of a folder are in a store, by their names below it."""
    (folder / LIST_NAME).write_text(json.dumps(files, indent=0, sort_keys=True), encoding="utf-8")


def read_list(folder: Path) -> dict[str, StoredFile]:
    """Return the files of a folder that are in a store; none where it has no list.

    Raises:
        LostError: the list is none, or names a file outside of the folder.
    """
    path = folder / LIST_NAME
    if not path.is_file():
        return {}
    try:
        found = {str(name): StoredFile(*entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
        names = [PurePosixPath(name) for name in found]
    except (ValueError, TypeError, AttributeError) as error:
        raise LostError(f"{path} is damaged ({error})") from None
    if any(name.is_absolute() or ".." in name.parts or "\\" in str(name) for name in names):
        raise LostError(f"{path} names a file outside of its folder")
    return found


def find_absent(folder: Path, wanted: Iterable[str] | None = None) -> list[str]:
    """Return the names of the files of a folder that are in the store only.

    Args:
        folder: with a list, or without.
        wanted: files, or tables that are folders, of which are told; None: all.
    """
    names = [name for name in read_list(folder) if not (folder / name).is_file()]
    if wanted is None:
        return names
    kept = set(wanted)
    return [name for name in names if name in kept or name.partition("/")[0] in kept]


def _try(address: str, work: Callable[[Any, str], T], pauses: Sequence[float] = _PAUSES_SECONDS) -> T:
    """Do something with the client of an address and the path there; again, where it fails for a while."""
    from pyarrow import ArrowException

    scheme, _, path = address.partition("://")
    for pause in (*pauses, None):
        try:
            return work(open_store(scheme, path.split("/")[0]), path)
        except FileNotFoundError:
            raise LostError(f"{address} is gone: start the run again, which makes it again") from None
        except (OSError, ArrowException) as error:
            if pause is None:
                words = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
                raise StoreError(
                    f"{address} cannot be read or written ({type(error).__name__}: {words}): correct the rights there, "
                    "or the credentials in the environment of all machines, and start again"
                ) from error
            logger.warning("%s: %s: trying again in %.0f s", address, error, pause)
            time.sleep(pause)
    raise AssertionError("no attempt was made")
