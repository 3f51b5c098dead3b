"""What calls read and make on disks, so that a machine that does not share one can be sent them.

A call's arguments name files by the paths that they have where the call is made. Elsewhere the files that were sent
lie in other places: whoever opens a file that may have been sent asks `find` where it is.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import BinaryIO

_TRAILER = Struct("<I4s")
"""The end of a Parquet file: the length of its footer, and the format's name."""
_places: dict[Path, Path] = {}
"""Where this process has what was sent, by the path that it has with the sender."""


@dataclass(frozen=True)
class Enclosure:
    """A file or a folder that a call reads."""

    path: Path
    spans: tuple[tuple[int, int], ...] | None = None
    """The bytes that are read, from and up to; None for the whole."""
    is_common: bool = False
    """All calls read it, whole: who gets it keeps it for the next call."""


@dataclass(frozen=True)
class Parcel:
    """What one call reads, and the folder that it makes, if any."""

    reads: tuple[Enclosure, ...]
    makes: Path | None = None


def list_bytes(table: BinaryIO, first: int, stop: int | None) -> tuple[tuple[int, int], ...]:
    """Return which bytes of a Parquet file are read for its row groups from `first` up to `stop`, the footer's last.

    Args:
        table: the file, open for reading at any place.
        first: number of a row group.
        stop: of the one behind the last; None for all.

    Raises:
        pyarrow.ArrowException: it is no Parquet file.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    metadata = pq.read_metadata(table)
    bounds = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)[first:stop]):
        for column in map(group.column, range(group.num_columns)):
            offsets = (column.dictionary_page_offset, column.data_page_offset)
            start = min(offset for offset in offsets if offset is not None)
            bounds.append((start, start + column.total_compressed_size))
    size = table.seek(0, os.SEEK_END)
    table.seek(size - _TRAILER.size)
    footer = size - _TRAILER.size - _TRAILER.unpack(table.read())[0]
    rows = ((min(start for start, _ in bounds), max(stop for _, stop in bounds)),) if bounds else ()
    return (*rows, (footer, size))


def find(path: Path) -> Path:
    """Return where a file or folder is on this machine, that is known by a path."""
    return _places.get(path, path)


@contextmanager
def unpacked(places: Mapping[Path, Path]) -> Iterator[None]:
    """Let `find` return other places in the body."""
    _places.update(places)
    try:
        yield
    finally:
        for path in places:
            del _places[path]
