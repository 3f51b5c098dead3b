"""Files of object stores and of the hub's repositories: listed without being read, and fetched by ranges.

S3, Google's and Azure's stores are read by pyarrow's own clients; the hub by its file system for fsspec.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO, cast

from fsspec.utils import glob_translate  # type: ignore[import-untyped]

from tasks.ingestion.errors import DataError
from tasks.ingestion.sources.remote_files import RemoteFile, name_failure
from tasks.object_stores import open_store

_WILD = re.compile(r"[*?\[]")


def list_files(address: str) -> tuple[str, list[RemoteFile]]:
    """Return the folder that names are relative to, and the files: one, those below a folder, or those of a pattern.

    In a pattern * stays within a folder's name, and ** goes through folders.

    Raises:
        DataError: it cannot be listed.
    """
    scheme, _, path = address.partition("://")
    path = path.rstrip("/")
    wild = _WILD.search(path)
    base = path if wild is None else path[: wild.start()].rpartition("/")[0]
    with _explained(address):
        found = list(_list_hub(base) if scheme == "hf" else _list_store(scheme, base))
    if wild is not None:
        pattern = re.compile(glob_translate(path))
        found = [(name, size, version) for name, size, version in found if pattern.match(name)]
    files = [RemoteFile(f"{scheme}://{name}", size, f"{size} {version}", True) for name, size, version in found]
    is_one = wild is None and [name for name, _, _ in found] == [path]
    folder = base.rpartition("/")[0] if is_one else base
    return f"{scheme}://{folder}/", sorted(files, key=lambda file: file.address)


@contextmanager
def open_file(file: RemoteFile) -> Iterator[BinaryIO]:
    """Open a file for reading at any place.

    Raises:
        DataError: it cannot be read, or has another size than when it was listed.
    """
    scheme, _, path = file.address.partition("://")
    with _explained(file.address):
        if scheme == "hf":
            with _open_hub().open(path, "rb", block_size=8 << 20) as opened:
                yield opened
            return
        with open_store(scheme, path.split("/")[0]).open_input_file(path) as opened:
            if opened.size() != file.size:
                raise DataError(f"{file.address}: it was changed while it was read: start again")
            yield cast(BinaryIO, opened)


def _list_store(scheme: str, base: str) -> Iterator[tuple[str, int, str]]:
    """Yield name, size and time of change."""
    from pyarrow import fs  # type: ignore[import-untyped]

    store = open_store(scheme, base.split("/")[0])
    found = store.get_file_info(base)
    listed = [found]
    if found.type != fs.FileType.File:
        listed = store.get_file_info(fs.FileSelector(base, recursive=True))
    for info in listed:
        if info.type == fs.FileType.File:
            yield info.path, info.size, str(info.mtime_ns)


def _list_hub(base: str) -> Iterator[tuple[str, int, str]]:
    hub = _open_hub()
    info = hub.info(base)
    listed = [info] if info["type"] == "file" else hub.find(base, detail=True).values()
    for entry in listed:
        yield entry["name"], entry["size"], str(entry["blob_id"])


@cache
def _open_hub() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Raise a DataError for what a client says."""
    from pyarrow import ArrowException

    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, ArrowException, ImportError) as error:
        raise name_failure(address, error) from None
