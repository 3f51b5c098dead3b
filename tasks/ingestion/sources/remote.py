"""Datasets at addresses: which files they are, and the parts of them that are read, brought to this machine's disk.

A part that was brought lies in a file of its own at its own place, with holes for what nobody reads: readers find there
what they would find in the file itself, and name the same bytes and lines.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tasks import storage
from tasks.addresses import check_address
from tasks.allowed_roots import check_allowed_address
from tasks.ingestion.errors import DataError
from tasks.ingestion.sources import stores, web
from tasks.ingestion.sources.columnar import BYTE_KINDS, WHOLE, FileSpan
from tasks.ingestion.sources.files import (
    KNOWN,
    METADATA_NAMES,
    Source,
    SourceFile,
    is_other_compressed,
    kind_of_name,
    warn_of_folder,
)
from tasks.ingestion.sources.remote_files import RemoteFile
from tasks.parcels import list_bytes

_BLOCK_BYTES = 8 << 20


def find_at_address(address: str, setting: str) -> Source:
    """Return the files at an address: one, those below a folder of a store, or those of a pattern.

    Raises:
        AddressError: none that is read.
        OutsideRootsError: the service does not read it.
        DataError: nothing is there, or no rows.
    """
    check_address(address)
    check_allowed_address(address, setting)
    if address.startswith("http"):
        folder, listed = address.rpartition("/")[0] + "/", [web.find_file(address)]
    else:
        folder, listed = stores.list_files(address)
    files, skipped = [], []
    for remote in listed:
        name = remote.address.removeprefix(folder)
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts):
            continue
        kind = None if is_other_compressed(path) else kind_of_name(path)
        if kind is None or path.name in METADATA_NAMES:
            skipped.append(name)
        else:
            files.append(SourceFile(Path(remote.address), name, kind, remote))
    if not files:
        what = f"no dataset file among {len(listed)}" if listed else "nothing"
        raise DataError(f"{address}: {what} is there: correct the address; known endings are {KNOWN}")
    return Source(address, tuple(files), warn_of_folder(files, skipped))


@contextmanager
def brought(remote: RemoteFile, kind: str, span: FileSpan) -> Iterator[Path]:
    """Give a file on this machine that has what a span reads of a remote one, and is deleted at the end.

    Raises:
        DataError: it cannot be read.
    """
    with storage.new_folder() as folder:
        path = folder / PurePosixPath(remote.address).name
        _write(remote, _list_ranges(remote, kind, span), path)
        yield path


def _list_ranges(remote: RemoteFile, kind: str, span: FileSpan) -> Sequence[tuple[int, int | None]]:
    """Return which bytes a span of a file reads."""
    if span == WHOLE:
        return ((0, remote.size),)
    if kind in BYTE_KINDS:
        assert remote.size is not None, remote
        return span.list_bytes(remote.size)
    assert kind == "parquet", kind
    with stores.open_file(remote) as file:
        return list_bytes(file, span.start, span.stop)


def _write(remote: RemoteFile, ranges: Sequence[tuple[int, int | None]], path: Path) -> None:
    with path.open("wb") as file:
        for start, stop in ranges:
            file.seek(start)
            for block in read_range(remote, start, stop):
                file.write(block)


def read_range(remote: RemoteFile, start: int, stop: int | None) -> Iterator[bytes]:
    """Yield the bytes of a file from a place, up to another one or the end, block by block.

    Raises:
        DataError: they cannot be read.
    """
    if remote.address.startswith("http"):
        yield from web.fetch(remote, start, stop)
        return
    assert stop is not None, remote
    with stores.open_file(remote) as file:
        file.seek(start)
        while start < stop:
            block = file.read(min(_BLOCK_BYTES, stop - start))
            if not block:
                raise DataError(f"{remote.address}: it ends at byte {start:,} of {stop:,}: start again")
            start += len(block)
            yield block


def survey_lines(remote: RemoteFile, start: int, stop: int) -> tuple[int, int | None]:
    """Return how many line feeds a part of a file has, and the place of the first one."""
    num_feeds, first, place = 0, None, start
    for block in read_range(remote, start, stop):
        if first is None and (found := block.find(b"\n")) >= 0:
            first = place + found
        num_feeds += block.count(b"\n")
        place += len(block)
    return num_feeds, first
